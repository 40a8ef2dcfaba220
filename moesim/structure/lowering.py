"""From a model to operation tables: the context that all lowering shares, and the layers and ends of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.describe.hardware import KernelPasses, Stack
from moesim.describe.model import Model
from moesim.describe.quantities import PRECISION_BYTES
from moesim.describe.scenario import DEFAULT_RECOMPUTE_MODULES, RecomputeModule, Scenario
from moesim.structure.columns import Columns, FloatArray
from moesim.structure.placement import ProcessGroup, group_columns, process_group
from moesim.structure.step_graph import (
    Collective,
    CollectiveKind,
    Extent,
    Gemm,
    MemoryTraffic,
    Operation,
    Phase,
    RoutedCopies,
    Stream,
    linear_extents,
)

TOKEN_COLUMNS: tuple[str, ...] = (
    "micro_batch",
    "source_length",
    "target_length",
    "tensor",
    "sequence",
    "context",
)


@dataclass(frozen=True)
class LoweringContext:
    """What every lowering function needs: the fixed part of the scenarios, the stack and the cases' columns."""

    scenario: Scenario
    stack: Stack
    columns: Columns

    @property
    def model(self) -> Model:
        """The model, shared by all cases."""
        return self.scenario.model

    @property
    def is_training(self) -> bool:
        """Whether gradients are computed."""
        return self.scenario.workload.kind == "training"

    @property
    def activation_bytes(self) -> float:
        """Bytes of one stored activation."""
        return PRECISION_BYTES[self.scenario.precision.activations]

    @property
    def saved_bytes(self) -> float:
        """Bytes of one activation kept for the backward pass."""
        precision = self.scenario.precision
        return PRECISION_BYTES[precision.saved or precision.activations]

    @property
    def linear_saved_bytes(self) -> float:
        """Bytes of one input of a linear layer kept for its weight gradient: quantised ones are kept quantised."""
        compute = PRECISION_BYTES[self.scenario.precision.compute]
        return min(compute, self.saved_bytes) if compute < 2 else self.saved_bytes

    def recomputes(self, module: RecomputeModule) -> bool:
        """Whether selective recompute covers a module; whether a case recomputes selectively is a column."""
        return module in (self.scenario.parallelism.recompute_modules or DEFAULT_RECOMPUTE_MODULES)

    def gemm_input_bytes(self, precision: str) -> float:
        """Bytes of one GEMM operand as read: quantised formats are read quantised, others as stored."""
        compute = PRECISION_BYTES[precision]
        return compute if compute < 2 else self.activation_bytes

    @property
    def dispatch_bytes(self) -> float:
        """Bytes of one activation sent to an expert."""
        return PRECISION_BYTES[self.scenario.precision.dispatch]

    @property
    def combine_bytes(self) -> float:
        """Bytes of one activation sent back: as dispatched, but never below 16 bits (sums need them)."""
        return max(self.dispatch_bytes, 2.0)

    def tokens(self, side: str) -> FloatArray:
        """Tokens of one micro-batch on one device, before tensor sharding; decoding, one per sequence, no source."""
        columns = self.columns
        if self.scenario.workload.kind == "decode":
            runs = 0.0 if side == "encoder" else 1.0
            return columns["micro_batch"] * runs / columns["context"]
        length = columns["source_length"] if side == "encoder" else columns["target_length"]
        return columns["micro_batch"] * length / columns["context"]

    def sequence_shard(self) -> FloatArray:
        """Ranks over which element-wise work between tensor-parallel blocks is split."""
        columns = self.columns
        return columns["tensor"] ** columns["sequence"]

    def group(self, dimension: str) -> ProcessGroup:
        """Process group of a mesh dimension."""
        return process_group(self.columns, self.scenario.parallelism.rank_order, dimension)


def token_columns(scenario: Scenario) -> tuple[str, ...]:
    """Columns that decide the non-expert part of a layer, strides of its groups included."""
    order = scenario.parallelism.rank_order
    names = TOKEN_COLUMNS + group_columns(order, "tensor") + group_columns(order, "context")
    return tuple(dict.fromkeys(names))


