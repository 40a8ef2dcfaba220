"""Lowering of attention blocks, dense layers and the model's ends (embedding, head, loss, token prediction)."""

from __future__ import annotations

import numpy as np

from moesim.describe.model import GroupedQueryAttention, LatentAttention
from moesim.structure.columns import FloatArray
from moesim.structure.host_operations import (
    EMBEDDING_OPERATIONS,
    HEAD_OPERATIONS,
    TOKEN_PREDICTION_OPERATIONS,
    dense_part_host,
)
from moesim.structure.layers import LayerKind
from moesim.structure.lowering import (
    LoweringContext,
    both_passes,
    collective,
    feed_forward,
    linear,
    norm_and_residual,
    recomputable,
    tensor_parallel_block,
    traffic,
    widening,
)
from moesim.structure.parameters import attention_output_width, attention_widths
from moesim.structure.step_graph import AttentionCore, HostWork, Operation, OperationTable, Phase, PrefillShape

FLASH_BACKWARD_MATMULS_OVER_FORWARD = 2.5
"""Products of a flash backward pass over those of the forward pass: five to two, the scores once more."""
MATERIALISED_BACKWARD_MATMULS_OVER_FORWARD = 2.0


def dense_part(context: LoweringContext, kind: LayerKind) -> OperationTable:
    """Everything of a layer but its MoE block: attention blocks, norms and, in a dense layer, the feed-forward."""
    tokens = context.tokens(kind.side)
    keys = _key_length(context, kind.side)
    is_causal = kind.side == "decoder" and context.scenario.workload.kind != "decode"
    operations = attention_block(context, "attention", tokens, keys, tokens, is_causal=is_causal)
    if kind.has_cross_attention:
        source = context.columns["source_length"]
        fresh_keys = tokens * 0 if context.scenario.workload.kind == "decode" else context.tokens("encoder")
        operations += attention_block(context, "cross_attention", tokens, source, fresh_keys, is_causal=False)
    operations += norm_and_residual(context, "norm_residual", tokens, 3.0 if kind.has_cross_attention else 2.0)
    ffn = context.model.dense_ffn
    if not kind.is_moe and ffn is not None:
        network = feed_forward(context, "dense_ffn", tokens, ffn.intermediate_size, ffn.is_gated)
        operations += recomputable(context, "mlp", network)
    host = dense_part_host(
        context.stack,
        context.model,
        blocks=2.0 if kind.has_cross_attention else 1.0,
        has_dense_ffn=not kind.is_moe and ffn is not None,
    )
    return OperationTable(f"{kind.name}.dense_part", operations, host, host)


def _key_length(context: LoweringContext, side: str) -> FloatArray:
    return context.columns["source_length"] if side == "encoder" else context.columns["target_length"]


def attention_block(
    context: LoweringContext,
    name: str,
    tokens: FloatArray,
    key_length: FloatArray,
    key_tokens: FloatArray,
    *,
    is_causal: bool,
) -> list[Operation]:
    """One attention block: projections, core, output projection and its communication.

    ``tokens`` are the queries on this device, ``key_length`` keys each query may see, ``key_tokens`` the tokens whose
    keys and values are projected here (those of the source in cross-attention).
    """
    return [
        *_projections(context, name, tokens, key_tokens),
        *_core(context, name, tokens, key_length, is_causal=is_causal),
        *_output(context, name, tokens),
        *_context_parallel(context, name, key_tokens),
        *tensor_parallel_block(context, f"{name}.tensor_parallel", tokens),
    ]


def _projections(context: LoweringContext, name: str, tokens: FloatArray, key_tokens: FloatArray) -> list[Operation]:
    hidden, attention = context.model.hidden_size, context.model.attention
    tensor = context.columns["tensor"]
    query, key, value = attention_widths(context.model)
    if not isinstance(attention, LatentAttention):
        if key_tokens is tokens:
            return linear(context, f"{name}.qkv", "attention", (tokens, (query + key + value) / tensor, hidden))
        return linear(context, f"{name}.query", "attention", (tokens, query / tensor, hidden)) + linear(
            context, f"{name}.key_value", "attention", (key_tokens, (key + value) / tensor, hidden)
        )
    up_width = attention.heads * (attention.head_size + attention.value_head_size) / tensor
    kv_width = float(attention.kv_rank + attention.rope_head_size)
    operations = linear(context, f"{name}.kv_down", "attention", (key_tokens, kv_width, hidden))
    up = linear(context, f"{name}.kv_up", "attention", (key_tokens, up_width, attention.kv_rank))
    operations += recomputable(context, "mla_up_proj", up)
    if attention.query_rank is None:
        return operations + linear(context, f"{name}.query", "attention", (tokens, query / tensor, hidden))
    operations += linear(context, f"{name}.query_down", "attention", (tokens, attention.query_rank, hidden))
    query_up = linear(context, f"{name}.query_up", "attention", (tokens, query / tensor, attention.query_rank))
    return operations + recomputable(context, "mla_up_proj", query_up)


