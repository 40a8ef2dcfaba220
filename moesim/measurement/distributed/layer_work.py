"""Arithmetic, traffic and memory of a layer of experts and of a step, on the rank that has most to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.measurement.cases import ELEMENT_BYTES, PassName
from moesim.measurement.suites.attentions import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    attention_bytes,
    causal_product_flops,
)
from moesim.measurement.suites.dispatches import INDEX_BYTES, ROW_PASSES
from moesim.measurement.suites.gemms import MASTER_BYTES
from moesim.measurement.suites.optimizer_steps import MASTER_PASSES
from moesim.measurement.suites.routers import router_bytes, router_flops

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from moesim.measurement.distributed.layer_shapes import Draw, ExpertLayerShape
    from moesim.measurement.distributed.training_models import ModelShape

EXCHANGE_PASSES = 8
"""Over the rows of a pass with two exchanges: each reads, writes, and is put into another order."""


@dataclass(frozen=True, slots=True)
class LayerRows:
    """Rows that are sent and computed, slots without a token included where all slots are sent.

    Parameters
    ----------
    sent : ndarray of shape (n_ranks, n_experts)
        From each rank to each expert.
    tokens : int
        Most of any rank.
    """

    sent: npt.NDArray[np.int64]
    tokens: int

    @property
    def received(self) -> npt.NDArray[np.int64]:
        """Rows of each rank's experts, shape (n_ranks,)."""
        return np.asarray(self.sent.sum(axis=0).reshape(len(self.sent), -1).sum(axis=1), dtype=np.int64)

    @property
    def loads(self) -> tuple[int, ...]:
        """Rows of each expert."""
        return tuple(int(rows) for rows in self.sent.sum(axis=0))

    @property
    def fullest(self) -> int:
        """Rank with most rows."""
        return int(self.received.argmax())

    @property
    def num_hit(self) -> int:
        """Experts with rows on the fullest rank."""
        of_rank = self.sent.sum(axis=0).reshape(len(self.sent), -1)[self.fullest]
        return int((of_rank > 0).sum())

    @property
    def off_rank(self) -> int:
        """Rows that the busiest sender or receiver exchanges with other ranks."""
        by_rank = self.sent.reshape(len(self.sent), len(self.sent), -1).sum(axis=2)
        np.fill_diagonal(by_rank, 0)
        return int(max(by_rank.sum(axis=0).max(), by_rank.sum(axis=1).max()))


def layer_rows(shape: ExpertLayerShape, routed: Draw) -> LayerRows:
    """Count the rows of a draw: beyond the slots of an expert they are dropped, and masks send every slot.

    Parameters
    ----------
    shape : ExpertLayerShape
        Sizes.
    routed : Draw
        Assignments.

    Notes
    -----
    Where slots are counted in several groups of a rank's tokens, an expert is taken to fill its slots evenly over them.
    """
    tokens = int(routed.matrix.sum(axis=1).max()) // shape.experts_per_token
    if shape.capacity_factor is None:
        return LayerRows(routed.matrix, tokens)
    slots = shape.num_groups * shape.slots
    if shape.dispatch == "one_hot_einsum":
        return LayerRows(np.full_like(routed.matrix, slots), tokens)
    return LayerRows(np.minimum(routed.matrix, slots), tokens)


def layer_flops(shape: ExpertLayerShape, rows: LayerRows, kind: PassName) -> float:
    """Arithmetic of router, experts and masks on the fullest rank; a backward product has two for each forward one."""
    experts = 2.0 * int(rows.received.max()) * shape.hidden * (shape.up_columns + shape.inner)
    forward = experts + router_flops(rows.tokens, shape.hidden, shape.num_experts)
    masks = 0.0
    if shape.dispatch == "one_hot_einsum":
        masks = 2.0 * (rows.tokens / shape.num_groups) * shape.num_experts * shape.slots * shape.num_groups
        masks *= shape.hidden
    return forward + 2 * masks if kind == "forward" else 2 * forward + 3 * masks


def layer_bytes(shape: ExpertLayerShape, rows: LayerRows, dtype: str, kind: PassName) -> float:
    """Traffic of the kernels of a pass, each input read and each output written once."""
    size, received, sent = ELEMENT_BYTES[dtype], int(rows.received.max()), int(rows.sent.sum(axis=1).max())
    weights = rows.num_hit * shape.hidden * (shape.up_columns + shape.inner)
    products = received * (2 * shape.hidden + shape.up_columns + shape.inner)
    activation = received * (shape.up_columns + shape.inner)
    copied = shape.hidden * sum(
        ROW_PASSES[operation, kind][0] * sent + ROW_PASSES[operation, kind][1] * rows.tokens
        for operation in ("permute", "unpermute")
    )
    if len(rows.sent) > 1:
        copied += EXCHANGE_PASSES * shape.hidden * received
    route = router_bytes(rows.tokens, shape.hidden, shape.num_experts, dtype) + 6 * INDEX_BYTES * sent
    if kind == "forward":
        return float(size * (weights + products + copied + activation) + route)
    of_weights = weights * (size + 2 * MASTER_BYTES)
    return float(of_weights + size * (2 * products + copied + 2 * activation) + 2 * route)


def sent_bytes(shape: ExpertLayerShape, rows: LayerRows, dtype: str) -> float:
    """Bytes of one exchange that the busiest rank sends to, or receives from, the others."""
    return float(rows.off_rank * shape.hidden * ELEMENT_BYTES[dtype])


def step_flops(shape: ModelShape, rows: Sequence[LayerRows]) -> float:
    """Arithmetic of a step on a rank that is the fullest in every block."""
    attention, tokens, hidden = shape.attention, shape.layer.tokens, shape.layer.hidden
    projected = 2 * (attention.heads + attention.kv_heads) * attention.head_size
    blocks = sum(layer_flops(shape.layer, one, kind) for one in rows for kind in ("forward", "backward"))
    per_block = 3 * 2.0 * tokens * hidden * projected
    per_block += (FORWARD_PRODUCTS + BACKWARD_PRODUCTS) * causal_product_flops(attention)
    head = 3 * 2.0 * tokens * hidden * shape.vocabulary
    return shape.micro_batches * (blocks + len(rows) * per_block + head)


def step_bytes(shape: ModelShape, rows: Sequence[LayerRows], dtype: str, num_ranks: int) -> float:
    """Traffic of a step; of the optimizer, eight passes over masters."""
    size, tokens, hidden = ELEMENT_BYTES[dtype], shape.layer.tokens, shape.layer.hidden
    attention = shape.attention
    projected = 2 * (attention.heads + attention.kv_heads) * attention.head_size
    moved = sum(layer_bytes(shape.layer, one, dtype, kind) for one in rows for kind in ("forward", "backward"))
    width = tokens * hidden
    per_block = 3 * attention_bytes(attention, dtype) + size * (3 * (tokens * projected + 2 * width) + 20 * width)
    per_block += hidden * projected * (2 * size + 2 * MASTER_BYTES)
    logits = tokens * shape.vocabulary
    head = 3 * size * (logits + width) + 6 * MASTER_BYTES * logits
    head += shape.vocabulary * hidden * (2 * size + 2 * MASTER_BYTES)
    held = sum(one.padded for one in shape.parameters(num_ranks))
    return float(
        shape.micro_batches * (moved + len(rows) * per_block + head)
        + held * (MASTER_BYTES * (MASTER_PASSES["adam"] + 1) + size)
    )
