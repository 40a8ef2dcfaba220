"""Bytes on recorded ranks over time: states and buffers stay, activations live from a forward to its last backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.engine.analytical import PlanEvaluation, System
from moesim.engine.timelines import STREAMS, Timeline
from moesim.structure.columns import Columns, FloatArray, IntArray
from moesim.structure.layers import layer_sequence
from moesim.structure.lowering import LoweringContext
from moesim.structure.memory_footprint import CATEGORIES, chunk_activations

ITEM_STREAMS = tuple(STREAMS.index(name) for name in STREAMS if name not in ("data_parallel", "pipeline_p2p", "pcie"))
"""Streams whose operations belong to a chunk's pass itself, not to what comes before or after it."""
SIMULTANEOUS = 1e-10
"""Share of a step below which what is released counts as gone before what begins."""


@dataclass(frozen=True)
class MemoryContents:
    """What one scenario puts into memory, bytes.

    ``states`` by category and ``buffers`` are of shape (stages,) and stay; ``kept`` (chunks,), ``loss`` and ``rebuilt``
    are those of ``ChunkActivations``; ``constant`` (stages,) are activations of inference, which no micro-batch adds
    to. ``fixed`` and the fraction give the category "other".
    """

    states: Mapping[str, FloatArray]
    buffers: FloatArray
    kept: FloatArray
    loss: float
    rebuilt: float
    constant: FloatArray
    fixed: float
    fragmentation_fraction: float


@dataclass(frozen=True)
class MemoryTimeline:
    """Bytes on recorded ranks, arrays (n_points,) sorted by (rank, time); each holds until the rank's next point.

    ``parts`` has the categories of the memory model, which sum to ``total``.
    """

    rank: IntArray
    time_s: FloatArray
    parts: Mapping[str, FloatArray]

    def __len__(self) -> int:
        return len(self.rank)

    @property
    def total(self) -> FloatArray:
        """Bytes in all."""
        return np.asarray(sum(self.parts.values(), np.zeros(len(self))))

    def of_rank(self, rank: int) -> MemoryTimeline:
        """Points of one rank."""
        own = self.rank == rank
        return MemoryTimeline(self.rank[own], self.time_s[own], {name: part[own] for name, part in self.parts.items()})

    def peaks(self) -> dict[int, float]:
        """Most bytes on each recorded rank."""
        total = self.total
        return {int(rank): float(total[self.rank == rank].max()) for rank in np.unique(self.rank)}


def memory_contents(system: System, columns: Columns, evaluation: PlanEvaluation) -> MemoryContents:
    """What the scenario of a table of one row puts into memory.

    Parameters
    ----------
    system : System
        Scenario and profiles.
    columns : Columns
        Its one row.
    evaluation : PlanEvaluation
        What the analytical engine made of it: states, buffers and the fragmentation are its memory model's.
    """
    memory = evaluation.memory
    of_state, of_work = int(memory.state_case[0]), int(memory.work_case[0])
    states = {name: getattr(memory.states, name)[:, of_state] for name in ("weights", "gradients", "optimizer")}
    context = LoweringContext(system.scenario, system.stack, columns.take(np.zeros(1, dtype=np.int64)))
    activations = chunk_activations(context, layer_sequence(system.scenario.model), evaluation.plan, system.load_factor)
    is_training = system.scenario.workload.kind == "training"
    return MemoryContents(
        states=states,
        buffers=memory.work.buffers[:, of_work],
        kept=activations.kept[:, 0] * is_training,
        loss=float(activations.loss[0]) * is_training,
        rebuilt=float(activations.rebuilt[0]) * is_training,
        constant=memory.work.activations[:, of_work] * (not is_training),
        fixed=memory.fixed,
        fragmentation_fraction=memory.fragmentation_fraction,
    )


