"""Bytes on recorded ranks over time: states and buffers stay, activations live from a forward to its last backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.engine.analytical import PlanEvaluation, System
from moesim.engine.drawn_loads import DrawnLoads
from moesim.engine.step_passes import PreparedStep
from moesim.engine.timelines import STREAMS, Timeline
from moesim.structure.columns import Columns, FloatArray, IntArray
from moesim.structure.layers import layer_sequence
from moesim.structure.loaded_memory import loaded_bytes
from moesim.structure.lowering import LoweringContext
from moesim.structure.memory_footprint import CATEGORIES, chunk_activations

STATES: tuple[str, ...] = ("weights", "gradients", "optimizer")
ITEM_STREAMS = tuple(STREAMS.index(name) for name in STREAMS if name not in ("data_parallel", "pipeline_p2p", "pcie"))
"""Streams whose operations belong to a chunk's pass itself, not to what comes before or after it."""
SIMULTANEOUS = 1e-10
"""Share of a step below which what is released counts as gone before what begins."""


@dataclass(frozen=True)
class MemoryContents:
    """What one rank has in memory, bytes.

    ``states`` by category and ``buffers`` stay, and so does ``constant``: activations of inference, which no
    micro-batch adds to. ``kept`` (chunks of the model,), ``loss`` and ``rebuilt`` are those of ``ChunkActivations``.
    ``fixed`` and the fraction give the category "other".
    """

    states: Mapping[str, float]
    buffers: float
    kept: FloatArray
    loss: float
    rebuilt: float
    constant: float
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


def stage_contents(system: System, columns: Columns, evaluation: PlanEvaluation) -> tuple[MemoryContents, ...]:
    """What a rank of each stage has in memory, at the load that the analytical engine assumes.

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
    context = LoweringContext(system.scenario, system.stack, columns.take(np.zeros(1, dtype=np.int64)))
    activations = chunk_activations(context, layer_sequence(system.scenario.model), evaluation.plan, system.load_factor)
    is_training = system.scenario.workload.kind == "training"
    return tuple(
        MemoryContents(
            states={name: float(getattr(memory.states, name)[stage, of_state]) for name in STATES},
            buffers=float(memory.work.buffers[stage, of_work]),
            kept=activations.kept[:, 0] * is_training,
            loss=float(activations.loss[0]) * is_training,
            rebuilt=float(activations.rebuilt[0]) * is_training,
            constant=float(memory.work.activations[stage, of_work]) * (not is_training),
            fixed=memory.fixed,
            fragmentation_fraction=memory.fragmentation_fraction,
        )
        for stage in range(evaluation.plan.stages)
    )


def loaded_contents(step: PreparedStep, loads: DrawnLoads, ranks: Sequence[int]) -> dict[int, MemoryContents]:
    """What ranks have in memory at the loads of a first draw.

    Parameters
    ----------
    step : PreparedStep
        At mean load.
    loads : DrawnLoads
        Of its layers.
    ranks : sequence of int
        Global ranks.
    """
    of_stage = stage_contents(step.system, step.columns, step.evaluation)
    stages, places = (part.tolist() for part in step.ranks.place(ranks))
    return {
        rank: of_stage[stage] if not loads.kinds else _loaded(step, loads, of_stage[stage], stage, place)
        for rank, stage, place in zip(ranks, stages, places, strict=True)
    }


def _loaded(step: PreparedStep, loads: DrawnLoads, contents: MemoryContents, stage: int, place: int) -> MemoryContents:
    """Contents of the rank at a place in its stage."""
    context = LoweringContext(step.system.scenario, step.system.stack, step.columns)
    order = step.sequence.order

    def added(layers: Sequence[tuple[int, FloatArray]], in_flight: float, modules: float) -> tuple[float, float]:
        found = loaded_bytes(context, step.sequence, layers, in_flight, modules)
        return float(found.activations[0, 0]), float(found.buffers[0, 0])

    kept, loss = contents.kept.copy(), contents.loss
    every: list[tuple[int, FloatArray]] = []
    for chunk in step.evaluation.plan.placed.held[stage].tolist():
        direction, held = step.direction(stage, chunk), step.chunks[chunk]
        numbers = [layer.number for layer in held.layers]
        if held.is_last and step.is_training:
            numbers += [len(order) + module for module in range(step.sequence.mtp_layers)]
        layers = []
        for number in numbers:
            factor = loads.rows_factor(number, direction)[:1]
            layers.append((number, factor[:, place : place + 1] if factor.shape[1] > 1 else factor))
        rebuilt = added(layers, 0.0, 0.0)[0]
        kept[chunk] += added(layers, 1.0, 0.0)[0] - rebuilt
        loss += added(layers, 0.0, 1.0)[0] - rebuilt
        every += layers
    rebuilt, buffers = added(every, 0.0, 0.0)
    constant = contents.constant + rebuilt * (not step.is_training)
    return replace(
        contents,
        buffers=contents.buffers + buffers,
        kept=kept * step.is_training,
        loss=loss * step.is_training,
        rebuilt=contents.rebuilt + rebuilt * step.is_training,
        constant=constant,
    )


def memory_timeline(timeline: Timeline, contents: Mapping[int, MemoryContents]) -> MemoryTimeline:
    """Follow the activations of some ranks.

    Parameters
    ----------
    timeline : Timeline
        What ran when.
    contents : mapping of int to MemoryContents
        Bytes of each rank to follow, whether it has operations or not.

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
    columns: dict[str, list[FloatArray]] = {name: [] for name in ("time_s", "rank", *CATEGORIES)}
    for rank in sorted(contents):
        own = contents[rank]
        time_s, held = _changes(timeline, own, rank)
        constants = {**own.states, "buffers": own.buffers}
        activations = own.constant + held
        allocated = activations + sum(constants.values())
        parts = {
            **{name: np.full(len(held), value) for name, value in constants.items()},
            "activations": activations,
            "other": own.fixed + allocated * own.fragmentation_fraction,
            "time_s": time_s,
            "rank": np.full(len(held), float(rank)),
        }
        for name, part in parts.items():
            columns[name].append(part)
    joined = {name: np.concatenate([np.zeros(0), *parts]) for name, parts in columns.items()}
    ranks = joined["rank"].astype(np.int64)
    return MemoryTimeline(ranks, joined["time_s"], {name: joined[name] for name in CATEGORIES})


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
