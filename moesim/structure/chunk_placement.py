"""Which stage holds which chunk of the model, and which micro-batches it runs there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

PlacementName = Literal["loop", "fold", "both_ways"]

FOLDED_SCHEDULES: tuple[str, ...] = ("zb_v", "v_half", "v_min", "dualpipe_v")
"""Schedules of two chunks per stage that lie on the stages like a V."""


@dataclass(frozen=True)
class ChunkPlacement:
    """Chunks of the model on the stages of a pipeline.

    Attributes
    ----------
    chunks : int
        Chunks the model is cut into.
    held : ndarray of shape (stages, chunks_of_stage)
        Chunk, in model order, that a stage holds as its first, second, ... one.
    stage_of : ndarray of shape (directions, chunks)
        Stage that runs a chunk for the micro-batches of a direction.
    local_of : ndarray of shape (directions, chunks)
        Which of that stage's chunks it is.
    """

    chunks: int
    held: npt.NDArray[np.int64]
    stage_of: npt.NDArray[np.int64]
    local_of: npt.NDArray[np.int64]

    @property
    def directions(self) -> int:
        """Ways in which micro-batches pass the stages: copies of the model that a pipeline holds."""
        return len(self.stage_of)

    @property
    def transfers(self) -> int:
        """Boundaries between chunks of different stages that one micro-batch crosses forwards."""
        return int(np.count_nonzero(np.diff(self.stage_of[0])))

    def stages_of(self, chunk: int) -> list[int]:
        """Stages that hold a chunk; negative numbers count from the end."""
        return sorted({int(stage) for stage in self.stage_of[:, chunk]})

    def direction(self, micro_batch: int, micro_batches: int) -> int:
        """Direction of a micro-batch: the first half of a step goes down the stages, the second half up."""
        return micro_batch * self.directions // micro_batches


def placement_name(schedule: str) -> PlacementName:
    """Placement that a schedule asks for."""
    if schedule == "dualpipe":
        return "both_ways"
    return "fold" if schedule in FOLDED_SCHEDULES else "loop"


def chunk_placement(schedule: str, stages: int, virtual_stages: int) -> ChunkPlacement:
    """Place the chunks of a schedule.

    Loop: chunk c is on stage c modulo p. Fold (ZB-V, V-Half, V-Min, DualPipeV): stage s holds chunks s and 2p - 1 - s,
    so that the first stage has both ends of the model. Both ways (DualPipe): stage s holds chunk s for the first half
    of a step's micro-batches, and chunk p - 1 - s for the second half, which enter at the last stage.

    Raises
    ------
    ValueError
        If the schedule does not take so many chunks per stage: two where it folds, one where it neither folds nor
        interleaves.

    Examples
    --------
    >>> chunk_placement("zb_v", 3, 2).held.tolist()
    [[0, 5], [1, 4], [2, 3]]
    >>> chunk_placement("dualpipe", 4, 1).held.tolist()
    [[0, 3], [1, 2], [2, 1], [3, 0]]
    """
    if virtual_stages != 1 and schedule not in (*FOLDED_SCHEDULES, "interleaved_one_f_one_b"):
        raise ValueError(f"schedule {schedule} takes one chunk per stage, not {virtual_stages}")
    return placed_chunks(placement_name(schedule), stages, virtual_stages)


@lru_cache(maxsize=256)
def placed_chunks(placement: PlacementName, stages: int, virtual_stages: int) -> ChunkPlacement:
    """Chunks of a placement by name; raises as ``chunk_placement``."""
    if placement == "fold" and virtual_stages != 2:
        raise ValueError(f"a V takes two chunks per stage, not {virtual_stages}")
    down = np.arange(stages)
    if placement == "both_ways":
        held = np.stack([down, down[::-1]], axis=1)
        stage_of = np.stack([down, down[::-1]])
        return ChunkPlacement(stages, held, stage_of, np.repeat([[0], [1]], stages, axis=1))
    rows = [local * stages + (down[::-1] if placement == "fold" and local else down) for local in range(virtual_stages)]
    held = np.stack(rows, axis=1)
    chunks = stages * virtual_stages
    stage_of, local_of = np.empty((1, chunks), dtype=np.int64), np.empty((1, chunks), dtype=np.int64)
    stage_of[0, held] = down[:, None]
    local_of[0, held] = np.arange(virtual_stages)[None, :]
    return ChunkPlacement(chunks, held, stage_of, local_of)
