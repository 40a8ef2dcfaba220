"""Bytes per device by category and stage: weights, gradients, optimizer, activations, buffers.

Each part is computed over the distinct cases of the few columns it reads; shapes are (stages, n_cases).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.describe.model import LatentAttention, MultiHeadAttention
from moesim.describe.quantities import PRECISION_BYTES
from moesim.describe.scenario import Optimizer, Scenario
from moesim.structure.activations_in_flight import most_held
from moesim.structure.columns import RECOMPUTE_CODES, FloatArray
from moesim.structure.layers import LayerKind, LayerSequence, StagePlan
from moesim.structure.lowering import LoweringContext
from moesim.structure.lowering_moe import LoadFactor, moe_columns, routed_tokens
from moesim.structure.parameters import (
    ShardedSizes,
    attention_output_width,
    attention_widths,
    embedding_matrices,
    head_matrices,
    layer_matrices,
    mtp_layer_kind,
    mtp_matrices,
    sharded_sizes,
    shared_width,
)
from moesim.structure.pipeline_schedules import micro_batches_in_flight

CATEGORIES: tuple[str, ...] = ("weights", "gradients", "optimizer", "activations", "buffers", "other")


@dataclass(frozen=True)
class StateBytes:
    """Weights, gradients and optimizer state, each of shape (stages, n_cases)."""

    weights: FloatArray
    gradients: FloatArray
    optimizer: FloatArray


@dataclass(frozen=True)
class StageParameters:
    """Parameters and parameter tensors per stage before sharding, by sharding: each of shape (stages,).

    ``copies`` of the model that one pipeline holds; stages count all they hold.
    """

    tensor: FloatArray
    replicated: FloatArray
    expert: FloatArray
    tensor_factored: FloatArray
    replicated_factored: FloatArray
    expert_factored: FloatArray
    tensors: FloatArray
    expert_tensors: FloatArray
    copies: int = 1


def stage_parameters(scenario: Scenario, sequence: LayerSequence, plan: StagePlan) -> StageParameters:
    """Sum matrices over the layers of each stage.

    A tied head, or token prediction, on another stage than the embedding has a copy of it.
    """
    model = scenario.model
    layers = [sharded_sizes(layer_matrices(model, kind)) for kind in sequence.kinds]
    counts = plan.stage_counts()
    first, last = embedding_matrices(model), head_matrices(model)
    placed = plan.placed
    if (model.tied_embeddings or model.mtp_layers) and placed.stages_of(0) != placed.stages_of(-1):
        last = last + embedding_matrices(model)
    last = last + mtp_matrices(model, mtp_layer_kind(sequence)) * model.mtp_layers
    ends: dict[int, list[ShardedSizes]] = {stage: [] for stage in range(plan.stages)}
    for chunk, end in ((0, first), (-1, last)):
        for stage in placed.stages_of(chunk):
            ends[stage].append(sharded_sizes(end))

    def per_stage(attribute: str) -> FloatArray:
        total = np.zeros(plan.stages)
        for index, size in enumerate(layers):
            total = total + counts[index] * getattr(size, attribute)
        for stage, sizes in ends.items():
            total[stage] += sum(getattr(size, attribute) for size in sizes)
        return total

    sizes = {name: per_stage(name) for name in ShardedSizes.__dataclass_fields__}
    return StageParameters(**sizes, copies=placed.directions)


def local_parameters(context: LoweringContext, stages: StageParameters) -> tuple[FloatArray, FloatArray]:
    """Non-expert and expert parameters on one device before ZeRO, each of shape (stages, n_cases)."""
    columns = context.columns
    dense = stages.tensor[:, None] / columns["tensor"] + stages.replicated[:, None]
    expert = stages.expert[:, None] / (columns["expert"] * columns["expert_tensor"])
    return dense, expert


def optimizer_bytes_per_parameter(scenario: Scenario) -> float:
    """Bytes of master copy and unfactored moments per parameter."""
    precision = scenario.precision
    master = 0.0 if precision.master == precision.parameters else PRECISION_BYTES[precision.master]
    return master + unfactored_moments(scenario.optimizer) * PRECISION_BYTES[scenario.optimizer.state]


def unfactored_moments(optimizer: Optimizer) -> int:
    """Moments with one number per parameter: two of Adam; of Adafactor and SGD only a momentum."""
    return 2 if optimizer.kind == "adam" else int(optimizer.momentum)


def state_bytes(context: LoweringContext, stages: StageParameters) -> StateBytes:
    """Weights, gradients and optimizer state under ZeRO (arXiv:1910.02054).

    Stage 1 shards optimizer state, 2 gradients as well, 3 parameters as well: non-expert ones over data * context,
    experts over expert_data. Inference holds weights only.
    """
    scenario, columns = context.scenario, context.columns
    dense, expert = local_parameters(context, stages)
    zero = columns["zero_stage"]
    dense_shard, expert_shard = columns["data"] * columns["context"], columns["expert_data"]

    def sharded(from_stage: int) -> FloatArray:
        is_sharded = zero >= from_stage
        return dense / np.where(is_sharded, dense_shard, 1.0) + expert / np.where(is_sharded, expert_shard, 1.0)

    weights = sharded(3) * PRECISION_BYTES[scenario.precision.parameters]
    if not context.is_training:
        return StateBytes(weights, weights * 0, weights * 0)
    gradients = sharded(2) * PRECISION_BYTES[scenario.precision.gradients]
    optimizer = sharded(1) * optimizer_bytes_per_parameter(scenario)
    if scenario.optimizer.kind == "adafactor":
        optimizer = optimizer + _factored_bytes(context, stages)
    if scenario.optimizer.offload == "optimizer":
        optimizer = optimizer * 0
    return StateBytes(weights, gradients, optimizer)


def _factored_bytes(context: LoweringContext, stages: StageParameters) -> FloatArray:
    """Row and column sums of Adafactor's second moment; tensor sharding cuts one of the two, so half is halved."""
    columns = context.columns
    dense = stages.tensor_factored[:, None] * (1 + 1 / columns["tensor"]) / 2 + stages.replicated_factored[:, None]
    expert = stages.expert_factored[:, None] * (1 + 1 / columns["expert_tensor"]) / 2 / columns["expert"]
    return (dense + expert) * PRECISION_BYTES[context.scenario.optimizer.state]


