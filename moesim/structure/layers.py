"""Kinds of layers in a model and how they are spread over pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from moesim.describe.model import Model
from moesim.structure.chunk_placement import ChunkPlacement, PlacementName, placed_chunks
from moesim.structure.columns import FloatArray

Side = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class LayerKind:
    """Layers that cost the same: the side of the model and the kind of feed-forward network."""

    side: Side
    is_moe: bool
    has_cross_attention: bool

    @property
    def name(self) -> str:
        """Readable name: ``decoder.moe``."""
        return f"{self.side}.{'moe' if self.is_moe else 'dense'}"


@dataclass(frozen=True)
class LayerSequence:
    """All layers of a model in order.

    Attributes
    ----------
    kinds : tuple of LayerKind
        Distinct kinds.
    order : tuple of int
        Kind index of every layer, first to last (encoder before decoder).
    mtp_layers : int
        Multi-token-prediction modules after the last layer.
    """

    kinds: tuple[LayerKind, ...]
    order: tuple[int, ...]
    mtp_layers: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Layers of each kind, multi-token-prediction modules not included."""
        return tuple(self.order.count(index) for index in range(len(self.kinds)))


def layer_sequence(model: Model) -> LayerSequence:
    """Expand the runs of a model."""
    crosses = model.architecture == "encoder_decoder"
    flat = [
        LayerKind("encoder", kind == "moe", False) for run in model.encoder_layers or [] for kind in run.kinds()
    ] + [LayerKind("decoder", kind == "moe", crosses) for run in model.layers for kind in run.kinds()]
    kinds = tuple(dict.fromkeys(flat))
    index = {kind: position for position, kind in enumerate(kinds)}
    return LayerSequence(kinds, tuple(index[kind] for kind in flat), model.mtp_layers)


def even_layers_per_chunk(num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Spread layers as evenly as possible; what is left over goes to the chunks after the first.

    The first chunk has the embedding and the last the head, so the inner ones take the extra layers.

    >>> even_layers_per_chunk(61, 16)
    (3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 3)
    """
    share, extra = divmod(num_layers, num_chunks)
    first_extra = 1 if extra < num_chunks - 1 or num_chunks == 1 else 0
    return tuple(share + (1 if first_extra <= index < first_extra + extra else 0) for index in range(num_chunks))


def layers_per_chunk_before_prediction(num_layers: int, num_chunks: int, mtp_layers: int) -> tuple[int, ...]:
    """Spread layers so that the last chunk has room for token prediction and loss, each counted as a layer.

    Chunks take ceil((layers + modules + 1) / chunks) each and the last what is left; where nothing is left, the first
    takes fewer. These are the layouts of Megatron-Bridge's DeepSeek-V3 recipes: ``Et|(tt|)*30mL`` on 32 chunks, four
    layers on each of 15 chunks and one on the last of 16.

    >>> layers_per_chunk_before_prediction(61, 16, 1)
    (4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1)
    >>> layers_per_chunk_before_prediction(61, 8, 1)
    (8, 8, 8, 8, 8, 8, 8, 5)
    >>> layers_per_chunk_before_prediction(5, 4, 1)
    (1, 2, 2, 0)
    """
    share = -(-(num_layers + mtp_layers + 1) // num_chunks)
    counts = [share] * (num_chunks - 1) + [num_layers - share * (num_chunks - 1)]
    chunk = 0
    while counts[-1] < 0:
        taken = min(counts[chunk], -counts[-1])
        counts[chunk] -= taken
        counts[-1] += taken
        chunk += 1
    return tuple(counts)


@dataclass(frozen=True)
class StagePlan:
    """Layers of each kind in each chunk of the pipeline.

    ``counts[kind, chunk]`` with chunks in model order; ``placed`` says which stage holds which. Embedding belongs to
    the first chunk; head, loss and multi-token prediction to the last.
    """

    stages: int
    virtual_stages: int
    counts: FloatArray
    placement: PlacementName = "loop"

    @property
    def placed(self) -> ChunkPlacement:
        """Chunks on the stages."""
        return placed_chunks(self.placement, self.stages, self.virtual_stages)

    def stage_counts(self) -> FloatArray:
        """Layers of each kind that each stage holds, shape (n_kinds, stages)."""
        return np.asarray(self.counts[:, self.placed.held].sum(axis=2))

    def stage_sums(self, per_chunk: FloatArray) -> FloatArray:
        """Sum what one micro-batch needs of each chunk (chunks, n_cases) over stages: (stages, n_cases).

        With two directions, each takes half of the micro-batches: the mean of both.
        """
        held = self.placed.held
        total = per_chunk[held[:, 0]]
        for local in range(1, held.shape[1]):  # in turn: NumPy's own sum rounds differently by shape
            total = total + per_chunk[held[:, local]]
        return np.asarray(total / self.placed.directions)

    def per_chunk(self, per_stage: FloatArray) -> FloatArray:
        """Spread what a stage needs for the chunks it holds (stages, n_cases) evenly over them: (chunks, n_cases)."""
        shares = per_stage / self.placed.held.shape[1]
        return np.asarray(shares[self.placed.stage_of].mean(axis=0))


@lru_cache(maxsize=1024)
def stage_plan(
    sequence: LayerSequence,
    stages: int,
    virtual_stages: int,
    layers_per_stage: tuple[int, ...] | None = None,
    placement: PlacementName = "loop",
) -> StagePlan:
    """Assign layers to chunks: as ``layers_per_stage`` says (spread evenly over a stage's chunks), or evenly.

    A model with token prediction whose layers do not divide evenly leaves room for it on the last chunk.
    """
    chunks, layers = stages * virtual_stages, len(sequence.order)
    if layers_per_stage is None and sequence.mtp_layers and layers % chunks:
        per_chunk = layers_per_chunk_before_prediction(layers, chunks, sequence.mtp_layers)
    else:
        placed = placed_chunks(placement, stages, virtual_stages)
        per_chunk = _layers_per_chunk(layers, placed, layers_per_stage)
    counts = np.zeros((len(sequence.kinds), stages * virtual_stages))
    position = 0
    for chunk, layers in enumerate(per_chunk):
        for kind in sequence.order[position : position + layers]:
            counts[kind, chunk] += 1
        position += layers
    return StagePlan(stages, virtual_stages, counts, placement)


def _layers_per_chunk(
    num_layers: int, placed: ChunkPlacement, layers_per_stage: Sequence[int] | None
) -> tuple[int, ...]:
    if layers_per_stage is None:
        return even_layers_per_chunk(num_layers, placed.chunks)
    virtual_stages = placed.chunks // len(placed.held)
    shares = [even_layers_per_chunk(layers, virtual_stages) for layers in layers_per_stage]
    return tuple(shares[stage][local] for stage, local in zip(placed.stage_of[0], placed.local_of[0], strict=True))
