"""Lowering of the MoE block: router, dispatch, all-to-all, expert GEMMs, combine, shared experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.describe.hardware import ElementwiseKernels, Stack
from moesim.describe.model import MixtureOfExperts, PresetLoad
from moesim.describe.quantities import PRECISION_BYTES
from moesim.describe.scenario import Scenario
from moesim.structure.columns import DROPLESS, WHOLE_RANK_GROUP, FloatArray
from moesim.structure.host_operations import moe_part_host
from moesim.structure.layers import LayerKind
from moesim.structure.lowering import (
    LoweringContext,
    activation_passes,
    both_passes,
    collective,
    feed_forward,
    gemm,
    linear,
    recomputable,
    token_columns,
    traffic,
    widening,
)
from moesim.structure.parameters import shared_width
from moesim.structure.placement import group_columns
from moesim.structure.step_graph import Gemm, MemoryTraffic, Operation, OperationTable, Phase, RoutedCopies
from moesim.structure.token_routing import EVEN_PRESETS

LoadFactor = Callable[[FloatArray], FloatArray]
CEILING_SLACK = 1e-9
INDEX_BYTES, SORT_PASSES = 8.0, 6.0
"""An index of a choice, and how often sorting reads or writes it."""
MEASURED_CHOICE_KERNELS = 12
"""Short kernels in a row that take as long as softmax, top-k and gathers of a few scores do in plain PyTorch."""
RANDOM_DISPERSION = 1.0
"""Variance over mean of an expert's rows where many tokens choose among many experts: a binomial's, 1 - 1/E."""
ONE_HOT_PASSES, SLOT_PASSES, ONE_HOT_KERNELS = 13.0, 4.0, 16
"""Over 64-bit one-hot rows of experts, and of slots: zeros, copy, scan, less one, times, sum, cast. And the kernels."""
SMALLEST_GROUP = 1e-9
"""Keeps an encoder that does not run (decoding) from dividing 0 by 0."""


def moe_columns(scenario: Scenario) -> tuple[str, ...]:
    """Columns that decide the cost of a MoE block."""
    order = scenario.parallelism.rank_order
    names = (*token_columns(scenario), "capacity_factor", "group_tokens")
    names += group_columns(order, "expert") + group_columns(order, "expert_tensor") + ("expert", "expert_tensor")
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens, slots and rows of one MoE block on one device; arrays (n_cases,).

    Attributes
    ----------
    tokens : ndarray
        Tokens routed by this device: its own, a tensor-parallel rank takes 1/tensor of the replicated ones.
    groups, group_tokens : ndarray
        Routing groups on this device and tokens of each.
    slots : ndarray
        Slots of one expert for one routing group; with dropless routing the mean assignments.
    sent_rows : ndarray
        Rows this device sends to experts, empty slots included: groups * num_experts * slots.
    local_experts : ndarray
        Experts held by this device (each a 1/expert_tensor shard).
    rows_per_expert : ndarray
        Rows one of them computes at mean load.
    is_dropless : ndarray of bool
        Whether rows follow the load instead of fixed slots.
    """

    tokens: FloatArray
    groups: FloatArray
    group_tokens: FloatArray
    slots: FloatArray
    sent_rows: FloatArray
    local_experts: FloatArray
    rows_per_expert: FloatArray
    is_dropless: FloatArray


def slots_per_expert(moe: MixtureOfExperts, capacity_factor: FloatArray, group_tokens: FloatArray) -> FloatArray:
    """Slots one expert offers to one routing group: a whole number, at least one.

    ``capacity_per: token`` gives ceil(cf * S / E) whatever k is (GShard, arXiv:2006.16668; Flaxformer); ``assignment``
    gives ceil(k * cf * S / E) (Tutel, arXiv:2206.03382, equation 1; Megatron-Core). Dropless routing has no slots: the
    mean assignments k * S / E are returned.
    """
    k = float(moe.router.experts_per_token)
    mean = k * group_tokens / moe.num_experts
    scale = 1.0 if moe.router.capacity_per == "assignment" else 1.0 / k
    capacity = np.maximum(np.ceil(mean * scale * capacity_factor - CEILING_SLACK), 1.0)
    return np.where(capacity_factor == DROPLESS, mean, capacity)


