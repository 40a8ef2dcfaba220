"""The timeline of some ranks: passes unfolded, operation by operation, all micro-batches of a pass at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moesim.cost.layer_times import COMMUNICATION_STREAMS
from moesim.engine.rank_max_plus import (
    Groups,
    NodeTimes,
    PassKey,
    group_maximum,
    imbalance_category,
    largest_of_gradient_groups,
    zero_parts_s,
)
from moesim.engine.step_ends import StepEndTimes
from moesim.engine.step_passes import PreparedStep
from moesim.engine.stream_times import BlockPass, ChunkPass, Scope, Stretch, TimedOperation
from moesim.engine.timelines import EVENT_TYPES, STREAMS, TIMELINE_PHASES, Messages, Timeline
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.pipeline_orders import FORWARD
from moesim.structure.step_graph import CATEGORIES

STEP_END = TIMELINE_PHASES.index("step_end")
WEIGHT_GRADIENT_PHASE = TIMELINE_PHASES.index("weight_gradient")


@dataclass(frozen=True)
class StepRecord:
    """What a timeline is read from: a step, its passes, when they ran and how the step ended; ``late_s`` of hosts."""

    step: PreparedStep
    passes: Mapping[PassKey, ChunkPass]
    times: NodeTimes
    groups: Groups
    end: StepEndTimes
    late_s: Callable[[int], FloatArray | None]


def recorded_timeline(record: StepRecord, ranks: Sequence[int]) -> Timeline:
    """Timeline of some global ranks in the first draw.

    Raises
    ------
    ValueError
        If there is no such rank.
    """
    asked = np.unique(np.asarray(ranks, dtype=np.int64))
    wrong = asked[(asked < 0) | (asked >= record.step.ranks.stages * record.step.ranks.count)]
    if len(wrong):
        raise ValueError(f"no rank {wrong[0]}: ranks are 0 to {record.step.ranks.stages * record.step.ranks.count - 1}")
    events = EventList()
    stage_of, place = record.step.ranks.place(asked)
    for stage in np.unique(stage_of):
        here = stage_of == stage
        seen = Seen(asked[here], place[here] if record.groups else np.zeros(here.sum(), dtype=np.int64))
        for key in record.passes:
            if key[0] == stage:
                PassRecorder(record, key, seen, events).run()
        _record_step_end(record, int(stage), seen, events)
        _record_transfers(record, int(stage), seen, events)
    return events.timeline(_messages(record, asked, stage_of, place))


@dataclass(frozen=True)
class Seen:
    """Recorded ranks of a stage: global numbers, and the columns they are simulated in."""

    ranks: IntArray
    columns: IntArray

    def of(self, values: FloatArray) -> FloatArray:
        """Columns of values (..., 1 or n_ranks): (..., n_seen)."""
        if values.shape[-1] == 1:
            return np.broadcast_to(values, (*values.shape[:-1], len(self.columns)))
        return values[..., self.columns]


@dataclass(frozen=True)
class Place:
    """What events have in common: layer, chunk and phase, and the micro-batches (n_items,) they belong to."""

    layer: int = -1
    chunk: int = -1
    phase: int = STEP_END
    micro_batch: IntArray = field(default_factory=lambda: np.full(1, -1))


class EventList:
    """Events as they are found; blocks of (n_items, n_seen)."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.parts: dict[str, list[npt.NDArray[np.generic]]] = {name: [] for name in EVENT_TYPES}

    def add(
        self,
        seen: Seen,
        place: Place,
        what: tuple[str, str, str],
        start_s: FloatArray,
        end_s: FloatArray,
        num_bytes: FloatArray | float = 0.0,
    ) -> None:
        """Add events named ``what`` = (name, category, stream) where they take time; arrays (n_items, n_seen)."""
        start_s, end_s, num_bytes = np.broadcast_arrays(start_s, end_s, num_bytes)
        takes_time = end_s > start_s
        if not takes_time.any():
            return
        name, category, stream = what
        rank = np.broadcast_to(seen.ranks, takes_time.shape)[takes_time]
        values: dict[str, npt.ArrayLike] = {
            "rank": rank,
            "stream": STREAMS.index(stream),
            "name": self.names.setdefault(name, len(self.names)),
            "category": CATEGORIES.index(category),
            "start_s": start_s[takes_time],
            "end_s": end_s[takes_time],
            "layer": place.layer,
            "micro_batch": np.broadcast_to(place.micro_batch[:, None], takes_time.shape)[takes_time],
            "chunk": place.chunk,
            "phase": place.phase,
            "num_bytes": num_bytes[takes_time],
        }
        for field_name, kind in EVENT_TYPES.items():
            part = np.broadcast_to(np.asarray(values[field_name], dtype=kind), rank.shape)
            self.parts[field_name].append(part)

    def timeline(self, messages: Messages) -> Timeline:
        """All of them, sorted."""
        arrays = {
            name: np.concatenate([np.zeros(0, dtype=kind), *self.parts[name]]) for name, kind in EVENT_TYPES.items()
        }
        return Timeline(**arrays, names=tuple(self.names), messages=messages).sorted()


