"""A layer of experts over the ranks of a group, forward and backward, for the routing presets."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, PassName, Work
from moesim.measurement.distributed.expert_layers import make_layer, make_weights, run_layer
from moesim.measurement.distributed.layer_shapes import Draw, ExpertLayerShape
from moesim.measurement.distributed.layer_work import LayerRows, layer_bytes, layer_flops, layer_rows, sent_bytes
from moesim.measurement.distributed.targets import DistributedTarget
from moesim.measurement.suites.gemms import MASTER_BYTES
from moesim.measurement.suites.moe_layers import INPUT_SETS_HELD, differentiable_work

if TYPE_CHECKING:
    from moesim.measurement.workbenches import Workbench

PRESETS = ("W0", "W1", "W2", "W3", "W5", "W4", "W6", "W7")
PRESETS_ALONE = ("W0", "W1", "W3")
"""With one rank, the presets about ranks are W0 with scatter."""

SHAPES = (
    ExpertLayerShape(4096, 4096, 14336, 8, 2),
    ExpertLayerShape(4096, 2048, 768, 128, 8),
    ExpertLayerShape(4096, 7168, 2048, 64, 8),
    ExpertLayerShape(8192, 1024, 4096, 16, 1, is_gated=False),
    ExpertLayerShape(8192, 1024, 4096, 16, 2, is_gated=False, router="k_top_1"),
    ExpertLayerShape(8192, 1024, 4096, 16, 2, capacity_factor=1.25),
    ExpertLayerShape(
        8192, 1024, 4096, 16, 2, is_gated=False, capacity_factor=1.25, dispatch="one_hot_einsum", group_tokens=1024
    ),
    ExpertLayerShape(16384, 2048, 1408, 64, 6),
)
CPU_SHAPES = (
    ExpertLayerShape(64, 64, 96, 8, 2),
    ExpertLayerShape(256, 128, 256, 8, 2),
    ExpertLayerShape(256, 128, 256, 16, 1, is_gated=False),
    ExpertLayerShape(128, 256, 512, 8, 2, is_gated=False, router="k_top_1"),
    ExpertLayerShape(256, 64, 256, 8, 2, capacity_factor=1.25, capacity_per="assignment"),
    ExpertLayerShape(256, 64, 256, 8, 2, capacity_factor=1.25, dispatch="one_hot_einsum", group_tokens=64),
    ExpertLayerShape(512, 256, 512, 8, 2),
)


def cases(target: DistributedTarget) -> list[Case]:
    """Return the cases of layers: equal loads of each shape, then the other presets."""
    shapes = CPU_SHAPES if target.device == "cpu" else SHAPES
    presets = target.presets(PRESETS, PRESETS_ALONE)
    kinds: tuple[PassName, ...] = ("forward", "backward")
    return [
        _case(target, shape, preset, dtype, kind)
        for preset in presets
        for shape in shapes
        if preset != "W4" or shape.group_tokens is None
        for dtype in target.dtypes
        for kind in kinds
        if shape.num_experts % target.ranks.expert_parallel == 0
    ]


def shapes(target: DistributedTarget) -> tuple[ExpertLayerShape, ...]:
    """Return the shapes before any is left out for the number of ranks."""
    return CPU_SHAPES if target.device == "cpu" else SHAPES


def _case(target: DistributedTarget, shape: ExpertLayerShape, preset: str, dtype: str, kind: PassName) -> Case:
    (routed,) = target.draws(preset, shape, 1)
    rows = layer_rows(shape, routed)
    return Case(
        suite="moe_layer",
        operation="expert_parallel_layer",
        pass_name=kind,
        dtype=dtype,
        shape={"preset": preset, "step": routed.step, **target.group_names(), **shape.names()},
        flops=layer_flops(shape, rows, kind),
        traffic_bytes=layer_bytes(shape, rows, dtype, kind),
        working_set_bytes=layer_memory_bytes(shape, rows, dtype),
        prepare=partial(prepare_layer, target=target, shape=shape, routed=routed, dtype=dtype, kind=kind),
        timing="eager" if target.is_learned else "device",  # the host waits for the router's counts
        loads=() if target.is_learned else rows.loads,
    )


def layer_memory_bytes(shape: ExpertLayerShape, rows: LayerRows, dtype: str) -> float:
    """Weights of a rank, their fp32 gradients and, generously, what a pass allocates."""
    size, num_ranks = ELEMENT_BYTES[dtype], len(rows.sent)
    local = shape.num_experts // num_ranks
    weights = local * shape.hidden * (shape.up_columns + shape.inner) * (2 * size + MASTER_BYTES)
    received, sent = int(rows.received.max()), int(rows.sent.sum(axis=1).max())
    activations = size * (received * (6 * shape.hidden + 3 * shape.up_columns) + 6 * sent * shape.hidden)
    activations += 4 * size * rows.tokens * shape.hidden
    if shape.dispatch == "one_hot_einsum":
        activations += 8 * size * rows.tokens * shape.num_experts * shape.slots
    scores = 4 * MASTER_BYTES * rows.tokens * (shape.num_experts + shape.hidden)
    return weights + INPUT_SETS_HELD * (activations + scores)


def prepare_layer(
    bench: Workbench,
    *,
    target: DistributedTarget,
    shape: ExpertLayerShape,
    routed: Draw,
    dtype: str,
    kind: PassName,
) -> Work:
    """Fill a layer on every rank; for the backward pass, run the forward one and keep its activations.

    Parameters
    ----------
    bench : Workbench
        The device.
    target : DistributedTarget
        The processes.
    shape : ExpertLayerShape
        Sizes.
    routed : Draw
        Rows of all ranks.
    dtype : str
        Of experts and activations.
    kind : str
        ``forward`` (keeping what a backward pass needs) or ``backward``.
    """
    ranks = target.ranks
    weights = make_weights(bench, shape, ranks, dtype)
    followed = None if target.is_learned else routed
    layer = make_layer(bench, shape, ranks, dtype=dtype, routed=followed, seed=target.seed, back_ends=target.back_ends)
    num_tokens = routed.tokens_of(ranks.expert_rank, shape.experts_per_token)
    tokens = bench.normal(num_tokens, shape.hidden, dtype=dtype).requires_grad_()
    work = differentiable_work(bench, kind, lambda: run_layer(tokens, weights, layer), tokens, layer.name)
    return replace(work, details={"exchange_bytes": sent_bytes(shape, layer_rows(shape, routed), dtype)})
