"""Parameters of a model by matrix, with how each is sharded: the source of counts, memory and optimizer state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesim.describe.model import LatentAttention, Model, MultiHeadAttention
from moesim.structure.layers import LayerKind, LayerSequence, layer_sequence

Sharding = Literal["tensor", "replicated", "expert"]


@dataclass(frozen=True)
class MatrixGroup:
    """``count`` equal matrices of shape (rows, columns); vectors have one row.

    ``active_fraction`` is the part of the matrices that one token uses.
    """

    name: str
    count: int
    rows: int
    columns: int
    sharding: Sharding
    active_fraction: float = 1.0

    @property
    def size(self) -> int:
        """Parameters in all matrices."""
        return self.count * self.rows * self.columns

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm's vector, which multiplies no matrix."""
        return self.name.endswith("_norm")

    @property
    def factored_size(self) -> int:
        """Row and column sums of a factored second moment (Adafactor, arXiv:1804.04235, section 3)."""
        return self.count * (self.rows + self.columns if self.rows > 1 else self.columns)


def attention_widths(model: Model) -> tuple[int, int, int]:
    """Widths of all heads together: queries, keys, values."""
    attention = model.attention
    if isinstance(attention, LatentAttention):
        key = attention.heads * (attention.head_size + attention.rope_head_size)
        return key, key, attention.heads * attention.value_head_size
    query = attention.heads * attention.head_size
    kv_heads = attention.heads if isinstance(attention, MultiHeadAttention) else attention.kv_heads
    return query, kv_heads * attention.head_size, kv_heads * attention.head_size


def attention_output_width(model: Model) -> int:
    """Width of what the output projection reads: the values of every query head."""
    attention = model.attention
    if isinstance(attention, LatentAttention):
        return attention.heads * attention.value_head_size
    return attention.heads * attention.head_size


def attention_matrices(model: Model) -> list[MatrixGroup]:
    """Projections of one attention block (self- or cross-attention have the same)."""
    hidden, attention = model.hidden_size, model.attention
    query, key, value = attention_widths(model)
    if not isinstance(attention, LatentAttention):
        return [
            MatrixGroup("attention.qkv", 1, hidden, query + key + value, "tensor"),
            MatrixGroup("attention.output", 1, attention_output_width(model), hidden, "tensor"),
        ]
    up_width = attention.heads * (attention.head_size + attention.value_head_size)
    matrices = [
        MatrixGroup("attention.kv_down", 1, hidden, attention.kv_rank + attention.rope_head_size, "replicated"),
        MatrixGroup("attention.kv_norm", 1, 1, attention.kv_rank, "replicated"),
        MatrixGroup("attention.kv_up", 1, attention.kv_rank, up_width, "tensor"),
        MatrixGroup("attention.output", 1, value, hidden, "tensor"),
    ]
    if attention.query_rank is None:
        return [*matrices, MatrixGroup("attention.query", 1, hidden, query, "tensor")]
    return [
        *matrices,
        MatrixGroup("attention.query_down", 1, hidden, attention.query_rank, "replicated"),
        MatrixGroup("attention.query_norm", 1, 1, attention.query_rank, "replicated"),
        MatrixGroup("attention.query_up", 1, attention.query_rank, query, "tensor"),
    ]


def moe_matrices(model: Model) -> list[MatrixGroup]:
    """Experts, shared experts and router of one MoE layer."""
    moe, hidden = model.moe, model.hidden_size
    if moe is None:
        return []
    gate = 2 if moe.is_gated else 1
    active = moe.router.experts_per_token / moe.num_experts
    matrices = [
        MatrixGroup("expert.up", gate * moe.num_experts, hidden, moe.intermediate_size, "expert", active),
        MatrixGroup("expert.down", moe.num_experts, moe.intermediate_size, hidden, "expert", active),
        MatrixGroup("router", 1, hidden, moe.num_experts, "replicated"),
    ]
    shared = shared_width(model)
    if shared:
        matrices += [
            MatrixGroup("shared_expert.up", gate, hidden, shared, "tensor"),
            MatrixGroup("shared_expert.down", 1, shared, hidden, "tensor"),
        ]
    return matrices