def memory_columns(scenario: Scenario) -> tuple[str, ...]:
    """Columns that decide activations and buffers."""
    return tuple(dict.fromkeys((*moe_columns(scenario), "recompute", "num_micro_batches", "zero_stage")))


@dataclass(frozen=True)
class LayerActivations:
    """Bytes one layer keeps for the backward pass of one micro-batch; arrays (n_cases,)."""

    everything: FloatArray
    selective: FloatArray
    layer_input: FloatArray

    def kept(self, recompute: FloatArray) -> FloatArray:
        """Bytes kept under each case's recompute policy."""
        full = np.where(recompute == RECOMPUTE_CODES["full"], self.layer_input, self.everything)
        return np.where(recompute == RECOMPUTE_CODES["selective"], self.selective, full)


@dataclass(frozen=True)
class KeptBytes:
    """Bytes of one block kept for its backward pass, and those of them that selective recompute drops."""

    kept: FloatArray
    dropped: FloatArray

    def __add__(self, other: KeptBytes) -> KeptBytes:
        return KeptBytes(self.kept + other.kept, self.dropped + other.dropped)


def layer_activations(context: LoweringContext, kind: LayerKind, load_factor: LoadFactor) -> LayerActivations:
    """Activations of one layer, tensor by tensor (after arXiv:2205.05198, section 4).

    A tensor that several operations need is kept once. Inputs of quantised linear layers are kept quantised, what
    attention and activation functions need as computed.
    """
    tokens = context.tokens(kind.side)
    unit = context.model.hidden_size * context.saved_bytes
    layer_input = tokens / context.sequence_shard() * unit
    keys = context.columns["source_length" if kind.side == "encoder" else "target_length"]
    kept = _attention_activations(context, tokens, tokens, keys)
    if kind.has_cross_attention:
        kept += _attention_activations(context, tokens, context.tokens("encoder"), context.columns["source_length"])
    ffn = context.model.dense_ffn
    if kind.is_moe:
        kept += _moe_activations(context, kind, load_factor)
    elif ffn is not None:
        kept += _block_ends(context, tokens, context.linear_saved_bytes)
        kept += _ffn_activations(context, tokens, ffn.intermediate_size, ffn.is_gated, context.recomputes("mlp"))
    return LayerActivations(kept.kept, kept.kept - kept.dropped, layer_input)


