"""Routers: scores in fp32, softmax and the best experts, or the best of each of k prototypes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, PassName, Shape, Target, Work

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench


@dataclass(frozen=True, slots=True)
class RouterShape:
    """Tokens and experts; ``kind`` is ``top_k`` or ``k_top_1``."""

    tokens: int
    hidden: int
    num_experts: int
    experts_per_token: int
    kind: str


SHAPES = (
    RouterShape(4096, 4096, 8, 2, "top_k"),
    RouterShape(4096, 7168, 256, 8, "top_k"),
    RouterShape(4096, 2048, 128, 8, "top_k"),
    RouterShape(4096, 1024, 128, 2, "k_top_1"),
    RouterShape(1024, 1024, 960, 1, "top_k"),
    RouterShape(16384, 7168, 256, 8, "top_k"),
    RouterShape(1024, 1024, 512, 4, "k_top_1"),
    RouterShape(1024, 1024, 2048, 2, "top_k"),
    RouterShape(256, 4096, 64, 8, "top_k"),
)
CPU_SHAPES = (RouterShape(128, 64, 16, 2, "top_k"), RouterShape(128, 64, 16, 4, "k_top_1"))


def cases(target: Target) -> list[Case]:
    """Return the cases of routers."""
    shapes = CPU_SHAPES if target.device == "cpu" else SHAPES
    kinds: tuple[PassName, ...] = ("forward", "backward")
    return [_case(shape, dtype, kind) for shape in shapes for dtype in target.dtypes for kind in kinds]


def _case(shape: RouterShape, dtype: str, kind: PassName) -> Case:
    flops = router_flops(shape.tokens, shape.hidden, shape.num_experts)
    moved = router_bytes(shape.tokens, shape.hidden, shape.num_experts, dtype)
    named: Shape = {
        "kind": shape.kind,
        "tokens": shape.tokens,
        "hidden": shape.hidden,
        "experts": shape.num_experts,
        "experts_per_token": shape.experts_per_token,
    }
    times = 1 if kind == "forward" else 2
    prepare = partial(prepare_router, shape=shape, dtype=dtype, kind=kind)
    return Case("router", "router", kind, dtype, named, times * flops, times * moved, times * moved, prepare)


def router_flops(tokens: int, hidden: int, num_experts: int) -> float:
    """Arithmetic of the scores."""
    return 2.0 * tokens * hidden * num_experts


def router_bytes(tokens: int, hidden: int, num_experts: int, dtype: str) -> float:
    """Inputs, their copy in fp32 written and read, weights, scores; softmax reads and writes the scores again."""
    full = ELEMENT_BYTES["fp32"]
    copies = tokens * hidden * (ELEMENT_BYTES[dtype] + (2 * full if dtype != "fp32" else 0))
    return float(copies + full * num_experts * (hidden + 4 * tokens))


def prepare_router(bench: Workbench, *, shape: RouterShape, dtype: str, kind: PassName) -> Work:
    """Fill tokens and weights of a router.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : RouterShape
        Sizes.
    dtype : str
        Of the tokens; weights and scores are fp32.
    kind : str
        ``forward``, or ``backward`` from the gates to tokens and weights.
    """
    import torch

    tokens = bench.normal(shape.tokens, shape.hidden, dtype=dtype)
    weight = bench.weight(shape.num_experts, shape.hidden, dtype="fp32")

    def route() -> tuple[Tensor, Tensor]:
        probabilities = score(tokens, weight, shape.experts_per_token if shape.kind == "k_top_1" else 1)
        return choose(probabilities, shape.experts_per_token)

    name = f"mm in fp32, softmax, {'topk' if shape.kind == 'top_k' else 'max'}"
    if kind == "forward":
        return Work(route, name)
    leaves = [tokens.requires_grad_(), weight.requires_grad_()]
    gates, _ = route()
    grad = bench.normal(*gates.shape, dtype="fp32")
    return Work(lambda: torch.autograd.grad(gates, leaves, grad, retain_graph=True), f"gradient of {name}")


def score(tokens: Tensor, weight: Tensor, num_prototypes: int) -> Tensor:
    """Return probabilities of the experts, normalised within each prototype.

    Parameters
    ----------
    tokens : tensor of shape (n_tokens, hidden)
        Any precision.
    weight : tensor of shape (n_experts, hidden)
        In fp32.
    num_prototypes : int
        1 for plain top-k.

    Returns
    -------
    tensor of shape (n_tokens, num_prototypes, n_experts / num_prototypes)
        In fp32.
    """
    logits = tokens.float() @ weight.t()
    return logits.unflatten(1, (num_prototypes, -1)).softmax(dim=-1)


def choose(probabilities: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """Choose the best experts: k of all, or one of each of k prototypes.

    Parameters
    ----------
    probabilities : tensor of shape (n_tokens, n_prototypes, n_experts / n_prototypes)
        As `score` returns them.
    experts_per_token : int
        Choices per token; the number of prototypes if that is not 1.

    Returns
    -------
    gates, experts : tensors of shape (n_tokens, experts_per_token)
        Probability and index of each choice.
    """
    import torch

    num_prototypes, size = probabilities.shape[1:]
    if num_prototypes == 1:
        gates, experts = probabilities[:, 0].topk(experts_per_token, dim=-1)
        return gates, experts
    gates, experts = probabilities.max(dim=-1)
    return gates, experts + size * torch.arange(num_prototypes, device=experts.device)