def gemm(
    context: LoweringContext,
    phase: Phase,
    shape: tuple[Extent, Extent, Extent],
    *,
    groups: FloatArray | float = 1.0,
    precision: str | None = None,
    is_ragged: bool = False,
    row_dispersion: FloatArray | float = 0.0,
) -> Gemm:
    """Work of one GEMM (rows, columns, inner) in a phase; weight gradients accumulate in the gradients' format."""
    ones: FloatArray = np.ones(np.broadcast_shapes(*(np.shape(extent) for extent in shape)))
    is_weight_gradient = phase == "weight_gradient"
    output = PRECISION_BYTES[context.scenario.precision.gradients] if is_weight_gradient else context.activation_bytes
    computed = precision or context.scenario.precision.compute
    return Gemm(
        ones * shape[0],
        ones * shape[1],
        ones * shape[2],
        ones * groups,
        computed,
        context.gemm_input_bytes(computed),
        output,
        accumulates=is_weight_gradient,
        is_ragged=is_ragged,
        row_dispersion=0.0 if is_weight_gradient else row_dispersion,
        sums_tokens=is_weight_gradient,
        scaling=context.scenario.precision.scaling if PRECISION_BYTES[computed] < 2 else "tensor",
    )


def linear(
    context: LoweringContext,
    name: str,
    category: str,
    shape: tuple[FloatArray, FloatArray | float, FloatArray | float],
    *,
    groups: FloatArray | float = 1.0,
    precision: str | None = None,
    load_factor: FloatArray | None = None,
    is_ragged: bool = False,
    row_dispersion: FloatArray | float = 0.0,
) -> list[Operation]:
    """A linear layer, Y[rows, columns] = X[rows, inner] W: forward, activation gradient and weight gradient.

    The gradients are products of the same three extents, see :func:`~moesim.structure.step_graph.linear_extents`.
    """
    rows, columns, inner = shape
    quantised = _quantisation(context, name, rows * groups, (inner, columns), precision, load_factor)
    shapes = linear_extents(*shape)
    if not context.is_training:
        shapes = {"forward": shapes["forward"]}
    return quantised + [
        Operation(
            name,
            category,
            phase,
            "compute",
            gemm(
                context,
                phase,
                phase_shape,
                groups=groups,
                precision=precision,
                is_ragged=is_ragged,
                row_dispersion=row_dispersion,
            ),
            load_factor=load_factor,
        )
        for phase, phase_shape in shapes.items()
    ]


def _quantisation(
    context: LoweringContext,
    name: str,
    rows: FloatArray,
    widths: tuple[FloatArray | float, FloatArray | float],
    precision: str | None,
    load_factor: FloatArray | None,
) -> list[Operation]:
    """Casts of a linear layer's input (backward: of its output's gradient) to an 8-bit or narrower format.

    One read as stored and one write; in training a second, transposed copy for the weight gradient. Weights are cast
    once per step, which is left out.
    """
    compute = PRECISION_BYTES[precision or context.scenario.precision.compute]
    if compute >= 2:
        return []
    written = compute * (2.0 if context.is_training else 1.0)
    moved = context.activation_bytes + written
    phases: list[tuple[Phase, FloatArray | float]] = [("forward", widths[0])]
    if context.is_training:
        phases.append(("activation_gradient", widths[1]))
    return [
        Operation(
            f"{name}.quantise",
            "memory_bound",
            phase,
            "compute",
            MemoryTraffic(rows * width * moved),
            load_factor=load_factor,
        )
        for phase, width in phases
    ]


def traffic(
    context: LoweringContext,
    name: str,
    category: str,
    elements: FloatArray,
    *,
    passes: tuple[float, float],
    kernels: tuple[int, int] = (1, 1),
    element_bytes: float | None = None,
    load_factor: FloatArray | None = None,
) -> list[Operation]:
    """Element-wise work: ``passes`` over ``elements`` forward and backward, each a read or a write."""
    width = context.activation_bytes if element_bytes is None else element_bytes
    phases: list[Phase] = ["forward", "activation_gradient"] if context.is_training else ["forward"]
    return [
        Operation(
            name,
            category,
            phase,
            "compute",
            MemoryTraffic(elements * (passes[index] * width)),
            kernels=kernels[index],
            load_factor=load_factor,
        )
        for index, phase in enumerate(phases)
    ]


def widening(operation: Operation, compute_s: FloatArray) -> Operation:
    """Return a cast to fp32 with what compute units take for it; its gradient narrows, which is for free."""
    if operation.phase != "forward" or not isinstance(operation.work, MemoryTraffic):
        return operation
    return replace(operation, work=replace(operation.work, compute_s=compute_s))


def collective(
    context: LoweringContext,
    name: str,
    stream: Stream,
    group: ProcessGroup,
    *,
    forward: Sequence[tuple[CollectiveKind, FloatArray]],
    backward: Sequence[tuple[CollectiveKind, FloatArray]],
    load_factor: FloatArray | None = None,
    copies: RoutedCopies | None = None,
) -> list[Operation]:
    """Collectives of a layer, forward and backward; the category is the stream's name, experts' with the others."""
    phases: list[tuple[Phase, Sequence[tuple[CollectiveKind, FloatArray]]]] = [("forward", forward)]
    if context.is_training:
        phases.append(("activation_gradient", backward))
    return [
        Operation(
            name,
            stream.removeprefix("expert_"),
            phase,
            stream,
            Collective(kind, num_bytes, group, copies),
            load_factor=load_factor,
        )
        for phase, collectives in phases
        for kind, num_bytes in collectives
    ]