def _block_ends(context: LoweringContext, tokens: FloatArray, output_bytes: float) -> KeptBytes:
    """Norm input and output of one block, and a dropout mask where it is a kernel of its own."""
    shard = tokens / context.sequence_shard() * context.model.hidden_size
    mask = 0.0 if context.stack.fuses_elementwise else 1.0
    output = shard * output_bytes
    return KeptBytes(shard * (context.saved_bytes + mask) + output, output * context.recomputes("layernorm"))


def _attention_activations(
    context: LoweringContext, tokens: FloatArray, key_tokens: FloatArray, key_length: FloatArray
) -> KeptBytes:
    """An attention block: queries, keys, values, output (and its quantised copy), latents, scores or their sums."""
    model, tensor = context.model, context.columns["tensor"]
    attention, width, linear_width = model.attention, context.saved_bytes, context.linear_saved_bytes
    query, key, value = attention_widths(model)
    projected = (tokens * query + key_tokens * (key + value)) / tensor * width
    copies = width + (linear_width if linear_width < width else 0.0)
    output = tokens * attention_output_width(model) / tensor * copies
    heads = attention.heads / tensor
    if context.stack.attention_kernel == "flash":
        scores = tokens * heads * 4.0
    else:
        scores = tokens * key_length * heads * (width if context.stack.fuses_elementwise else 2 * width + 1.0)
    total = _block_ends(context, tokens, linear_width)
    total += KeptBytes(projected + output, projected * 0)
    total += KeptBytes(scores, scores * context.recomputes("core_attn"))
    if isinstance(attention, LatentAttention):
        latent = tokens * (attention.query_rank or 0) + key_tokens * attention.kv_rank
        normed = latent * linear_width
        kept = latent * width + key_tokens * (attention.rope_head_size * width) + normed
        dropped = projected * context.recomputes("mla_up_proj") + normed * context.recomputes("layernorm")
        total += KeptBytes(kept, dropped)
    return total


def _ffn_activations(
    context: LoweringContext, tokens: FloatArray, width: float, is_gated: bool, is_recomputed: bool
) -> KeptBytes:
    """Between the two linear layers: what the activation function reads, and what it writes."""
    local = tokens * width / context.columns["tensor"]
    inner = local * ((2.0 if is_gated else 1.0) * context.saved_bytes + context.linear_saved_bytes)
    return KeptBytes(inner, inner * is_recomputed)


