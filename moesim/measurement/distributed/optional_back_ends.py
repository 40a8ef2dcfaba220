"""Libraries that replace parts of a layer where they are installed: grouped-gemm for experts, DeepEP for exchanges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from moesim.errors import Problem, ScenarioError
from moesim.measurement.distributed.kept_rows import counted, kept_row_functions, sort_kept
from moesim.measurement.suites.grouped_gemms import GroupedProducts, Groups

if TYPE_CHECKING:
    from torch import Tensor
    from torch.autograd.function import FunctionCtx

ExpertsBy = Literal["torch", "grouped_gemm"]
ExchangeBy = Literal["all_to_all", "deepep"]


@dataclass(frozen=True, slots=True)
class BackEnds:
    """Who multiplies for the experts, and who exchanges rows."""

    experts: ExpertsBy = "torch"
    exchange: ExchangeBy = "all_to_all"

    def names(self) -> dict[str, int | str]:
        """Return what identifies them in a record; nothing where all is torch's own."""
        named: dict[str, int | str] = {}
        if self.experts != "torch":
            named["experts_by"] = self.experts
        if self.exchange != "all_to_all":
            named["exchange_by"] = self.exchange
        return named


TORCH = BackEnds()


def check_back_ends(back_ends: BackEnds) -> None:
    """Make sure that the libraries can be imported.

    Parameters
    ----------
    back_ends : BackEnds
        What was asked for.

    Raises
    ------
    ScenarioError
        With all that cannot.
    """
    wanted = []
    if back_ends.experts == "grouped_gemm":
        wanted.append(("grouped_gemm", "--experts", "torch"))
    if back_ends.exchange == "deepep":
        wanted.append(("deep_ep", "--exchange", "all_to_all"))
    problems = []
    for module, field, other in wanted:
        try:
            import_module(module)
        except ImportError as error:
            what = f"{module} cannot be imported ({error})"
            problems.append(Problem("E-SCN-010", what, f"install it, or use {field} {other}", field=field))
    if problems:
        raise ScenarioError(problems)


@cache
def grouped_gemm_products() -> GroupedProducts:
    """Return the products of the package grouped-gemm, which reads loads on the host."""
    import torch

    gmm: Callable[..., Tensor] = import_module("grouped_gemm.backend").gmm

    def sizes(groups: Groups) -> Tensor:
        return torch.tensor(groups.loads, dtype=torch.int64)

    def forward(inputs: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        return gmm(inputs, weight, sizes(groups), trans_b=True)

    def input_gradient(grads: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        return gmm(grads.contiguous(), weight, sizes(groups))

    def add_weight_gradient(total: Tensor, grads: Tensor, inputs: Tensor, groups: Groups) -> object:
        return total.add_(gmm(grads.contiguous(), inputs, sizes(groups), trans_a=True))

    return GroupedProducts("grouped_gemm", forward, input_gradient, add_weight_gradient)


def open_deep_buffer(group: object, hidden: int, element_bytes: int) -> Any:
    """Return a buffer of DeepEP's normal kernels, as large as they advise.

    Parameters
    ----------
    group : process group
        Those who exchange.
    hidden, element_bytes : int
        Width of a token and bytes of each of its numbers.
    """
    buffer = import_module("deep_ep").Buffer
    num_ranks = group.size()  # type: ignore[attr-defined]
    configurations = (buffer.get_dispatch_config(num_ranks), buffer.get_combine_config(num_ranks))
    row_bytes = hidden * max(element_bytes, 2)
    inside = max(one.get_nvl_buffer_size_hint(row_bytes, num_ranks) for one in configurations)
    between = max(one.get_rdma_buffer_size_hint(row_bytes, num_ranks) for one in configurations)
    return buffer(group, inside, between)


def through_deep_buffer(
    tokens: Tensor,
    gates: Tensor,
    experts: Tensor,
    buffer: Any,
    sizes: tuple[int, int],
    feed_forward: Callable[[Tensor, Groups], Tensor],
) -> Tensor:
    """Send each token once to every rank that has one of its experts, and add up what comes back.

    Parameters
    ----------
    tokens : tensor of shape (n_tokens, hidden)
        Of this rank.
    gates, experts : tensors of shape (n_tokens, experts_per_token)
        Weight and expert of each choice.
    buffer : deep_ep.Buffer
        Of `open_deep_buffer`.
    sizes : tuple of int
        Experts of all ranks and of this one.
    feed_forward : callable
        From rows sorted by expert, and the rows of each, to their results.

    Notes
    -----
    Received choices are numbered within the rank, -1 where the expert stands elsewhere; such a choice has no row here.
    Gates are applied on the side of the experts.
    """
    import torch

    num_experts, num_local = sizes
    arrived, weights, choices, loads, handle = deep_functions().dispatch(
        tokens, gates.float(), experts, buffer, num_experts
    )
    keys = torch.where(choices < 0, num_local, choices)
    groups = Groups(tuple(loads), counted(keys.flatten(), num_local + 1)[:num_local].cumsum(0).to(torch.int32))
    order, kept = sort_kept(keys, sum(loads)), kept_row_functions()
    out = feed_forward(kept.permute(arrived, order), groups)
    return deep_functions().combine(kept.unpermute(out, weights.to(out.dtype), order), buffer, handle)


@dataclass(frozen=True, slots=True)
class DeepFunctions:
    """``dispatch(tokens, gates, experts, buffer, num_experts)`` and ``combine(rows, buffer, handle)``."""

    dispatch: Callable[..., tuple[Tensor, Tensor, Tensor, list[int], object]]
    combine: Callable[..., Tensor]


@cache
def deep_functions() -> DeepFunctions:
    """Return the exchanges with their backward passes: that of a dispatch is a combine, and the other way round."""
    import torch

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: FunctionCtx, tokens: Tensor, gates: Tensor, experts: Tensor, buffer: Any, num_experts: int
        ) -> tuple[Tensor, Tensor, Tensor, list[int], object]:
            per_rank, per_rdma_rank, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(experts, num_experts)
            arrived, choices, weights, loads, handle, _ = buffer.dispatch(
                tokens,
                topk_idx=experts,
                topk_weights=gates,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=is_in_rank,
                num_tokens_per_expert=per_expert,
            )
            ctx.buffer, ctx.handle = buffer, handle
            ctx.mark_non_differentiable(choices)
            return arrived, weights, choices, loads, handle

        @staticmethod
        def backward(ctx: FunctionCtx, grads: Tensor, of_weights: Tensor, *_: object) -> tuple[Tensor | None, ...]:
            of_tokens, of_gates, _ = ctx.buffer.combine(
                grads.contiguous(), ctx.handle, topk_weights=of_weights.float().contiguous()
            )
            return of_tokens, of_gates, None, None, None

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, rows: Tensor, buffer: Any, handle: object) -> Tensor:
            ctx.buffer, ctx.handle = buffer, handle
            combined: Tensor = buffer.combine(rows, handle)[0]
            return combined

        @staticmethod
        def backward(ctx: FunctionCtx, grads: Tensor) -> tuple[Tensor | None, ...]:
            return ctx.buffer.dispatch(grads.contiguous(), handle=ctx.handle)[0], None, None

    return DeepFunctions(Dispatch.apply, Combine.apply)