def recomputable(context: LoweringContext, module: RecomputeModule, operations: Sequence[Operation]) -> list[Operation]:
    """Operations of a module, their forward ones marked to run again where selective recompute covers it."""
    if not context.recomputes(module):
        return list(operations)
    return [replace(row, is_recomputed_selectively=True) if row.phase == "forward" else row for row in operations]


def tensor_parallel_block(context: LoweringContext, name: str, tokens: FloatArray) -> list[Operation]:
    """Tensor-parallel communication around one block: one all-reduce, or all-gather and reduce-scatter.

    Megatron-LM (arXiv:1909.08053, section 3) and with sequence parallelism (arXiv:2205.05198, section 4.2.2), where the
    backward pass gathers the block's input once more. Either form moves the same bytes forward.
    """
    columns = context.columns
    group = context.group("tensor")
    num_bytes = tokens * (context.model.hidden_size * context.activation_bytes)
    is_sequence = columns["sequence"]
    reduced, gathered = num_bytes * (1 - is_sequence), num_bytes * is_sequence
    return collective(
        context,
        name,
        "tensor_parallel",
        group,
        forward=[("all_reduce", reduced), ("all_gather", gathered), ("reduce_scatter", gathered)],
        backward=[("all_reduce", reduced), ("all_gather", gathered * 2), ("reduce_scatter", gathered)],
    )


def norm_and_residual(context: LoweringContext, name: str, tokens: FloatArray, blocks: float) -> list[Operation]:
    """Norm before and residual addition after each block.

    Fused: norm reads and writes (2 passes), residual reads two and writes one (3); backward 3 + 3. Without fusion, bias
    (2) and dropout (3) are kernels of their own.
    """
    elements = tokens / context.sequence_shard() * (context.model.hidden_size * blocks)
    measured = context.stack.elementwise
    if context.stack.fuses_elementwise or measured is not None:
        kernels = (round(blocks), round(blocks))
        of_norm = (2.0, 3.0) if measured is None else both_passes(measured.norm)
        of_residual = (3.0, 3.0) if measured is None else both_passes(measured.residual)
        norm = traffic(context, f"{name}.norm", "memory_bound", elements, passes=of_norm, kernels=kernels)
        residual = traffic(context, f"{name}.residual", "memory_bound", elements, passes=of_residual, kernels=kernels)
        return recomputable(context, "layernorm", norm) + residual
    kernels = (round(4 * blocks), round(5 * blocks))
    return traffic(context, name, "memory_bound", elements, passes=(10, 10), kernels=kernels)


def both_passes(passes: KernelPasses) -> tuple[float, float]:
    """Passes of a kernel forward and backward."""
    return passes.forward, passes.backward


def activation_passes(stack: Stack, is_gated: bool) -> tuple[tuple[float, float], tuple[int, int]]:
    """Passes over the inner rows of an activation, forward and backward, and its kernels.

    Gated and fused: two read and one written; backward three read and two written. Without fusion the kernels of the
    activation and of the product each read and write. As measured, where the stack says so.
    """
    if stack.elementwise is not None and is_gated:
        return both_passes(stack.elementwise.activation), (2, 3)
    if stack.fuses_elementwise:
        return ((3.0, 5.0) if is_gated else (2.0, 3.0)), (1, 1)
    return ((5.0, 8.0) if is_gated else (4.0, 5.0)), (2, 2)


def feed_forward(
    context: LoweringContext,
    name: str,
    tokens: FloatArray,
    width: float,
    is_gated: bool,
    *,
    category: str = "dense_ffn",
) -> list[Operation]:
    """A dense feed-forward network sharded over the tensor group: up (and gate), activation, down, communication."""
    hidden = context.model.hidden_size
    local = width / context.columns["tensor"]
    gate = 2.0 if is_gated else 1.0
    passes, kernels = activation_passes(context.stack, is_gated)
    return [
        *linear(context, f"{name}.up", category, (tokens, local * gate, hidden)),
        *traffic(
            context,
            f"{name}.activation",
            "memory_bound",
            tokens * local,
            passes=passes,
            kernels=kernels,
        ),
        *linear(context, f"{name}.down", category, (tokens, hidden, local)),
        *tensor_parallel_block(context, f"{name}.tensor_parallel", tokens),
    ]
