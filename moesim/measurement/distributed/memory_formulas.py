"""Bytes that a step of training holds: state, what forward keeps for backward, and what comes on top at the peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES
from moesim.measurement.suites.gemms import MASTER_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesim.measurement.distributed.layer_work import LayerRows
    from moesim.measurement.distributed.training_models import ModelShape

INDEX_BYTES = 8
STATISTIC_BYTES = 4
MOMENTS = 2


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """Bytes of a rank.

    Parameters
    ----------
    state : float
        Weights, fp32 gradients, masters and moments.
    kept : float
        What the forward pass keeps for the backward pass, at its end.
    peak : float
        The most at any moment of a step.
    """

    state: float
    kept: float
    peak: float


def held_bytes(
    shape: ModelShape, rows: Sequence[LayerRows], dtype: str, num_ranks: int, *, fuses_norm: bool = True
) -> HeldBytes:
    """Count what a step holds on the fullest rank.

    Parameters
    ----------
    shape : ModelShape
        Sizes.
    rows : sequence of LayerRows
        Of each block.
    dtype : str
        Of weights and activations.
    num_ranks : int
        Of the expert-parallel group.
    fuses_norm : bool
        Whether a norm keeps its input and one number of each row; without a kernel of its own it keeps its input and
        its result in fp32.

    Notes
    -----
    The peak is the larger of two moments of the backward pass: the head's, with scores of all words in fp32 three times
    (log-softmax, its gradient, the gradient of the loss), and the last block's, when the gradient of its experts' first
    product is complete in the precision of the weights before it is added to the fp32 sum.
    """
    state = _state_bytes(shape, dtype, num_ranks)
    blocks = [block_kept_bytes(shape, one, dtype) for one in rows]
    head = head_kept_bytes(shape, dtype)
    if not fuses_norm:
        blocks = [one + 2 * _plain_norm_bytes(shape, dtype) for one in blocks]
        head += _plain_norm_bytes(shape, dtype)
    scores = float(shape.layer.tokens * shape.vocabulary * MASTER_BYTES)
    at_head = sum(blocks) + head + 2 * scores
    at_block = sum(blocks) + _experts_work_bytes(shape, rows[-1], dtype, num_ranks)
    return HeldBytes(state, sum(blocks) + head, state + max(at_head, at_block))


def _plain_norm_bytes(shape: ModelShape, dtype: str) -> float:
    """What a norm of several kernels keeps beyond one of a single kernel."""
    elements, size = shape.layer.tokens * shape.layer.hidden, ELEMENT_BYTES[dtype]
    return float(elements * MASTER_BYTES if size == MASTER_BYTES else elements * (2 * MASTER_BYTES - size))


def _state_bytes(shape: ModelShape, dtype: str, num_ranks: int) -> float:
    total = 0.0
    for one in shape.parameters(num_ranks):
        size = MASTER_BYTES if one.is_full_precision else ELEMENT_BYTES[dtype]
        master = 0 if size == MASTER_BYTES else MASTER_BYTES
        total += one.padded * (size + master + MASTER_BYTES * (1 + MOMENTS))
    return total


def block_kept_bytes(shape: ModelShape, rows: LayerRows, dtype: str) -> float:
    """Activations that one block keeps for its backward pass.

    Parameters
    ----------
    shape : ModelShape
        Sizes.
    rows : LayerRows
        Of the block.
    dtype : str
        Of activations.

    Notes
    -----
    Inputs of both norms, the input of the projection of queries, keys and values, these, the output of attention and
    its log-sum-exp; the router's input in fp32, its probabilities; rows in expert order, both halves of a gated
    up-projection, its activation, the product, the experts' output; indices.
    """
    layer, attention = shape.layer, shape.attention
    size, tokens, hidden = ELEMENT_BYTES[dtype], layer.tokens, layer.hidden
    sent, received = int(rows.sent.sum(axis=1).max()), int(rows.received.max())
    heads = 2 * (attention.heads + attention.kv_heads) * attention.head_size
    outside = size * tokens * (3 * hidden + heads)
    outside += STATISTIC_BYTES * tokens * (attention.heads + 2)
    router = tokens * (MASTER_BYTES * hidden + MASTER_BYTES * layer.num_experts)
    chosen = layer.experts_per_token * tokens
    router += chosen * (2 * INDEX_BYTES + size)
    activation = layer.inner * (4 if layer.is_gated else 2)
    experts = size * received * (hidden + activation) + size * sent * hidden + 2 * INDEX_BYTES * sent
    if len(rows.sent) > 1:
        experts += 2 * INDEX_BYTES * received
    if layer.dispatch == "one_hot_einsum":
        masks = tokens * layer.num_experts * layer.slots
        experts += size * 2 * masks
    return float(outside + router + experts)


def head_kept_bytes(shape: ModelShape, dtype: str) -> float:
    """Activations that the last norm, the head and the loss keep."""
    layer, size = shape.layer, ELEMENT_BYTES[dtype]
    scores = layer.tokens * shape.vocabulary * MASTER_BYTES
    return float(2 * size * layer.tokens * layer.hidden + STATISTIC_BYTES * layer.tokens + scores)


def _experts_work_bytes(shape: ModelShape, rows: LayerRows, dtype: str, num_ranks: int) -> float:
    """What is made on the way through the experts: gradients of rows and of the larger weight."""
    layer, size, received = shape.layer, ELEMENT_BYTES[dtype], int(rows.received.max())
    weight = layer.num_experts // num_ranks * layer.up_columns * layer.hidden
    of_rows = received * (layer.up_columns + layer.inner) + layer.tokens * layer.hidden
    return float(size * (weight + of_rows))