def routed_tokens(context: LoweringContext, side: str) -> RoutedTokens:
    """Token accounting of one MoE block."""
    moe = context.model.moe
    assert moe is not None
    columns = context.columns
    tokens = context.tokens(side) / columns["tensor"]
    asked = columns["group_tokens"]
    group_tokens = np.where(asked == WHOLE_RANK_GROUP, tokens, np.minimum(asked, tokens))
    group_tokens = np.maximum(group_tokens, SMALLEST_GROUP)
    groups = tokens / group_tokens
    slots = slots_per_expert(moe, columns["capacity_factor"], group_tokens)
    return RoutedTokens(
        tokens=tokens,
        groups=groups,
        group_tokens=group_tokens,
        slots=slots,
        sent_rows=groups * moe.num_experts * slots,
        local_experts=moe.num_experts / columns["expert"],
        rows_per_expert=groups * slots * columns["expert"] * columns["expert_tensor"],
        is_dropless=columns["capacity_factor"] == DROPLESS,
    )


def moe_part(context: LoweringContext, kind: LayerKind, load_factor: LoadFactor) -> OperationTable:
    """All operations of one MoE block; ``load_factor`` maps expert degrees to fullest rank over mean, (n_cases,)."""
    moe = context.model.moe
    assert moe is not None
    routed = routed_tokens(context, kind.side)
    factor = np.where(routed.is_dropless, load_factor(context.columns["expert"]), 1.0)
    operations = _router(context, moe, routed)
    if context.stack.dispatch == "one_hot_einsum":
        operations += _einsum_dispatch(context, moe, routed)
    else:
        operations += _permute_dispatch(context, routed, factor)
    operations += _all_to_all(context, routed, factor)
    operations += _experts(context, moe, routed, factor)
    width = shared_width(context.model)
    if width:
        tokens = context.tokens(kind.side)
        shared = feed_forward(context, "shared_expert", tokens, width, moe.is_gated)
        operations += recomputable(context, "shared_experts", shared)
    operations += _tensor_parallel_gather(context, routed)
    operations = recomputable(context, "moe", operations)
    is_quantised = PRECISION_BYTES[context.scenario.precision.compute] < 2
    forward_host, backward_host = (
        moe_part_host(context.stack, moe, routed.local_experts, is_quantised=is_quantised, is_backward=is_backward)
        for is_backward in (False, True)
    )
    return OperationTable(f"{kind.name}.moe_part", operations, forward_host, backward_host)


def _router(context: LoweringContext, moe: MixtureOfExperts, routed: RoutedTokens) -> list[Operation]:
    """Router GEMM, softmax and choice.

    A softmax reads and writes the logits and a fused top-k reads them once. One-hot stacks choose by k sequential
    argmax passes, each followed by a mask and a position count (2 passes); prototypes (k_top_1) choose in parallel, so
    one. A compiler without a kernel for cumulative sums makes the count in steps that double.
    """
    router = moe.router
    logits = routed.tokens * float(moe.num_experts)
    sequential = float(router.experts_per_token) if router.kind == "top_k" else 1.0
    if context.stack.dispatch == "one_hot_einsum":
        passes = 3.0 + 4.0 * sequential
        kernels = round(3 + 4 * sequential)
    else:
        passes, kernels = 4.0, 4
    measured = context.stack.elementwise
    choice_passes = (passes, 3.0) if measured is None else both_passes(measured.router_choice)
    shape = (routed.tokens, float(moe.num_experts), float(context.model.hidden_size))
    choice = traffic(
        context,
        "router.choice",
        "router",
        logits,
        passes=choice_passes,
        kernels=(kernels if measured is None else MEASURED_CHOICE_KERNELS, 3),
        element_bytes=PRECISION_BYTES[router.precision],
    )
    projection = linear(context, "router.gemm", "router", shape, precision=router.precision)
    if measured is not None and PRECISION_BYTES[router.precision] > context.activation_bytes:
        elements = routed.tokens * float(context.model.hidden_size)
        casts = traffic(context, "router.cast", "router", elements, passes=both_passes(measured.router_cast))
        choice += [widening(row, elements * measured.widening_s) for row in casts]
    return projection + choice + _positions(context, routed, logits * sequential)