def _core(
    context: LoweringContext, name: str, tokens: FloatArray, key_length: FloatArray, *, is_causal: bool
) -> list[Operation]:
    """Scores and weighted sum; a flash kernel skips the masked half and recomputes scores in the backward pass."""
    attention, tensor = context.model.attention, context.columns["tensor"]
    query, key, value = attention_widths(context.model)
    heads = attention.heads / tensor
    pairs = tokens * padded(context, key_length)
    is_flash = context.stack.attention_kernel == "flash"
    backward = FLASH_BACKWARD_MATMULS_OVER_FORWARD if is_flash else MATERIALISED_BACKWARD_MATMULS_OVER_FORWARD
    output = attention_output_width(context.model)
    width = float(padded(context, query / attention.heads) + padded(context, output / attention.heads))
    if isinstance(attention, LatentAttention) and context.scenario.workload.kind == "decode":
        width = 2.0 * attention.kv_rank + attention.rope_head_size  # absorbed: scores and sum over the cached latents
    reads = _key_reads(context, key_length, key + value)
    io_elements = (tokens * (query + output) + reads) / tensor
    phases: list[Phase] = ["forward", "activation_gradient"] if context.is_training else ["forward"]
    operations = [
        Operation(
            f"{name}.core",
            "attention",
            phase,
            "compute",
            AttentionCore(
                pairs=pairs,
                heads=heads,
                matmul_width=width * (1.0 if phase == "forward" else backward),
                visible_fraction=0.5 if is_causal and is_flash else 1.0,
                io_elements=io_elements * (1.0 if phase == "forward" else 2.0),
                precision=unquantised_precision(context),
                element_bytes=operand_bytes(context),
                prefill=_prefill_shape(context, tokens, key_length, width) if is_flash else None,
                is_backward=phase != "forward",
            ),
            kernels=1 if is_flash else 2,
        )
        for phase in phases
    ]
    if is_flash:
        return recomputable(context, "core_attn", operations)
    fused = context.stack.fuses_elementwise
    operations += traffic(
        context,
        f"{name}.softmax",
        "memory_bound",
        pairs * heads,
        passes=_score_passes(context),
        kernels=(1, 1) if fused else (4, 4),
        element_bytes=4.0 if context.stack.score_passes is not None else None,
    )
    return recomputable(context, "core_attn", operations)


def operand_bytes(context: LoweringContext) -> float:
    """Bytes of an attention operand: XLA stores what only matrix products read in their 16-bit format."""
    if context.stack.compiler is None:
        return context.activation_bytes
    return min(context.activation_bytes, 2.0)


def padded(context: LoweringContext, extent: FloatArray | float) -> FloatArray:
    """An extent rounded up to the lanes of the compiler's tiles; as it is without such a compiler."""
    compiler = context.stack.compiler
    lanes = 1 if compiler is None else compiler.lane_width
    return np.asarray(extent if lanes == 1 else np.ceil(np.asarray(extent) / lanes - 1e-9) * lanes)


def _prefill_shape(
    context: LoweringContext, tokens: FloatArray, key_length: FloatArray, width: float
) -> PrefillShape | None:
    """Calls of a flash kernel: whole sequences over the context group, as if each device had a share of them.

    Cross-attention of T queries with S keys is the square of sqrt(T S). None when decoding, which reads the cache.
    """
    if context.scenario.workload.kind == "decode":
        return None
    attention, columns = context.model.attention, context.columns
    sequences = columns["micro_batch"] / columns["context"]
    queries = np.rint(tokens / sequences)
    length = np.where(queries == key_length, key_length, np.sqrt(queries * key_length))
    kv_heads = attention.kv_heads if isinstance(attention, GroupedQueryAttention) else attention.heads
    return PrefillShape(sequences, length, kv_heads / columns["tensor"], width / 2.0)


def _score_passes(context: LoweringContext) -> tuple[float, float]:
    """Passes of the scores through memory: as the stack says, else one write and one read and those of the softmax.

    Fused: the softmax reads and writes (2); without fusion, scale (2), mask (2), softmax (2) and dropout (2.5) do.
    """
    known = context.stack.score_passes
    if known is not None:
        return known.forward, known.backward
    return (4.0, 6.0) if context.stack.fuses_elementwise else (10.5, 12.0)


