"""Steps of training a few blocks: forward, backward, reduction of gradients, Adam; and the memory they hold."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import Case, Timing, UnmeasurableError, Work
from moesim.measurement.distributed.layer_shapes import Draw, ExpertLayerShape
from moesim.measurement.distributed.layer_work import LayerRows, layer_rows, sent_bytes, step_bytes, step_flops
from moesim.measurement.distributed.memory_formulas import held_bytes
from moesim.measurement.distributed.targets import DistributedTarget
from moesim.measurement.distributed.training_models import (
    ModelShape,
    TrainingModel,
    add_gradients,
    embed,
    loss_of,
    make_model,
    train_step,
)
from moesim.measurement.suites.attentions import AttentionShape
from moesim.measurement.suites.memory_bound import rms_norm

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench

PRESETS = ("W0", "W1", "W2", "W3")
PRESETS_ALONE = ("W0", "W1", "W3")
MEMORY_MARGIN = 1.15
GRAPH_POOLS = 2
"""A captured step has a pool of its own for what a step allocates."""
SETTLING_STEPS = 2

_QWEN = ExpertLayerShape(4096, 2048, 768, 128, 8)
_MIXTRAL = ExpertLayerShape(4096, 4096, 14336, 8, 2)
_M6 = ExpertLayerShape(8192, 1024, 4096, 16, 1, is_gated=False)
SHAPES = (
    ModelShape(AttentionShape(1, 4096, 32, 4, 128), _QWEN, 4, 32000),
    ModelShape(AttentionShape(1, 4096, 32, 8, 128), _MIXTRAL, 2, 32000),
    ModelShape(AttentionShape(8, 1024, 16, 16, 64), _M6, 4, 32000),
    ModelShape(AttentionShape(4, 2048, 16, 16, 128), ExpertLayerShape(8192, 2048, 1408, 64, 6), 4, 32000),
    ModelShape(AttentionShape(1, 4096, 32, 4, 128), _QWEN, 2, 32000),
    ModelShape(
        AttentionShape(8, 1024, 16, 16, 64),
        replace(_M6, experts_per_token=2, capacity_factor=1.25, dispatch="one_hot_einsum", group_tokens=1024),
        4,
        32000,
    ),
    ModelShape(AttentionShape(8, 1024, 16, 16, 64), replace(_M6, experts_per_token=2, router="k_top_1"), 4, 32000),
    ModelShape(AttentionShape(1, 4096, 32, 8, 128), _MIXTRAL, 1, 32000),
    ModelShape(AttentionShape(1, 1024, 32, 4, 128), replace(_QWEN, tokens=1024), 4, 32000),
    ModelShape(AttentionShape(8, 1024, 16, 16, 64), replace(_M6, capacity_factor=1.0), 4, 32000, 4),
)
CPU_SHAPES = (
    ModelShape(AttentionShape(2, 32, 4, 2, 16), ExpertLayerShape(64, 64, 96, 8, 2), 2, 256),
    ModelShape(AttentionShape(4, 64, 4, 2, 32), ExpertLayerShape(256, 128, 256, 8, 2), 2, 512),
    ModelShape(AttentionShape(4, 64, 4, 4, 32), ExpertLayerShape(256, 128, 256, 8, 1, is_gated=False), 4, 512, 2),
    ModelShape(
        AttentionShape(4, 64, 4, 4, 16),
        ExpertLayerShape(256, 64, 256, 8, 2, capacity_factor=1.25, dispatch="one_hot_einsum", group_tokens=64),
        2,
        512,
    ),
)


def shapes(target: DistributedTarget) -> tuple[ModelShape, ...]:
    """Return the shapes before any is left out for the number of ranks."""
    return CPU_SHAPES if target.device == "cpu" else SHAPES


def cases(target: DistributedTarget) -> list[Case]:
    """Return the cases of steps: as a program runs them and, for a rank of a GPU alone, captured in a graph."""
    launches: tuple[tuple[str, Timing], ...] = (("eager", "eager"),)
    if target.device == "cuda" and target.ranks.size == 1 and not target.is_learned:
        launches = (*launches, ("graph", "device"))
    return [
        _case(target, shape, preset, dtype, launch, timing)
        for preset, shape in _wanted(target)
        for dtype in target.dtypes
        for launch, timing in launches
    ]


def memory_cases(target: DistributedTarget) -> list[Case]:
    """Return the cases of memory: the bytes a step holds, of the same models."""
    return [
        replace(
            _case(target, shape, preset, dtype, "eager", "eager"),
            suite="memory",
            operation="train_step_memory",
            prepare=partial(prepare_memory, target=target, shape=shape, preset=preset, dtype=dtype),
        )
        for preset, shape in _wanted(target)
        for dtype in target.dtypes
        if preset == "W0" or shape.layer.capacity_factor is None
    ]


def _wanted(target: DistributedTarget) -> list[tuple[str, ModelShape]]:
    presets = target.presets(PRESETS, PRESETS_ALONE)
    divided = [shape for shape in shapes(target) if shape.layer.num_experts % target.ranks.expert_parallel == 0]
    return [(preset, shape) for preset in presets for shape in divided]


def _rows(target: DistributedTarget, shape: ModelShape, preset: str) -> tuple[tuple[Draw, ...], list[LayerRows]]:
    routed = target.draws(preset, shape.layer, shape.num_blocks)
    return routed, [layer_rows(shape.layer, one) for one in routed]


def _case(target: DistributedTarget, shape: ModelShape, preset: str, dtype: str, launch: str, timing: Timing) -> Case:
    routed, rows = _rows(target, shape, preset)
    num_ranks = target.ranks.expert_parallel
    held = held_bytes(shape, rows, dtype, num_ranks)
    pools = GRAPH_POOLS if launch == "graph" else 1
    launched = {"launch": launch} if target.device == "cuda" else {}
    return Case(
        suite="train_step",
        operation="train_step",
        pass_name="step",
        dtype=dtype,
        shape={"preset": preset, "step": routed[0].step, **launched, **target.group_names(), **shape.names()},
        flops=step_flops(shape, rows),
        traffic_bytes=step_bytes(shape, rows, dtype, num_ranks),
        working_set_bytes=MEMORY_MARGIN * (held.state + pools * (held.peak - held.state)),
        prepare=partial(prepare_step, target=target, shape=shape, preset=preset, dtype=dtype),
        timing=timing,
        loads=() if target.is_learned else rows[0].loads,
        rotates=False,
    )


def prepare_step(bench: Workbench, *, target: DistributedTarget, shape: ModelShape, preset: str, dtype: str) -> Work:
    """Fill a model on every rank; the call is one step.

    Parameters
    ----------
    bench : Workbench
        The device.
    target : DistributedTarget
        The processes.
    shape : ModelShape
        Sizes.
    preset : str
        Of the draws.
    dtype : str
        Of weights and activations.
    """
    model = _model(bench, target, shape, preset, dtype)
    _, rows = _rows(target, shape, preset)
    exchanged = [sent_bytes(shape.layer, one, dtype) for one in rows]
    return Work(lambda: train_step(model), model.name, details={"exchange_bytes": sum(exchanged) / len(exchanged)})


def _model(bench: Workbench, target: DistributedTarget, shape: ModelShape, preset: str, dtype: str) -> TrainingModel:
    routed, _ = _rows(target, shape, preset)
    followed = [None if target.is_learned else one for one in routed]
    return make_model(
        bench, shape, target.ranks, dtype=dtype, routed=followed, seed=target.seed, back_ends=target.back_ends
    )


def prepare_memory(bench: Workbench, *, target: DistributedTarget, shape: ModelShape, preset: str, dtype: str) -> Work:
    """Fill a model, take steps, and read what the allocator held; the call is one step.

    Parameters
    ----------
    bench : Workbench
        The device.
    target : DistributedTarget
        The processes.
    shape : ModelShape
        Sizes.
    preset : str
        Of the draws.
    dtype : str
        Of weights and activations.

    Raises
    ------
    UnmeasurableError
        On a processor.

    Notes
    -----
    ``state_bytes`` once the model is filled, ``kept_bytes`` between forward and backward, ``peak_bytes`` over a whole
    step, all without what was allocated before; beside them the formulas' bytes.
    """
    if not bench.is_cuda:
        raise UnmeasurableError("memory cannot be measured on a processor: torch counts allocations of CUDA only")
    import gc

    import torch

    bench.normal(1, dtype="fp32")  # the pool of random values is no part of the model
    gc.collect()
    bench.wait()
    before = torch.cuda.memory_allocated()
    model = _model(bench, target, shape, preset, dtype)
    bench.wait()
    state = torch.cuda.memory_allocated() - before
    for _ in range(SETTLING_STEPS):
        train_step(model)
    bench.wait()
    resting = torch.cuda.memory_allocated()
    kept = _kept_bytes(model)
    bench.wait()
    torch.cuda.reset_peak_memory_stats()
    train_step(model)
    bench.wait()
    peak = torch.cuda.max_memory_allocated() - before
    _, rows = _rows(target, shape, preset)
    formula = held_bytes(shape, rows, dtype, target.ranks.expert_parallel, fuses_norm=norm_is_fused(bench))
    details = {
        "state_bytes": state,
        "workspace_bytes": resting - before - state,
        "kept_bytes": kept,
        "peak_bytes": peak,
        "formula_state_bytes": formula.state,
        "formula_kept_bytes": formula.kept,
        "formula_peak_bytes": formula.peak,
    }
    return Work(lambda: train_step(model), model.name, details=details)


def norm_is_fused(bench: Workbench) -> bool:
    """Whether torch's norm keeps its input and one number of each row, and nothing in fp32 beside it.

    Parameters
    ----------
    bench : Workbench
        The device.
    """
    import torch

    rows, weight = bench.normal(8, 64, dtype="bf16").requires_grad_(), bench.normal(64, dtype="bf16")
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rms_norm(rows, weight)
    return all(tensor.dtype != torch.float32 or tensor.numel() < rows.numel() for tensor in kept)


def _kept_bytes(model: TrainingModel) -> int:
    """Run one micro-batch, and return the bytes between its forward and its backward pass."""
    import torch

    words, targets = model.batches[0]
    model.parameters.clear_gradients()
    before = torch.cuda.memory_allocated()
    embedded = embed(model, words)
    loss = loss_of(model, embedded, targets)
    kept = int(torch.cuda.memory_allocated() - before)
    add_gradients(model, loss, embedded, words)
    return kept