def _positions(context: LoweringContext, routed: RoutedTokens, entries: FloatArray) -> list[Operation]:
    """Cumulative sums over a group's tokens in log2(S) doubling steps: each token's place at its expert."""
    compiler = context.stack.compiler
    if compiler is None or compiler.prefix_sum_passes is None:
        return []
    doublings = np.log2(np.maximum(routed.group_tokens, 2.0))
    passes = (compiler.prefix_sum_passes.value, 0.0)
    return traffic(
        context, "router.positions", "router", entries * doublings, passes=passes, kernels=(1, 0), element_bytes=4.0
    )


def _einsum_dispatch(context: LoweringContext, moe: MixtureOfExperts, routed: RoutedTokens) -> list[Operation]:
    """Dispatch GSEC,GSM->EGCM and combine GSEC,EGCM->GSM (GShard, algorithm 2), and their masks.

    Each is 2 * S * (E C) * M FLOPs per group, forward; backward, dispatch has one gradient, combine two.
    """
    hidden = float(context.model.hidden_size)
    cells = moe.num_experts * routed.slots
    dispatch = linear(
        context, "dispatch.einsum", "dispatch_combine", (cells, hidden, routed.group_tokens), groups=routed.groups
    )
    combine = linear(
        context, "combine.einsum", "dispatch_combine", (routed.group_tokens, hidden, cells), groups=routed.groups
    )
    masks = _masks(context, moe, routed)
    shape = (cells, hidden, routed.group_tokens)
    second = gemm(context, "activation_gradient", shape, groups=routed.groups)
    combine = [
        replace(row, phase="activation_gradient", work=second) if row.phase == "weight_gradient" else row
        for row in combine
    ]
    rows = [row for row in dispatch if row.phase != "weight_gradient"] + combine + masks
    return rows + _einsum_copies(context, routed, cells)


def _einsum_copies(context: LoweringContext, routed: RoutedTokens, cells: FloatArray) -> list[Operation]:
    """Copies that torch.einsum makes where a stack's were measured.

    Back to tokens (combine, and the gradient of dispatch) it reorders masks and slots; for the masks' gradient it
    transposes the slots of several groups.
    """
    measured = context.stack.elementwise
    if measured is None or measured.reorder_s is None:
        return []
    masks = routed.tokens * cells
    slots = routed.groups * cells * float(context.model.hidden_size)
    transposed = slots * (routed.groups > 1)
    rows: list[tuple[str, Phase, FloatArray, float]] = [("combine", "forward", masks + slots, measured.reorder_s)]
    if context.is_training:
        rows.append(("dispatch", "activation_gradient", masks + slots, measured.reorder_s))
        rows.append(("combine", "activation_gradient", transposed, measured.transpose_s or measured.reorder_s))
    return [
        Operation(
            f"{name}.einsum.copies",
            "dispatch_combine",
            phase,
            "compute",
            MemoryTraffic(elements * (2.0 * context.activation_bytes), elements * each_s),
        )
        for name, phase, elements, each_s in rows
    ]


def _masks(context: LoweringContext, moe: MixtureOfExperts, routed: RoutedTokens) -> list[Operation]:
    """Masks of dispatch and combine: four passes, or the kernels of plain PyTorch where a stack's scan was measured.

    Those count the choices in one-hot rows of 64-bit integers, k per token, and add them up in a scan of k S rows. The
    masks GSEC are products of GSKE and GSKC, batched over tokens; with one choice torch.einsum multiplies them.
    """
    entries = routed.tokens * moe.num_experts * routed.slots
    masks = traffic(context, "dispatch.masks", "dispatch_combine", entries, passes=(4, 2), kernels=(4, 2))
    measured = context.stack.elementwise
    if measured is None or measured.scan_row_s is None:
        return masks
    choices = float(moe.router.experts_per_token)
    one_hot = routed.tokens * choices * (ONE_HOT_PASSES * moe.num_experts + SLOT_PASSES * routed.slots)
    scan_s = routed.group_tokens * choices * measured.scan_row_s
    forward = replace(masks[0], work=MemoryTraffic(one_hot * INDEX_BYTES, serial_s=scan_s), kernels=ONE_HOT_KERNELS)
    work: Gemm | MemoryTraffic = MemoryTraffic(entries * context.activation_bytes)
    if choices > 1:
        work = gemm(context, "forward", (float(moe.num_experts), routed.slots, choices), groups=routed.tokens)
    products = [
        replace(masks[0], name=f"dispatch.masks.{mask}", work=work, kernels=1) for mask in ("dispatch", "combine")
    ]
    return [forward, *products, *masks[1:]]