class PassRecorder:
    """Runs all passes of one key again, operation by operation, from the moments at which they started."""

    def __init__(self, record: StepRecord, key: PassKey, seen: Seen, events: EventList) -> None:
        nodes = record.step.nodes
        self.items = np.flatnonzero((nodes.stage == key[0]) & (nodes.chunk == key[1]) & (nodes.phase == key[2]))
        self.part, self.groups = record.passes[key], record.groups
        self.seen, self.events = seen, events
        self.start = self.now = record.times.start_s[self.items, 0]
        self.issued = self.start
        self.late_s = record.late_s
        self.place = Place(chunk=key[1], phase=0 if key[2] == FORWARD else 1, micro_batch=nodes.micro_batch[self.items])

    def run(self) -> None:
        """Record everything; what of ZeRO's collectives hides in a later pass is left out."""
        meeting, hidden_s = self.now, np.zeros((1, 1))
        if self.part.zero_s:
            exposed_s, hidden_s = (seconds[:1] for seconds in zero_parts_s(self.part))
            meeting = largest_of_gradient_groups(self.now, self.groups)
            self.now = meeting + largest_of_gradient_groups(exposed_s, self.groups)
        beside = self.now + hidden_s
        for stretch in self.part.stretches:
            self._stretch(stretch)
        self._late()
        what = ("zero.parameters_and_gradients", "data_parallel", "data_parallel")
        self._add(what, meeting, np.minimum(beside, self.now), self.place)

    def _add(
        self,
        what: tuple[str, str, str],
        start_s: FloatArray,
        end_s: FloatArray,
        place: Place,
        num_bytes: FloatArray | float = 0.0,
    ) -> None:
        """Add events of all ranks, arrays (n_items, 1 or n_ranks)."""
        self.events.add(self.seen, place, what, self.seen.of(start_s), self.seen.of(end_s), num_bytes)

    def _stretch(self, stretch: Stretch) -> None:
        began, host_s = self.now, stretch.host_s[:1]
        for block in stretch.blocks:
            self._block(block)
        self._add(("host.issue", "host", "host"), began, began + host_s, self.place)
        self.issued = began + host_s
        self.now = np.maximum(self.now, began + host_s)
        if stretch.synchronisation_s:
            start, self.now = self.now, self.now + stretch.synchronisation_s
            self._add(("host.synchronise", "host", "host"), start, self.now, self.place)
            self.issued = self.now

    def _late(self) -> None:
        """The host ends late, as ``FoldedPass.end_s`` has it."""
        late = [self.late_s(int(node)) for node in self.items]
        if late[0] is None:
            return
        until = self.start + self.part.host_s[:1] + np.concatenate([part[:1] for part in late if part is not None])
        self._add(("host.late", "host", "host"), self.issued, until, self.place)
        self.now = np.maximum(self.now, until)

    def _block(self, block: BlockPass) -> None:
        earlier = block.earlier or ((),) * len(block.scopes)
        for scope, before in zip(block.scopes, earlier, strict=True):
            beside = ScopeCompute(sum((seconds_of_compute(timed) for timed in before), np.zeros((1, 1))))
            for timed in scope:
                self._operation(timed, block.layer, beside)
            self._hidden(before or scope, block.layer, beside)

    def _operation(self, timed: TimedOperation, layer: int, beside: ScopeCompute) -> None:
        operation, place = timed.operation, self._place(timed, layer)
        exposed_s = timed.exposed_s[:1]
        if operation.group in self.groups:
            groups = self.groups[operation.group]
            if groups.size > 1:
                self.now = groups.maximum(self.now)
                beside.interrupt()
            exposed_s = group_maximum(exposed_s, groups)
        start, self.now = self.now, self.now + exposed_s
        share = exposed_share(timed)
        self._add(
            (operation.name, timed.category, operation.stream),
            start,
            self.now,
            place,
            operation.num_bytes * self.seen.of(share),
        )
        if operation.stream == "compute":
            beside.add(start, exposed_s)
        elif exposed_s.any():
            beside.interrupt()
        if timed.extra_s.any():
            start, self.now = self.now, self.now + timed.extra_s[:1]
            self._add((operation.name, imbalance_category(timed), "compute"), start, self.now, place)
            beside.add(start, timed.extra_s[:1])

    def _place(self, timed: TimedOperation, layer: int) -> Place:
        is_weight = timed.operation.phase == "weight_gradient"
        phase = WEIGHT_GRADIENT_PHASE if is_weight else self.place.phase
        return Place(layer, self.place.chunk, phase, self.place.micro_batch)

    def _hidden(self, scope: Scope, layer: int, beside: ScopeCompute) -> None:
        """Lay hidden communication beside the compute of its scope, one stream after the other."""
        begin = np.zeros((1, 1))
        for stream in COMMUNICATION_STREAMS:
            for timed in scope:
                if timed.operation.stream != stream or not timed.hidden_s.any():
                    continue
                end = begin + timed.hidden_s[:1]
                what, place = (timed.operation.name, timed.category, stream), self._place(timed, layer)
                whole_s = timed.hidden_s[:1] + timed.exposed_s[:1]
                for start_s, end_s in beside.overlaps(begin, end):
                    num_bytes = self.seen.of((end_s - start_s) / np.where(whole_s > 0, whole_s, 1.0))
                    self._add(what, start_s, end_s, place, timed.operation.num_bytes * num_bytes)
                begin = end