def _moe_activations(context: LoweringContext, kind: LayerKind, load_factor: LoadFactor) -> KeptBytes:
    """Router outputs, dispatched rows, expert activations, rows to combine, one-hot masks, shared experts.

    Rows to combine are kept where the router's weights multiply them; fused stacks multiply inside the experts'
    activation function (Megatron-Core since 0.12) and keep none.
    """
    moe = context.model.moe
    assert moe is not None
    routed = routed_tokens(context, kind.side)
    width, linear_width, hidden = context.saved_bytes, context.linear_saved_bytes, context.model.hidden_size
    factor = np.where(routed.is_dropless, load_factor(context.columns["expert"]), 1.0)
    rows = routed.local_experts * routed.rows_per_expert * factor
    tokens = context.tokens(kind.side)
    local = rows * (moe.intermediate_size / context.columns["expert_tensor"])
    written = local * linear_width
    inside = routed.tokens * (2.0 * moe.num_experts * PRECISION_BYTES[moe.router.precision])
    inside = inside + rows * (hidden * (linear_width if linear_width < 2 else context.dispatch_bytes))
    inside = inside + local * ((2.0 if moe.is_gated else 1.0) * width) + written
    if not context.stack.fuses_elementwise:
        inside = inside + routed.sent_rows * (hidden * width)
    if context.stack.dispatch == "one_hot_einsum":
        inside = inside + routed.tokens * moe.num_experts * routed.slots * (2 * width)
    dropped = inside if context.recomputes("moe") else written * context.recomputes("moe_act")
    total = _block_ends(context, tokens, width) + KeptBytes(inside, dropped)
    shared = shared_width(context.model)
    if shared:
        is_recomputed = context.recomputes("shared_experts") or context.recomputes("moe")
        total += _ffn_activations(context, tokens, shared, moe.is_gated, is_recomputed)
    return total


def dispatch_buffer_bytes(context: LoweringContext, kind: LayerKind, load_factor: LoadFactor) -> FloatArray:
    """Send and receive buffers of one MoE layer's all-to-all, empty slots included; layers reuse them."""
    routed = routed_tokens(context, kind.side)
    factor = np.where(routed.is_dropless, load_factor(context.columns["expert"]), 1.0)
    received = routed.local_experts * routed.rows_per_expert * factor
    width = max(context.dispatch_bytes, context.combine_bytes)
    return (routed.sent_rows + received) * (context.model.hidden_size * width)


@dataclass(frozen=True)
class WorkingBytes:
    """Activations and buffers, each of shape (stages, n_cases)."""

    activations: FloatArray
    buffers: FloatArray


def working_bytes(
    context: LoweringContext,
    sequence: LayerSequence,
    plan: StagePlan,
    parameters: StageParameters,
    load_factor: LoadFactor,
) -> WorkingBytes:
    """Activations in flight and communication buffers of every stage."""
    counts = plan.stage_counts()
    if context.is_training:
        activations = _training_activations(context, plan, chunk_activations(context, sequence, plan, load_factor))
    else:
        layers = [layer_activations(context, kind, load_factor) for kind in sequence.kinds]
        largest = np.max(np.stack([layer.everything for layer in layers]), axis=0)
        activations = np.broadcast_to(largest, (plan.stages, len(largest))).copy()
    buffers = np.zeros_like(activations)
    for index, kind in enumerate(sequence.kinds):
        if kind.is_moe:
            has_kind = (counts[index] > 0)[:, None]
            buffers = np.maximum(buffers, has_kind * dispatch_buffer_bytes(context, kind, load_factor))
    buffers = buffers + _gathered_parameters(context, sequence, parameters)
    if not context.is_training:
        buffers = buffers + _cache_bytes(context, sequence, counts)
    return WorkingBytes(activations, buffers)


@dataclass(frozen=True)
class ChunkActivations:
    """Bytes that activations of one micro-batch take on the chunks of a model, in model order.

    Attributes
    ----------
    kept : ndarray of shape (chunks, n_cases)
        From a chunk's forward pass to its last gradient.
    loss : ndarray of shape (n_cases,)
        On the last chunk besides, logits and token prediction, to the gradient of its activations.
    rebuilt : ndarray of shape (n_cases,)
        What full recompute, one layer at a time, holds besides while a backward pass runs.
    """

    kept: FloatArray
    loss: FloatArray
    rebuilt: FloatArray