def _permute_dispatch(context: LoweringContext, routed: RoutedTokens, factor: FloatArray) -> list[Operation]:
    """Gather rows by expert and scatter them back with their weights; a fused dispatch moves them once.

    Permute: read the tokens, write the rows, and again into expert order on the receiving side; combine mirrors it.
    """
    hidden = float(context.model.hidden_size)
    rows = routed.sent_rows * hidden
    if context.stack.elementwise is not None:
        return _measured_dispatch(context, context.stack.elementwise, routed, factor)
    passes = 6.0 if context.stack.dispatch == "permute" else 3.0
    kernels = 8 if context.stack.dispatch == "permute" else 3
    return traffic(
        context,
        "dispatch.permute",
        "dispatch_combine",
        rows,
        passes=(passes, passes),
        kernels=(kernels, kernels),
        load_factor=factor,
    )


def _measured_dispatch(
    context: LoweringContext, measured: ElementwiseKernels, routed: RoutedTokens, factor: FloatArray
) -> list[Operation]:
    """Sort the choices, copy rows to their experts' order and back, each by kernels that were measured.

    With a capacity all are sorted before by the same kernels: their places at their experts say which are kept.
    """
    name, elements = "dispatch_combine", routed.sent_rows * float(context.model.hidden_size)
    moe = context.model.moe
    assert moe is not None
    choices = np.where(routed.is_dropless, 0.0, routed.tokens * float(moe.router.experts_per_token))
    sorts = [("dispatch.places", choices), ("dispatch.sort", routed.sent_rows)]
    sorted_rows = [
        traffic(
            context,
            step,
            name,
            sorted_elements,
            passes=(SORT_PASSES, 0.0),
            kernels=(measured.sort_kernels, 0),
            element_bytes=INDEX_BYTES,
        )[0]
        for step, sorted_elements in sorts
        if sorted_elements.any()
    ]
    moved = [
        row
        for step, passes in (("dispatch.permute", measured.permute), ("combine.unpermute", measured.unpermute))
        for row in traffic(
            context, step, name, elements, passes=both_passes(passes), kernels=(3, 3), load_factor=factor
        )
    ]
    return sorted_rows + moved


def _all_to_all(context: LoweringContext, routed: RoutedTokens, factor: FloatArray) -> list[Operation]:
    """Rows to their experts and back, forward and backward; then the expert-tensor group shares its rows."""
    hidden = context.model.hidden_size
    columns = context.columns
    out_bytes = routed.sent_rows * (hidden * context.dispatch_bytes)
    back_bytes = routed.sent_rows * (hidden * context.combine_bytes)
    operations = collective(
        context,
        "experts.all_to_all",
        "all_to_all",
        context.group("expert"),
        forward=[("all_to_all", out_bytes), ("all_to_all", back_bytes)],
        backward=[("all_to_all", back_bytes), ("all_to_all", back_bytes)],
        load_factor=factor,
        copies=_copies(context),
    )
    received = routed.local_experts * routed.rows_per_expert * (hidden * context.activation_bytes)
    shared = received * (columns["expert_tensor"] > 1)
    return operations + collective(
        context,
        "experts.expert_tensor_parallel",
        "expert_tensor_parallel",
        context.group("expert_tensor"),
        forward=[("all_gather", shared), ("reduce_scatter", shared)],
        backward=[("all_gather", shared), ("reduce_scatter", shared)],
        load_factor=factor,
    )


def _copies(context: LoweringContext) -> RoutedCopies | None:
    moe = context.model.moe
    if moe is None or not context.stack.sends_one_copy_per_node:
        return None
    limit = moe.router.max_nodes_per_token
    return RoutedCopies(float(moe.router.experts_per_token), math.inf if limit is None else float(limit))


