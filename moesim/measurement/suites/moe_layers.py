"""A whole layer of experts on one device, forward and backward: router, permute, experts, unpermute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, PassName, Target, Work
from moesim.measurement.routed_loads import PRESETS, RoutedLoads, expert_choices, layer_loads
from moesim.measurement.suites.dispatches import INDEX_BYTES, ROW_PASSES
from moesim.measurement.suites.gemms import MASTER_BYTES
from moesim.measurement.suites.grouped_gemms import GroupedProducts, Groups, grouped_products
from moesim.measurement.suites.memory_bound import gated_activation
from moesim.measurement.suites.routed_rows import differentiable, sort_rows
from moesim.measurement.suites.routers import choose, router_bytes, router_flops

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench

INPUT_SETS_HELD = 3.0
"""Activations are held by the kept forward pass, by the eager calls and by the captured graph."""


@dataclass(frozen=True, slots=True)
class MoeShape:
    """A layer of gated experts, all on one device."""

    tokens: int
    hidden: int
    inner: int
    num_experts: int
    experts_per_token: int

    def names(self) -> dict[str, int | str]:
        """Return what identifies the layer in a record."""
        return {
            "tokens": self.tokens,
            "hidden": self.hidden,
            "inner": self.inner,
            "experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
        }


SHAPES = (
    MoeShape(4096, 4096, 14336, 8, 2),
    MoeShape(4096, 2048, 768, 128, 8),
    MoeShape(4096, 7168, 2048, 32, 8),
    MoeShape(8192, 1024, 4096, 16, 1),
    MoeShape(16384, 2048, 1408, 64, 6),
)
CPU_SHAPES = (MoeShape(64, 64, 96, 8, 2),)


def cases(target: Target) -> list[Case]:
    """Return the cases of layers: equal loads of each, then the other presets."""
    shapes = CPU_SHAPES if target.device == "cpu" else SHAPES
    kinds: tuple[PassName, ...] = ("forward", "backward")
    return [
        _case(shape, preset, dtype, kind, target.seed)
        for preset in PRESETS
        for shape in shapes
        for dtype in target.dtypes
        for kind in kinds
    ]


def _case(shape: MoeShape, preset: str, dtype: str, kind: PassName, seed: int) -> Case:
    routed = layer_loads(preset, shape.tokens, shape.num_experts, shape.experts_per_token, seed=seed)
    return Case(
        suite="moe_layer",
        operation="moe_layer",
        pass_name=kind,
        dtype=dtype,
        shape={"preset": preset, "step": routed.step, **shape.names()},
        flops=layer_flops(shape, routed, kind),
        traffic_bytes=layer_bytes(shape, routed, dtype, kind),
        working_set_bytes=layer_memory_bytes(shape, routed, dtype),
        prepare=partial(prepare_layer, shape=shape, routed=routed, dtype=dtype, kind=kind, seed=seed),
        loads=routed.loads,
    )


def layer_flops(shape: MoeShape, routed: RoutedLoads, kind: PassName) -> float:
    """Arithmetic of router and experts; the backward pass has two products for each forward one."""
    forward = 6.0 * routed.rows * shape.hidden * shape.inner
    forward += router_flops(_num_tokens(shape, routed), shape.hidden, shape.num_experts)
    return forward if kind == "forward" else 2 * forward


def layer_bytes(shape: MoeShape, routed: RoutedLoads, dtype: str, kind: PassName) -> float:
    """Traffic of the kernels of a pass, each input read and each output written once."""
    size, tokens, rows = ELEMENT_BYTES[dtype], _num_tokens(shape, routed), routed.rows
    weights = 3 * routed.num_hit * shape.hidden * shape.inner
    products = rows * (2 * shape.hidden + 3 * shape.inner)  # up: hidden in, 2 inner out; down: inner in, hidden out
    copied = sum(
        ROW_PASSES[operation, kind][0] * rows + ROW_PASSES[operation, kind][1] * tokens
        for operation in ("permute", "unpermute")
    )
    route = router_bytes(tokens, shape.hidden, shape.num_experts, dtype) + 6 * INDEX_BYTES * rows
    if kind == "forward":
        return float(size * (weights + products + copied * shape.hidden + 3 * rows * shape.inner) + route)
    weight_bytes = weights * (size + 2 * MASTER_BYTES)
    return float(weight_bytes + size * (2 * products + copied * shape.hidden + 5 * rows * shape.inner) + 2 * route)


def layer_memory_bytes(shape: MoeShape, routed: RoutedLoads, dtype: str) -> float:
    """Weights, their fp32 gradients and, generously, what a pass allocates."""
    size, tokens = ELEMENT_BYTES[dtype], _num_tokens(shape, routed)
    weights = 3 * shape.num_experts * shape.hidden * shape.inner * (2 * size + MASTER_BYTES)
    activations = size * routed.rows * (6 * shape.hidden + 6 * shape.inner) + 4 * size * tokens * shape.hidden
    scores = 4 * MASTER_BYTES * tokens * (shape.num_experts + shape.hidden)
    return weights + INPUT_SETS_HELD * (activations + scores)


def _num_tokens(shape: MoeShape, routed: RoutedLoads) -> int:
    """Tokens of the draw; only preset W4 differs from the shape."""
    return routed.rows // shape.experts_per_token


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """Weights of a layer and the fp32 sums of their gradients: router[E, h], up[E, 2 inner, h], down[E, h, inner]."""

    router: Tensor
    up: Tensor
    down: Tensor
    router_sum: Tensor
    up_sum: Tensor
    down_sum: Tensor


@dataclass(frozen=True, slots=True)
class MoeRouting:
    """Where tokens go, fixed by the draw, and how experts multiply."""

    experts: Tensor
    groups: Groups
    products: GroupedProducts


def make_layer(
    bench: Workbench, shape: MoeShape, routed: RoutedLoads, dtype: str, seed: int
) -> tuple[MoeWeights, MoeRouting]:
    """Fill the weights and draw the routing of a layer.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : MoeShape
        Sizes.
    routed : RoutedLoads
        Loads of the experts.
    dtype : str
        Of weights and activations; the router is fp32.
    seed : int
        Of the order of the tokens.
    """
    weights = MoeWeights(
        router=bench.weight(shape.num_experts, shape.hidden, dtype="fp32"),
        up=bench.weight(shape.num_experts, 2 * shape.inner, shape.hidden, dtype=dtype),
        down=bench.weight(shape.num_experts, shape.hidden, shape.inner, dtype=dtype),
        router_sum=bench.normal(shape.num_experts, shape.hidden, dtype="fp32"),
        up_sum=bench.normal(shape.num_experts, 2 * shape.inner, shape.hidden, dtype="fp32"),
        down_sum=bench.normal(shape.num_experts, shape.hidden, shape.inner, dtype="fp32"),
    )
    experts = bench.integers(expert_choices(routed.loads, shape.experts_per_token, seed=seed))
    return weights, MoeRouting(experts, Groups.of(bench, routed.loads), grouped_products(bench.device, dtype))


def run_layer(tokens: Tensor, weights: MoeWeights, routing: MoeRouting) -> Tensor:
    """Run the forward pass.

    Parameters
    ----------
    tokens : tensor of shape (n_tokens, hidden)
        Inputs.
    weights : MoeWeights
        Of the layer.
    routing : MoeRouting
        Who goes where.

    Returns
    -------
    tensor of shape (n_tokens, hidden)
        Outputs, without a residual.

    Notes
    -----
    The router scores and chooses as it always does, and is paid for; the choice that is followed is the draw's, so that
    loads are the preset's. Gates are the router's probabilities of the experts of the draw.
    """
    steps = differentiable()
    probabilities = steps.linear(tokens.float(), weights.router, weights.router_sum).softmax(dim=-1)
    choose(probabilities.unsqueeze(1), routing.experts.shape[1])
    gates = probabilities.gather(1, routing.experts).to(tokens.dtype)
    order = sort_rows(routing.experts)
    rows = steps.permute(tokens, order)
    gate, up = steps.experts(rows, weights.up, weights.up_sum, routing.groups, routing.products).chunk(2, dim=-1)
    out = steps.experts(gated_activation(gate, up), weights.down, weights.down_sum, routing.groups, routing.products)
    return steps.unpermute(out, gates, order)


def prepare_layer(
    bench: Workbench, *, shape: MoeShape, routed: RoutedLoads, dtype: str, kind: PassName, seed: int
) -> Work:
    """Fill a layer; for the backward pass, run the forward one and keep its activations.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : MoeShape
        Sizes.
    routed : RoutedLoads
        Loads of the experts.
    dtype : str
        Of weights and activations.
    kind : str
        ``forward`` (keeping what a backward pass needs) or ``backward``.
    seed : int
        Of the order of the tokens.
    """
    weights, routing = make_layer(bench, shape, routed, dtype, seed)
    tokens = bench.normal(_num_tokens(shape, routed), shape.hidden, dtype=dtype).requires_grad_()
    products = routing.products
    name = (
        products.name if kind == "forward" else f"{products.name}, {products.weight_gradient_name(bench.device, dtype)}"
    )
    return differentiable_work(bench, kind, lambda: run_layer(tokens, weights, routing), tokens, name)


def differentiable_work(bench: Workbench, kind: PassName, run: Callable[[], Tensor], tokens: Tensor, name: str) -> Work:
    """Return a call of a forward pass, or of the backward pass down to its tokens.

    Parameters
    ----------
    bench : Workbench
        The device.
    kind : str
        ``forward`` or ``backward``.
    run : callable
        The forward pass.
    tokens : tensor
        Its inputs.
    name : str
        How it is done.
    """
    import torch

    if kind == "forward":
        return Work(run, name)
    out = run()
    grad = torch.empty_like(out).copy_(bench.normal(*out.shape, dtype="fp32"))
    return Work(lambda: torch.autograd.grad(out, tokens, grad, retain_graph=True), name)