def seconds_of_compute(timed: TimedOperation) -> FloatArray:
    """Seconds of an operation under which communication hides, first draw."""
    if timed.operation.stream == "compute":
        return timed.exposed_s[:1] + timed.extra_s[:1]
    return timed.extra_s[:1]


def exposed_share(timed: TimedOperation) -> FloatArray:
    """Part of an operation that is not hidden, first draw."""
    exposed_s, hidden_s = timed.exposed_s[:1], timed.hidden_s[:1]
    whole_s = exposed_s + hidden_s
    return np.divide(exposed_s, whole_s, out=np.ones_like(whole_s), where=whole_s > 0)


class ScopeCompute:
    """When a scope computes: runs without interruption, in seconds of compute since the scope began.

    ``done_s`` is what was computed in an earlier pass, where weight gradients run apart.
    """

    def __init__(self, done_s: FloatArray) -> None:
        self.runs: list[tuple[FloatArray, FloatArray, FloatArray]] = []
        self.done_s = done_s
        self.continues = False

    def interrupt(self) -> None:
        """What computes next is a run of its own."""
        self.continues = False

    def add(self, start_s: FloatArray, seconds: FloatArray) -> None:
        """Compute for some seconds from a moment on."""
        if self.continues:
            began, first, length = self.runs.pop()
            self.runs.append((began, first, length + seconds))
        else:
            self.runs.append((start_s, self.done_s, seconds))
        self.done_s = self.done_s + seconds
        self.continues = True

    def overlaps(self, begin: FloatArray, end: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
        """Starts and ends of what the scope computes from second ``begin`` to ``end`` of its own; some may be empty."""
        pieces = []
        for began, first, length in self.runs:
            low, high = np.maximum(begin, first), np.minimum(end, first + length)
            if (high > low).any():
                pieces.append((began + (low - first), began + (np.maximum(high, low) - first)))
        return pieces


def _record_step_end(record: StepRecord, stage: int, seen: Seen, events: EventList) -> None:
    """Reduction, update and gather after the last pass; what hides of them beside last backward and first forward."""
    part, times = record.end.parts[stage], record.end
    finish, reduce, gather = (moment[:1, stage] for moment in (times.finish_s, times.reduce_s, times.gather_s))
    reduced = reduce + (part.reduction_s - part.hidden_reduction_s)
    updated = reduced + part.optimizer_s
    first = record.times.start_s[record.step.nodes.stage == stage, 0].min(axis=0, keepdims=True)
    is_offloaded = record.step.system.scenario.optimizer.offload == "optimizer"
    reduction = ("gradients.reduce", "data_parallel", "data_parallel")
    parameters = ("parameters.gather", "data_parallel", "data_parallel")
    for what, start, end in (
        (reduction, finish - part.hidden_reduction_s, finish),
        (reduction, reduce, reduced),
        (("optimizer.update", "optimizer", "pcie" if is_offloaded else "compute"), reduced, updated),
        (("host.step", "host", "host"), updated, updated + part.host_s),
        (parameters, gather, times.end_s[:1, stage]),
        (parameters, first, first + part.hidden_gather_s),
    ):
        events.add(seen, Place(), what, seen.of(start), seen.of(end))


def _record_transfers(record: StepRecord, stage: int, seen: Seen, events: EventList) -> None:
    """Sends of a stage: from when they leave, earlier where the stack hides them, one after the other on the stream."""
    nodes, step = record.step.nodes, record.step
    sent = np.flatnonzero(nodes.hops > 0)
    sent = sent[nodes.stage[nodes.needs[sent]] == stage]
    if not len(sent) or not step.hop_s:
        return
    source = nodes.needs[sent]
    for column in range(len(seen.ranks)):
        one = Seen(seen.ranks[column : column + 1], seen.columns[column : column + 1])
        leave = one.of(record.times.end_s[source, 0])[:, 0]
        order = np.argsort(leave, kind="stable")
        starts, ends = laid_out(leave[order] + step.exposed_hop_s, step.hop_s)
        for phase in (0, 1):
            kept = np.flatnonzero((nodes.phase[sent[order]] != FORWARD) == bool(phase))
            for chunk in np.unique(nodes.chunk[source[order[kept]]]):
                rows = kept[nodes.chunk[source[order[kept]]] == chunk]
                place = Place(-1, int(chunk), phase, nodes.micro_batch[source[order[rows]]])
                what = ("pipeline.send", "pipeline_p2p", "pipeline_p2p")
                events.add(one, place, what, starts[rows, None], ends[rows, None], step.hop_bytes)


def laid_out(arrive_s: FloatArray, seconds: float) -> tuple[FloatArray, FloatArray]:
    """Starts and ends of messages that arrive in order and take so long, without two at once: later ones start later.

    Messages that arrive together share the time before it.
    """
    ends, index, count = np.unique(arrive_s, return_inverse=True, return_counts=True)
    begins = np.maximum(ends - seconds, np.concatenate([[-np.inf], ends[:-1]]))
    within = np.arange(len(arrive_s)) - np.searchsorted(arrive_s, arrive_s)
    width = ((ends - begins) / count)[index]
    starts = begins[index] + within * width
    return np.maximum(starts, 0.0), starts + width


def _messages(record: StepRecord, asked: IntArray, stage_of: IntArray, place: IntArray) -> Messages:
    """Transfers between recorded ranks: the same place in two stages."""
    nodes, times = record.step.nodes, record.times
    sent = np.flatnonzero(nodes.hops > 0)
    where = {(int(stage), int(at)): int(rank) for rank, stage, at in zip(asked, stage_of, place, strict=True)}
    parts: list[list[npt.NDArray[np.generic]]] = [[], [], [], [], []]
    for (stage, at), rank in where.items():
        for other in np.unique(nodes.stage[sent[nodes.stage[nodes.needs[sent]] == stage]]):
            if (int(other), at) not in where:
                continue
            rows = sent[(nodes.stage[nodes.needs[sent]] == stage) & (nodes.stage[sent] == other)]
            column = at if record.groups else 0
            leave = times.end_s[nodes.needs[rows], 0, column]
            values = (rank, leave, where[int(other), at], leave + record.step.exposed_hop_s, record.step.hop_bytes)
            for part, value in zip(parts, values, strict=True):
                part.append(np.broadcast_to(np.asarray(value), rows.shape))
    kinds = (np.int64, np.float64, np.int64, np.float64, np.float64)
    return Messages(
        *(np.concatenate([np.zeros(0, dtype=kind), *part]) for part, kind in zip(parts, kinds, strict=True))
    )