def unquantised_precision(context: LoweringContext) -> str:
    """Format of attention cores and of the head: 16 bits where the linear layers are quantised.

    DeepSeek-V3 (arXiv:2412.19437, section 3.3.1) keeps both; Megatron-Core's output layer is not Transformer Engine's.
    """
    compute = context.scenario.precision.compute
    return "bf16" if compute in ("fp8", "fp4", "int8") else compute


def _key_reads(context: LoweringContext, key_length: FloatArray, width: int) -> FloatArray:
    """Key and value elements read once per sequence: the cache in a decode step."""
    columns = context.columns
    attention = context.model.attention
    if context.scenario.workload.kind == "decode" and isinstance(attention, LatentAttention):
        cached = float(attention.kv_rank + attention.rope_head_size)
        return columns["micro_batch"] * key_length / columns["context"] * cached * columns["tensor"]
    return columns["micro_batch"] * key_length / columns["context"] * width


def _output(context: LoweringContext, name: str, tokens: FloatArray) -> list[Operation]:
    width = attention_output_width(context.model)
    shape = (tokens, float(context.model.hidden_size), width / context.columns["tensor"])
    return linear(context, f"{name}.output", "attention", shape)


def _context_parallel(context: LoweringContext, name: str, key_tokens: FloatArray) -> list[Operation]:
    """Keys and values circulate over the context group (ring attention, arXiv:2310.01889).

    Forward an all-gather; backward they are gathered again and their gradients reduced and scattered.
    """
    columns = context.columns
    _, key, value = attention_widths(context.model)
    whole = key_tokens * columns["context"] * ((key + value) * context.activation_bytes) / columns["tensor"]
    return collective(
        context,
        f"{name}.context_parallel",
        "context_parallel",
        context.group("context"),
        forward=[("all_gather", whole)],
        backward=[("all_gather", whole), ("reduce_scatter", whole)],
    )


def embedding_part(context: LoweringContext) -> OperationTable:
    """Token embedding on the first stage: rows are gathered; backward, scattered and added.

    Or, where the compiler has it so, a product with one-hot rows and backward the same for the table's gradient
    (Mesh TensorFlow's ``gather`` is such an einsum).
    """
    tokens = context.tokens("decoder")
    if context.model.architecture == "encoder_decoder" and context.scenario.workload.kind != "decode":
        tokens = tokens + context.tokens("encoder")
    elements = tokens / context.sequence_shard() * context.model.hidden_size
    operations = traffic(context, "embedding", "embedding_head_loss", elements, passes=(2, 3), kernels=(2, 2))
    if context.stack.compiler is not None and context.stack.compiler.embeds_by_product:
        local_vocab = np.ceil(context.model.vocab_size / context.columns["tensor"])
        shape = (tokens, float(context.model.hidden_size), local_vocab)
        product = linear(context, "embedding.product", "embedding_head_loss", shape)
        operations += [row for row in product if row.phase != "activation_gradient"]
    host = HostWork({"rest": EMBEDDING_OPERATIONS})
    return OperationTable("embedding", operations, host, host)


def head_part(context: LoweringContext) -> OperationTable:
    """Output projection over the (padded) vocabulary shard, softmax cross-entropy in fp32.

    A prefill or decode step projects only the last token of each sequence.
    """
    tokens = context.tokens("decoder")
    if not context.is_training:
        tokens = context.columns["micro_batch"] * 1.0
    local_vocab = np.ceil(context.model.vocab_size / context.columns["tensor"])
    shape, precision = (tokens, local_vocab, float(context.model.hidden_size)), unquantised_precision(context)
    operations = linear(context, "head", "embedding_head_loss", shape, precision=precision)
    measured, logits = context.stack.elementwise, tokens * local_vocab
    passes = (3.0, 2.0) if measured is None or measured.loss is None else both_passes(measured.loss)
    losses = traffic(context, "loss", "embedding_head_loss", logits, passes=passes, kernels=(4, 2), element_bytes=4.0)
    operations += losses if measured is None else [widening(row, logits * measured.widening_s) for row in losses]
    host = HostWork({"rest": HEAD_OPERATIONS})
    return OperationTable("head", operations, host, host)


def token_prediction_part(context: LoweringContext) -> OperationTable:
    """Projection and norms of one multi-token-prediction module; its layer and head are priced as those."""
    tokens = context.tokens("decoder")
    hidden = float(context.model.hidden_size)
    columns = context.columns
    operations = linear(
        context, "mtp.projection", "embedding_head_loss", (tokens, hidden / columns["tensor"], 2 * hidden)
    )
    operations += norm_and_residual(context, "mtp.norm", tokens, 1.0)
    host = HostWork({"rest": TOKEN_PREDICTION_OPERATIONS})
    return OperationTable("mtp", operations, host, host)