def _experts(
    context: LoweringContext, moe: MixtureOfExperts, routed: RoutedTokens, factor: FloatArray
) -> list[Operation]:
    """GEMMs of the local experts over their rows, and the activation between them.

    A grouped kernel, but for one-hot dispatch, whose experts have equal slots and are one batched product.
    """
    hidden = float(context.model.hidden_size)
    local = moe.intermediate_size / context.columns["expert_tensor"]
    gate = 2.0 if moe.is_gated else 1.0
    rows, experts = routed.rows_per_expert, routed.local_experts
    is_ragged = context.stack.dispatch != "one_hot_einsum"
    up, down = (
        linear(
            context,
            name,
            "expert_gemm",
            shape,
            groups=experts,
            load_factor=factor,
            is_ragged=is_ragged,
            row_dispersion=_row_dispersion(moe, routed),
        )
        for name, shape in (("expert.up", (rows, local * gate, hidden)), ("expert.down", (rows, hidden, local)))
    )
    slowdown = context.stack.quantised_expert_slowdown
    if slowdown is not None and PRECISION_BYTES[context.scenario.precision.compute] < 2:
        up, down = ([slower(row, slowdown.value) for row in matrices] for matrices in (up, down))
    passes, kernels = activation_passes(context.stack, moe.is_gated)
    activation = traffic(
        context,
        "expert.activation",
        "memory_bound",
        experts * rows * local,
        passes=passes,
        kernels=kernels,
        load_factor=factor,
    )
    up, down = (
        with_separate_sum(matrices, context.stack, activation_bytes=context.activation_bytes) for matrices in (up, down)
    )
    return [*up, *recomputable(context, "moe_act", activation), *down]


def _row_dispersion(moe: MixtureOfExperts, routed: RoutedTokens) -> FloatArray:
    """Of the rows of one rank's experts: slots are all equal, tokens that choose freely scatter."""
    imbalance = moe.router.imbalance
    is_even = isinstance(imbalance, PresetLoad) and imbalance.name in EVEN_PRESETS
    return np.where(routed.is_dropless, 0.0 if is_even else RANDOM_DISPERSION, 0.0)


def with_separate_sum(matrices: Sequence[Operation], stack: Stack, *, activation_bytes: float) -> list[Operation]:
    """Experts' products with their weight gradients written as activations are, and added to the sum afterwards.

    Only where the stack's grouped kernel cannot add: the addition reads the gradient, reads the sum and writes it.
    """
    measured = stack.elementwise
    if measured is None or measured.expert_gradient_bytes is None:
        return list(matrices)
    rows: list[Operation] = []
    for row in matrices:
        if row.phase != "weight_gradient" or not isinstance(row.work, Gemm):
            rows.append(row)
            continue
        product = replace(row.work, output_bytes=activation_bytes, accumulates=False)
        weights = product.groups * product.rows * product.columns
        added = MemoryTraffic(weights * measured.expert_gradient_bytes, weights * measured.widening_s)
        rows.append(replace(row, work=product))
        rows.append(replace(row, name=f"{row.name}.sum", work=added, load_factor=None))
    return rows


def slower(operation: Operation, slowdown: float) -> Operation:
    """Return a GEMM in slower kernels, whatever its scales, anything else (its casts) as it is."""
    if not isinstance(operation.work, Gemm):
        return operation
    return replace(operation, slowdown=slowdown, work=replace(operation.work, scaling="tensor"))


def _tensor_parallel_gather(context: LoweringContext, routed: RoutedTokens) -> list[Operation]:
    """Without sequence parallelism, tensor ranks route 1/tensor of the tokens each and gather the results."""
    columns = context.columns
    whole = routed.tokens * columns["tensor"] * (context.model.hidden_size * context.activation_bytes)
    whole = whole * (1 - columns["sequence"]) * (columns["tensor"] > 1)
    return collective(
        context,
        "moe.tensor_parallel",
        "expert_tensor_parallel",
        context.group("tensor"),
        forward=[("all_gather", whole)],
        backward=[("all_gather", whole)],
    )
