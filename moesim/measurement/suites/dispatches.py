"""Bringing tokens to experts and back: by sorting and copying rows, or by products with one-hot masks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, PassName, Target, Work
from moesim.measurement.routed_loads import expert_choices, layer_loads
from moesim.measurement.suites.routed_rows import (
    RowOrder,
    gather_rows,
    sort_rows,
    sum_rows,
    weigh_rows,
    weigh_rows_gradient,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench

INDEX_BYTES = 8


@dataclass(frozen=True, slots=True)
class PermuteShape:
    """Tokens, each copied to several experts."""

    tokens: int
    hidden: int
    num_experts: int
    experts_per_token: int


@dataclass(frozen=True, slots=True)
class OneHotShape:
    """Routing groups whose tokens reach slots of experts through a mask (GShard, mesh-TensorFlow)."""

    num_groups: int
    group_tokens: int
    num_experts: int
    slots: int
    hidden: int
    experts_per_token: int


PERMUTE_SHAPES = (
    PermuteShape(4096, 4096, 8, 2),
    PermuteShape(4096, 7168, 256, 8),
    PermuteShape(16384, 2048, 128, 8),
    PermuteShape(8192, 1024, 512, 1),
    PermuteShape(512, 4096, 64, 8),
)
ONE_HOT_SHAPES = (
    OneHotShape(1, 1024, 128, 20, 1024, 2),
    OneHotShape(4, 1024, 512, 5, 1024, 2),
    OneHotShape(1, 1024, 960, 2, 1024, 1),
    OneHotShape(8, 512, 32, 40, 1024, 2),
    OneHotShape(1, 4096, 64, 160, 2048, 2),
    OneHotShape(16, 256, 8, 80, 4096, 2),
)
CPU_PERMUTE_SHAPES = (PermuteShape(128, 64, 8, 2),)
CPU_ONE_HOT_SHAPES = (OneHotShape(2, 64, 8, 16, 64, 2),)
# Passes over the k rows of each token, and over the tokens themselves, in the kernels of this file.
ROW_PASSES: dict[tuple[str, PassName], tuple[int, int]] = {
    ("permute", "forward"): (1, 1),
    ("permute", "backward"): (3, 1),
    ("unpermute", "forward"): (5, 1),
    ("unpermute", "backward"): (6, 1),
}
ONE_HOT_PASSES: tuple[tuple[str, PassName], ...] = (
    ("one_hot_dispatch", "forward"),
    ("one_hot_combine", "forward"),
    ("one_hot_dispatch", "backward"),
    ("one_hot_combine", "backward"),
    ("one_hot_masks", "forward"),
)


def cases(target: Target) -> list[Case]:
    """Return the cases of dispatch: rows copied and one-hot masks in turn."""
    on_cpu = target.device == "cpu"
    found: list[Case] = []
    copied = CPU_PERMUTE_SHAPES if on_cpu else PERMUTE_SHAPES
    masked = CPU_ONE_HOT_SHAPES if on_cpu else ONE_HOT_SHAPES
    for index in range(max(len(copied), len(masked))):
        for dtype in target.dtypes:
            for shape in copied[index : index + 1]:
                found += [_rows_case(shape, dtype, operation, kind, target.seed) for operation, kind in ROW_PASSES]
                found.append(_sort_case(shape, target.seed))
            for one_hot in masked[index : index + 1]:
                found += [
                    _one_hot_case(one_hot, dtype, operation, kind, target.seed) for operation, kind in ONE_HOT_PASSES
                ]
    return list({case.identifier: case for case in found}.values())


def _rows_case(shape: PermuteShape, dtype: str, operation: str, kind: PassName, seed: int) -> Case:
    of_rows, of_tokens = ROW_PASSES[operation, kind]
    rows = shape.tokens * shape.experts_per_token
    moved = float(
        ELEMENT_BYTES[dtype] * shape.hidden * (rows * of_rows + shape.tokens * of_tokens) + INDEX_BYTES * rows
    )
    prepare = partial(prepare_rows, shape=shape, dtype=dtype, operation=operation, kind=kind, seed=seed)
    return Case("dispatch", operation, kind, dtype, _permute_names(shape), 0.0, moved, moved, prepare)


def _sort_case(shape: PermuteShape, seed: int) -> Case:
    rows = shape.tokens * shape.experts_per_token
    moved = float(6 * INDEX_BYTES * rows)
    prepare = partial(prepare_sort, shape=shape, seed=seed)
    return Case("dispatch", "sort", "forward", "fp32", _permute_names(shape), 0.0, moved, moved, prepare)


def _permute_names(shape: PermuteShape) -> dict[str, int | str]:
    return {
        "tokens": shape.tokens,
        "hidden": shape.hidden,
        "experts": shape.num_experts,
        "experts_per_token": shape.experts_per_token,
    }


def _choices(bench: Workbench, shape: PermuteShape, seed: int) -> Tensor:
    loads = layer_loads("W0", shape.tokens, shape.num_experts, shape.experts_per_token, seed=seed).loads
    return bench.integers(expert_choices(loads, shape.experts_per_token, seed=seed))


def prepare_sort(bench: Workbench, *, shape: PermuteShape, seed: int) -> Work:
    """Fill the choices of tokens; the call sorts them and counts the loads.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : PermuteShape
        Sizes.
    seed : int
        Of the routing.
    """
    import torch

    experts = _choices(bench, shape, seed)
    counts = torch.ones(experts.numel(), dtype=torch.int64, device=bench.device)

    def sort() -> tuple[RowOrder, Tensor]:
        loads = counts.new_zeros(shape.num_experts).scatter_add_(0, experts.flatten(), counts)
        return sort_rows(experts), loads.cumsum(0)

    return Work(sort, "argsort, scatter, scatter_add, cumsum")


def prepare_rows(
    bench: Workbench, *, shape: PermuteShape, dtype: str, operation: str, kind: PassName, seed: int
) -> Work:
    """Fill tokens or rows; the call copies them to or from their experts.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : PermuteShape
        Sizes.
    dtype : str
        Of the tokens; the gates have the same.
    operation, kind : str
        A key of ``ROW_PASSES``.
    seed : int
        Of the routing.
    """
    order = sort_rows(_choices(bench, shape, seed))
    num_rows = order.token_of_row.shape[0]
    rows = bench.normal(num_rows, shape.hidden, dtype=dtype)
    tokens = bench.normal(shape.tokens, shape.hidden, dtype=dtype)
    gates = bench.normal(*order.row_of_choice.shape, dtype=dtype)
    match operation, kind:
        case "permute", "forward":
            return Work(lambda: gather_rows(tokens, order), "index_select")
        case "permute", "backward":
            return Work(lambda: sum_rows(rows, order), "index_select, sum")
        case "unpermute", "forward":
            return Work(lambda: weigh_rows(rows, gates, order), "index_select, mul, sum")
        case _:
            name = "index_select, mul, mul, sum"
            return Work(lambda: weigh_rows_gradient(tokens, rows, gates, order), name)


def _one_hot_case(shape: OneHotShape, dtype: str, operation: str, kind: PassName, seed: int) -> Case:
    size, num_groups, hidden = ELEMENT_BYTES[dtype], shape.num_groups, shape.hidden
    mask = num_groups * shape.group_tokens * shape.num_experts * shape.slots
    tokens = num_groups * shape.group_tokens * hidden
    slots = num_groups * shape.num_experts * shape.slots * hidden
    products = 2 if (operation, kind) == ("one_hot_combine", "backward") else 1
    flops, moved = products * 2.0 * mask * hidden, float(size * (products * (mask + slots) + products * tokens))
    if operation == "one_hot_masks":
        flops, moved = 0.0, float(2 * size * mask)
    named = {
        "groups": num_groups,
        "group_tokens": shape.group_tokens,
        "experts": shape.num_experts,
        "slots": shape.slots,
        "hidden": hidden,
        "experts_per_token": shape.experts_per_token,
    }
    held = float(size * (2 * mask + tokens + slots))
    prepare = partial(prepare_one_hot, shape=shape, dtype=dtype, operation=operation, kind=kind, seed=seed)
    return Case("dispatch", operation, kind, dtype, named, flops, moved, held, prepare)


def prepare_one_hot(
    bench: Workbench, *, shape: OneHotShape, dtype: str, operation: str, kind: PassName, seed: int
) -> Work:
    """Fill masks and tokens; the call multiplies by the masks, or builds them.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : OneHotShape
        Sizes.
    dtype : str
        Of masks and tokens.
    operation, kind : str
        One of ``ONE_HOT_PASSES``.
    seed : int
        Of the routing.
    """
    experts = _grouped_choices(bench, shape, seed)
    gates = bench.normal(*experts.shape, dtype=dtype).sigmoid()
    if operation == "one_hot_masks":
        return Work(lambda: one_hot_masks(experts, gates, shape), "one_hot, cumsum, einsum")
    dispatch, combine = one_hot_masks(experts, gates, shape)
    tokens = bench.normal(shape.num_groups, shape.group_tokens, shape.hidden, dtype=dtype)
    slots = bench.normal(shape.num_experts, shape.num_groups, shape.slots, shape.hidden, dtype=dtype)
    match operation, kind:
        case "one_hot_dispatch", "forward":
            return Work(lambda: to_slots(dispatch, tokens), "einsum")
        case "one_hot_dispatch", "backward":
            return Work(lambda: to_tokens(dispatch, slots), "einsum")
        case "one_hot_combine", "forward":
            return Work(lambda: to_tokens(combine, slots), "einsum")
        case _:
            return Work(lambda: (to_slots(combine, tokens), mask_gradient(tokens, slots)), "two einsums")


def _grouped_choices(bench: Workbench, shape: OneHotShape, seed: int) -> Tensor:
    """Return experts of shape (groups, tokens, choices), loads equal within each group."""
    import numpy as np

    loads = layer_loads("W0", shape.group_tokens, shape.num_experts, shape.experts_per_token, seed=seed).loads
    drawn = [expert_choices(loads, shape.experts_per_token, seed=seed + group) for group in range(shape.num_groups)]
    return bench.integers(np.stack(drawn))


def one_hot_masks(experts: Tensor, gates: Tensor, shape: OneHotShape) -> tuple[Tensor, Tensor]:
    """Build the masks of dispatch and combine; choices beyond an expert's slots are dropped.

    Parameters
    ----------
    experts, gates : tensors of shape (groups, tokens, choices)
        Expert and weight of each choice.
    shape : OneHotShape
        Sizes.

    Returns
    -------
    dispatch, combine : tensors of shape (groups, tokens, experts, slots)
        One, or the gate, where a token takes a slot. First choices of all tokens go before second ones.
    """
    import torch

    chosen = torch.nn.functional.one_hot(experts, shape.num_experts)
    first = chosen.transpose(1, 2).flatten(1, 2)  # choice by choice, as GShard fills its slots
    place = (first.cumsum(dim=1) - 1).unflatten(1, chosen.transpose(1, 2).shape[1:3]).transpose(1, 2)
    slot = (place * chosen).sum(dim=-1)
    kept = slot < shape.slots
    slots = torch.nn.functional.one_hot(slot.clamp(max=shape.slots - 1), shape.slots)
    kept_slots = (slots * kept.unsqueeze(-1)).to(gates.dtype)
    chosen = chosen.to(gates.dtype)
    dispatch = torch.einsum("gske,gskc->gsec", chosen, kept_slots)
    combine = torch.einsum("gske,gskc->gsec", chosen * gates.unsqueeze(-1), kept_slots)
    return dispatch, combine


def to_slots(mask: Tensor, tokens: Tensor) -> Tensor:
    """Bring tokens[g, s, m] to slots[e, g, c, m]."""
    import torch

    return torch.einsum("gsec,gsm->egcm", mask, tokens)


def to_tokens(mask: Tensor, slots: Tensor) -> Tensor:
    """Bring slots[e, g, c, m] back to tokens[g, s, m]."""
    import torch

    return torch.einsum("gsec,egcm->gsm", mask, slots)


def mask_gradient(grads: Tensor, slots: Tensor) -> Tensor:
    """Return the gradient of the combining mask, from which the gates' follows."""
    import torch

    return torch.einsum("gsm,egcm->gsec", grads, slots)