def chunk_activations(
    context: LoweringContext, sequence: LayerSequence, plan: StagePlan, load_factor: LoadFactor
) -> ChunkActivations:
    """Activations of one micro-batch, chunk by chunk: what a schedule's counts in flight multiply."""
    columns, model = context.columns, context.model
    recompute = columns["recompute"]
    layers = [layer_activations(context, kind, load_factor) for kind in sequence.kinds]
    kept = [layer.kept(recompute) for layer in layers]
    chunks = sum(plan.counts[index][:, None] * layer for index, layer in enumerate(kept))
    vocabulary = np.ceil(model.vocab_size / columns["tensor"])
    logits = context.tokens("decoder") * vocabulary * context.stack.memory.bytes_per_logit
    last = kept[sequence.kinds.index(mtp_layer_kind(sequence))]
    largest = np.max(np.stack([layer.everything for layer in layers]), axis=0)
    return ChunkActivations(
        np.asarray(chunks, dtype=np.float64),
        logits * (1 + model.mtp_layers) + last * model.mtp_layers,
        (recompute == RECOMPUTE_CODES["full"]) * largest,
    )


def _training_activations(context: LoweringContext, plan: StagePlan, chunks: ChunkActivations) -> FloatArray:
    """Most bytes in flight on every stage, (stages, n_cases)."""
    schedule = context.scenario.parallelism.pipeline.schedule
    micro_batches = context.columns["num_micro_batches"]
    if schedule != "gpipe" and plan.placed.held.shape[1] > 1:
        size = (plan.stages, plan.virtual_stages)
        return most_held(schedule, *size, micro_batches, chunks.kept, chunks.loss) + chunks.rebuilt
    in_flight = micro_batches_in_flight(schedule, plan.stages, plan.virtual_stages, micro_batches)
    activations = chunks.kept[plan.placed.held].sum(axis=1) * in_flight + chunks.rebuilt
    # Under GPipe every micro-batch's loss waits for its backward pass; elsewhere it follows at once.
    losses = in_flight[-1] if schedule == "gpipe" else 1.0
    for stage in plan.placed.stages_of(-1):
        activations[stage] += chunks.loss * losses
    return np.asarray(activations, dtype=np.float64)


def _gathered_parameters(context: LoweringContext, sequence: LayerSequence, parameters: StageParameters) -> FloatArray:
    """ZeRO-3 holds two layers' gathered parameters: the one in use and the one being fetched."""
    columns, model = context.columns, context.model
    largest = columns["tensor"] * 0.0
    for kind in sequence.kinds:
        size = sharded_sizes(layer_matrices(model, kind))
        experts = size.expert / (columns["expert"] * columns["expert_tensor"])
        largest = np.maximum(largest, size.tensor / columns["tensor"] + size.replicated + experts)
    width = PRECISION_BYTES[context.scenario.precision.parameters]
    return (columns["zero_stage"] >= 3) * largest * (2 * width)


def _cache_bytes(context: LoweringContext, sequence: LayerSequence, counts: FloatArray) -> FloatArray:
    """Key-value cache of all sequences of a step on this device: decoder layers, target and (crossed) source."""
    columns, attention = context.columns, context.model.attention
    sequences = columns["micro_batch"] * columns["num_micro_batches"]
    crossed = float(any(kind.has_cross_attention for kind in sequence.kinds))
    length = (columns["target_length"] + crossed * columns["source_length"]) / columns["context"]
    layers = sum(counts[index] for index, kind in enumerate(sequence.kinds) if kind.side == "decoder")
    if isinstance(attention, LatentAttention):
        width: FloatArray = columns["tensor"] * 0 + attention.kv_rank + attention.rope_head_size
    else:
        kv_heads = attention.heads if isinstance(attention, MultiHeadAttention) else attention.kv_heads
        width = np.maximum(kv_heads / columns["tensor"], 1.0) * (2 * attention.head_size)
    per_layer = sequences * length * width * context.activation_bytes
    return np.asarray(np.asarray(layers)[:, None] * per_layer)
