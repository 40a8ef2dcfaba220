"""The model: transformer layers, attention kinds, feed-forward networks, experts and their router."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moesim.describe.quantities import Count, Description, Flag, NonNegativeCount, PositiveNumber, Precision

MAX_LAYERS = 10_000
MAX_MTP_LAYERS = 64
MAX_EXPERTS = 2_000_000
"""Beyond these a file is a mistake, and its expansion would exhaust memory."""


class MultiHeadAttention(Description):
    """Every head has its own keys and values."""

    kind: Literal["multi_head"]
    heads: Count
    head_size: Count


class GroupedQueryAttention(Description):
    """``heads`` query heads share ``kv_heads`` key and value heads."""

    kind: Literal["grouped_query"]
    heads: Count
    kv_heads: Count
    head_size: Count


class LatentAttention(Description):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): low-rank queries, keys and values.

    ``query_rank`` null means queries are projected directly; ``head_size`` is the part without rotary embedding.
    """

    kind: Literal["latent"]
    heads: Count
    query_rank: Count | None = None
    kv_rank: Count
    head_size: Count
    rope_head_size: Count
    value_head_size: Count


Attention = Annotated[MultiHeadAttention | GroupedQueryAttention | LatentAttention, Field(discriminator="kind")]


class FeedForward(Description):
    """A dense feed-forward network: two matrices, or three when gated."""

    intermediate_size: Count
    is_gated: Flag = False


class UniformLoad(Description):
    """Every expert gets the same number of tokens."""

    kind: Literal["uniform"]


class MaxOverMeanLoad(Description):
    """The most loaded expert rank gets ``value`` times the mean."""

    kind: Literal["max_over_mean"]
    value: Annotated[float, Field(ge=1, allow_inf_nan=False, strict=True)]


class PowerLawLoad(Description):
    """Expert i (from 1) has popularity i**-exponent; experts are placed in a fixed random order."""

    kind: Literal["power_law"]
    exponent: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False, strict=True)]


class DirichletLoad(Description):
    """Expert popularity drawn from a symmetric Dirichlet distribution."""

    kind: Literal["dirichlet"]
    concentration: PositiveNumber


class HistogramLoad(Description):
    """Measured tokens per expert, in expert order; its length is the number of experts."""

    kind: Literal["histogram"]
    loads: Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]], Field(min_length=1)]


class PresetLoad(Description):
    """One of the pinned routing presets W0..W7."""

    kind: Literal["preset"]
    name: Literal["W0", "W1", "W2", "W3", "W4", "W5", "W6", "W7"]


Imbalance = Annotated[
    UniformLoad | MaxOverMeanLoad | PowerLawLoad | DirichletLoad | HistogramLoad | PresetLoad,
    Field(discriminator="kind"),
]


class Router(Description):
    """How tokens choose experts, and how many slots an expert offers.

    ``top_k``: each token takes its ``experts_per_token`` best experts. ``k_top_1``: experts are split into
    ``experts_per_token`` prototypes, each token takes the best expert of every prototype (M6-T, arXiv:2105.15082).
    ``max_nodes_per_token`` limits the nodes a token may visit (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    """

    kind: Literal["top_k", "k_top_1"]
    experts_per_token: Count
    capacity_factor: PositiveNumber | None = None
    capacity_per: Literal["token", "assignment"] = "assignment"
    group_tokens: Count | None = None
    max_nodes_per_token: Count | None = None
    precision: Precision = "fp32"
    imbalance: Imbalance = UniformLoad(kind="uniform")


class MixtureOfExperts(Description):
    """The experts of one MoE layer; every MoE layer of the model has the same."""

    num_experts: Annotated[int, Field(gt=0, le=MAX_EXPERTS, strict=True)]
    intermediate_size: Count
    is_gated: Flag = False
    shared_experts: NonNegativeCount = 0
    shared_intermediate_size: Count | None = None
    router: Router


FeedForwardKind = Literal["dense", "moe"]


class LayerRun(Description):
    """``count`` consecutive layers; a list of ``ffn`` kinds is cycled through them: [dense, moe, dense, ...]."""

    count: Annotated[int, Field(gt=0, le=MAX_LAYERS, strict=True)]
    attention: Literal["default"] = "default"
    ffn: FeedForwardKind | Annotated[list[FeedForwardKind], Field(min_length=1, max_length=64)]

    def kinds(self) -> tuple[FeedForwardKind, ...]:
        """Feed-forward kind of every layer of the run, in order."""
        cycle: list[FeedForwardKind] = self.ffn if isinstance(self.ffn, list) else [self.ffn]
        return tuple(cycle[index % len(cycle)] for index in range(self.count))


class Model(Description):
    """A transformer: embeddings, layers in order, head.

    ``encoder_layers`` belong to ``encoder_decoder`` models, whose ``layers`` are the decoder and have cross-attention.
    ``mtp_layers`` are multi-token-prediction modules (DeepSeek-V3, arXiv:2412.19437, section 2.2) after the last layer;
    their parameters are reported apart from the model's.
    """

    architecture: Literal["decoder_only", "encoder_decoder"]
    hidden_size: Count
    vocab_size: Count
    tied_embeddings: Flag = True
    attention: Attention
    dense_ffn: FeedForward | None = None
    moe: MixtureOfExperts | None = None
    encoder_layers: Annotated[list[LayerRun], Field(min_length=1)] | None = None
    layers: Annotated[list[LayerRun], Field(min_length=1)]
    mtp_layers: Annotated[int, Field(ge=0, le=MAX_MTP_LAYERS, strict=True)] = 0