def memory_timeline(timeline: Timeline, contents: MemoryContents, stage_of_rank: Mapping[int, int]) -> MemoryTimeline:
    """Follow the activations of every recorded rank.

    Parameters
    ----------
    timeline : Timeline
        What ran when.
    contents : MemoryContents
        Bytes of the scenario.
    stage_of_rank : mapping
        Pipeline stage of each rank to follow, whether it has operations or not.

    Returns
    -------
    MemoryTimeline
        A first point at time 0, then one where a pass begins or ends.

    Notes
    -----
    A chunk's activations of a micro-batch are counted from the start of its forward pass to the end of its last
    gradient: where a schedule splits the backward pass, that of the weights. Logits go with the gradient of the
    activations. Where a pass begins as another ends, the end comes first. Fragmentation grows and shrinks with what is
    allocated.
    """
    ranks = np.array(sorted(stage_of_rank), dtype=np.int64)
    changes = [_changes(timeline, contents, int(rank)) for rank in ranks]
    rank = np.concatenate([np.full(len(time_s), r) for r, (time_s, _) in zip(ranks, changes, strict=True)])
    stage = np.array([stage_of_rank[int(r)] for r in ranks], dtype=np.int64)[np.searchsorted(ranks, rank)]
    parts = {name: part[stage] for name, part in contents.states.items()}
    parts["activations"] = contents.constant[stage] + np.concatenate([held for _, held in changes])
    parts["buffers"] = contents.buffers[stage]
    allocated = np.sum(list(parts.values()), axis=0)
    parts["other"] = contents.fixed + allocated * contents.fragmentation_fraction
    ordered = {name: np.asarray(parts[name]) for name in CATEGORIES}
    return MemoryTimeline(rank, np.concatenate([time_s for time_s, _ in changes]), ordered)


def _changes(timeline: Timeline, contents: MemoryContents, rank: int) -> tuple[FloatArray, FloatArray]:
    """Times (n_points,) at which the activations of a rank change, and their bytes from then on."""
    own = (timeline.rank == rank) & (timeline.micro_batch >= 0) & (timeline.chunk >= 0)
    own &= np.isin(timeline.stream, ITEM_STREAMS)
    is_forward = own & (timeline.phase == 0)
    is_backward = own & ((timeline.phase == 1) | (timeline.phase == 2))
    forward, backward = _passes(timeline, is_forward), _passes(timeline, is_backward)
    gradient = _passes(timeline, is_backward & (timeline.phase == 1))
    last = len(contents.kept) - 1
    loss, rebuilt = contents.loss * (gradient.chunk == last), np.full(len(gradient.chunk), contents.rebuilt)
    times = [np.zeros(1), forward.begin_s, backward.end_s, gradient.begin_s, gradient.end_s]
    begun = contents.kept[forward.chunk] + contents.loss * (forward.chunk == last)
    amounts = [np.zeros(1), begun, -contents.kept[backward.chunk], rebuilt, -rebuilt - loss]
    time_s, amount = np.concatenate(times), np.concatenate(amounts)
    is_change = amount != 0
    is_change[0] = True
    time_s, amount = time_s[is_change], amount[is_change]
    early = SIMULTANEOUS * timeline.end
    order = np.lexsort((amount, time_s - early * (amount < 0)))
    return np.maximum.accumulate(time_s[order]), np.maximum(np.cumsum(amount[order]), 0.0)


class _Passes(NamedTuple):
    """Passes of micro-batches through chunks, arrays (n_passes,)."""

    begin_s: FloatArray
    end_s: FloatArray
    chunk: IntArray


def _passes(timeline: Timeline, chosen: npt.NDArray[np.bool_]) -> _Passes:
    """First start and last end of each (chunk, micro-batch) among the chosen operations."""
    events = np.flatnonzero(chosen)
    key = timeline.chunk[events].astype(np.int64) << 32 | timeline.micro_batch[events]
    passes, inverse = np.unique(key, return_inverse=True)
    begin_s, end_s = np.full(len(passes), np.inf), np.full(len(passes), -np.inf)
    np.minimum.at(begin_s, inverse, timeline.start_s[events])
    np.maximum.at(end_s, inverse, timeline.end_s[events])
    return _Passes(begin_s, end_s, passes >> 32)