def shared_width(model: Model) -> int:
    """Intermediate width of all shared experts together; 0 without any."""
    if model.moe is None:
        return 0
    return model.moe.shared_experts * (model.moe.shared_intermediate_size or model.moe.intermediate_size)


def layer_matrices(model: Model, kind: LayerKind) -> list[MatrixGroup]:
    """All matrices of one layer."""
    hidden = model.hidden_size
    blocks = 2 if kind.has_cross_attention else 1
    matrices = attention_matrices(model) * blocks
    matrices.append(MatrixGroup("norm", blocks + 1, 1, hidden, "replicated"))
    if kind.is_moe:
        return matrices + moe_matrices(model)
    if model.dense_ffn is None:
        return matrices
    width, gate = model.dense_ffn.intermediate_size, 2 if model.dense_ffn.is_gated else 1
    return [
        *matrices,
        MatrixGroup("dense_ffn.up", gate, hidden, width, "tensor"),
        MatrixGroup("dense_ffn.down", 1, width, hidden, "tensor"),
    ]


def embedding_matrices(model: Model) -> list[MatrixGroup]:
    """Token embedding on the first stage."""
    return [MatrixGroup("embedding", 1, model.vocab_size, model.hidden_size, "tensor")]


def head_matrices(model: Model) -> list[MatrixGroup]:
    """Final norm and output head on the last stage; a tied head has no parameters of its own."""
    norm = [MatrixGroup("final_norm", 1, 1, model.hidden_size, "replicated")]
    if model.tied_embeddings:
        return norm
    return [*norm, MatrixGroup("head", 1, model.vocab_size, model.hidden_size, "tensor")]


def mtp_matrices(model: Model, kind: LayerKind) -> list[MatrixGroup]:
    """One multi-token-prediction module: two norms, a projection of two hidden vectors to one, and a layer."""
    hidden = model.hidden_size
    return [
        MatrixGroup("mtp.norm", 2, 1, hidden, "replicated"),
        MatrixGroup("mtp.projection", 1, 2 * hidden, hidden, "tensor"),
        *layer_matrices(model, kind),
    ]


def mtp_layer_kind(sequence: LayerSequence) -> LayerKind:
    """Kind of layer inside a multi-token-prediction module: that of the model's last layer."""
    return sequence.kinds[sequence.order[-1]]


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the model without multi-token-prediction modules, and of those modules."""

    total: int
    active: int
    expert: int
    mtp: int


def count_parameters(model: Model) -> ParameterCounts:
    """Count every matrix of a model.

    ``active`` counts what one token uses: its ``experts_per_token`` experts, all else whole, embedding and head
    included.
    """
    sequence = layer_sequence(model)
    groups = embedding_matrices(model) + head_matrices(model)
    for kind, count in zip(sequence.kinds, sequence.counts, strict=True):
        groups += layer_matrices(model, kind) * count
    mtp = sum(group.size for group in mtp_matrices(model, mtp_layer_kind(sequence))) * model.mtp_layers
    return ParameterCounts(
        total=sum(group.size for group in groups),
        active=round(sum(group.size * group.active_fraction for group in groups)),
        expert=sum(group.size for group in groups if group.sharding == "expert"),
        mtp=mtp,
    )


@dataclass(frozen=True)
class ShardedSizes:
    """Parameters by sharding, their factored second moments, and tensors: plain numbers for one layer or extra."""

    tensor: float
    replicated: float
    expert: float
    tensor_factored: float
    replicated_factored: float
    expert_factored: float
    tensors: float
    expert_tensors: float


def sharded_sizes(groups: list[MatrixGroup]) -> ShardedSizes:
    """Sum matrix groups by sharding."""

    def total(sharding: Sharding, attribute: str) -> float:
        return float(sum(getattr(group, attribute) for group in groups if group.sharding == sharding))

    return ShardedSizes(
        total("tensor", "size"),
        total("replicated", "size"),
        total("expert", "size"),
        total("tensor", "factored_size"),
        total("replicated", "factored_size"),
        total("expert", "factored_size"),
        total("tensor", "count") + total("replicated", "count"),
        total("expert", "count"),
    )
