"""Finish times of a pipeline over arrays of ranks and draws: operations folded, collectives wait for their last member.

A pass of a chunk starts at one moment per rank. What follows adds seconds, takes the largest of a group, or waits for
the host; additions are folded into one array, and a second collective of a group that has just met needs no meeting of
its own: its members stand together, so the largest of what each adds is known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from moesim.engine.stream_times import ChunkPass, Stretch, TimedOperation
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.pipeline_schedules import Program
from moesim.structure.rank_programs import RankGroups

Groups = Mapping[str, RankGroups]
ZERO = np.zeros((1, 1))
GRADIENT_DIMENSIONS: tuple[str, ...] = ("data", "context", "expert_data")
"""Ranks that reduce gradients with one another, one dimension after the other."""


@dataclass(frozen=True)
class Meeting:
    """Add ``offset_s``, then wait for the last of the group."""

    offset_s: FloatArray
    groups: RankGroups


@dataclass(frozen=True)
class HostStart:
    """Remember the moment ``offset_s`` from now: the host begins a stretch."""

    offset_s: FloatArray


@dataclass(frozen=True)
class HostEnd:
    """Add ``offset_s``, then wait until ``host_s`` after the stretch began."""

    offset_s: FloatArray
    host_s: FloatArray


Instruction = Meeting | HostStart | HostEnd


@dataclass
class FoldedPass:
    """A chunk's pass, folded.

    ``own_s`` and ``hidden_s`` are each rank's seconds by category whatever it waits; ``host_wait_s`` what it surely
    waits for its host, which needs ``host_s`` to issue it; ``operations`` what was folded.
    """

    instructions: tuple[Instruction, ...]
    tail_s: FloatArray
    own_s: dict[str, FloatArray]
    hidden_s: dict[str, FloatArray]
    host_wait_s: FloatArray
    host_s: FloatArray
    operations: int

    def end_s(self, start_s: FloatArray, late_s: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
        """When each rank has finished a pass begun at ``start_s``, and its further host waits; (n_draws, n_ranks).

        ``late_s`` is what the host takes longer to issue it.
        """
        now, began, waits = start_s, start_s, ZERO
        for instruction in self.instructions:
            match instruction:
                case Meeting():
                    now = instruction.groups.maximum(now + instruction.offset_s)
                case HostStart():
                    began = now + instruction.offset_s
                case HostEnd():
                    now = now + instruction.offset_s
                    until = np.maximum(now, began + instruction.host_s)
                    waits, now = waits + (until - now), until
        now = now + self.tail_s
        if late_s is not None:
            until = np.maximum(now, start_s + (self.host_s + late_s))
            waits, now = waits + (until - now), until
        return now, waits


@dataclass
class _Folder:
    """Folds a pass: ``offset`` is what has been added since the last instruction, ``together`` who stands together."""

    groups: Groups
    offset: FloatArray = field(default_factory=lambda: ZERO)
    together: RankGroups | None = None
    instructions: list[Instruction] = field(default_factory=list)
    own_s: dict[str, FloatArray] = field(default_factory=dict)
    hidden_s: dict[str, FloatArray] = field(default_factory=dict)
    host_wait_s: FloatArray = field(default_factory=lambda: ZERO)
    operations: int = 0

    def add(self, category: str, seconds: FloatArray) -> None:
        self.offset = self.offset + seconds
        self.own_s[category] = self.own_s.get(category, ZERO) + seconds

    def meet(self, dimension: str) -> None:
        groups = self.groups.get(dimension)
        if groups is None or groups.size == 1:
            return
        if self.together is not None and self.together.contains(groups):
            self.offset = group_maximum(self.offset, groups)
            return
        self.instructions.append(Meeting(self.offset, groups))
        self.offset, self.together = ZERO, groups

    def run(self, timed: TimedOperation) -> None:
        self.operations += 1
        self.meet(timed.operation.group)
        groups = self.groups.get(timed.operation.group)
        exposed_s = timed.exposed_s if groups is None else group_maximum(timed.exposed_s, groups)
        self.add(timed.category, exposed_s)
        if timed.extra_s.any():
            self.add(imbalance_category(timed), timed.extra_s)
        if timed.hidden_s.any():
            self.hidden_s[timed.category] = self.hidden_s.get(timed.category, ZERO) + timed.hidden_s

    def stretch(self, stretch: Stretch) -> None:
        at, began, before = len(self.instructions), self.offset, sum(self.own_s.values(), ZERO)
        for timed in stretch.operations():
            self.run(timed)
        own_s = sum(self.own_s.values(), ZERO) - before
        if (stretch.host_s > own_s).any():
            self._wait_for_host(at, began, stretch.host_s)
        if stretch.synchronisation_s:
            self.add("host", np.full((1, 1), stretch.synchronisation_s))

    def _wait_for_host(self, at: int, began: FloatArray, host_s: FloatArray) -> None:
        self.operations += 1
        if len(self.instructions) == at:
            until = np.maximum(self.offset, began + host_s)
            self.host_wait_s = self.host_wait_s + (until - self.offset)
            self.offset = until
            return
        self.instructions.insert(at, HostStart(began))
        self.instructions.append(HostEnd(self.offset, host_s))
        self.offset, self.together = ZERO, None


def imbalance_category(timed: TimedOperation) -> str:
    """Where an answer counts what the fullest rank takes longer: recompute is one thing, whatever it repeats."""
    return "recompute" if timed.category == "recompute" else "imbalance"


def group_maximum(seconds: FloatArray, groups: RankGroups) -> FloatArray:
    """Largest of each group; seconds that are the same on all ranks stay one number."""
    return seconds if seconds.shape[-1] == 1 else groups.maximum(seconds)


def folded(part: ChunkPass, groups: Groups) -> FoldedPass:
    """Fold a pass for ranks with these groups; no groups where ranks cannot be told apart."""
    folder = _Folder(groups)
    if part.zero_s:
        exposed_s, hidden_s = zero_parts_s(part)
        for dimension in GRADIENT_DIMENSIONS:
            folder.meet(dimension)
        folder.add("data_parallel", largest_of_gradient_groups(exposed_s, groups))
        folder.hidden_s["data_parallel"] = hidden_s
        folder.operations += 1
    for stretch in part.stretches:
        folder.stretch(stretch)
    return FoldedPass(
        tuple(folder.instructions),
        folder.offset,
        folder.own_s,
        folder.hidden_s,
        folder.host_wait_s,
        part.host_s,
        folder.operations,
    )


def zero_parts_s(part: ChunkPass) -> tuple[FloatArray, FloatArray]:
    """Exposed and hidden seconds of ZeRO's collectives of a pass: hidden is at most what the pass takes by itself."""
    own_s = part.later_s
    for stretch in part.stretches:
        work_s = sum((timed.exposed_s + timed.extra_s for timed in stretch.operations()), ZERO)
        own_s = own_s + np.maximum(work_s, stretch.host_s) + stretch.synchronisation_s
    hidden_s = np.minimum(part.zero_s * part.zero_overlap, own_s)
    return part.zero_s - hidden_s, hidden_s


def largest_of_gradient_groups(seconds: FloatArray, groups: Groups) -> FloatArray:
    """Largest among the ranks that reduce gradients with one another."""
    for dimension in GRADIENT_DIMENSIONS:
        if dimension in groups:
            seconds = group_maximum(seconds, groups[dimension])
    return seconds


@dataclass(frozen=True)
class Nodes:
    """Passes of a pipeline in an order in which each follows those it needs; arrays (n_nodes,).

    ``before``, ``needs`` and ``partner`` are positions, -1 where none. ``hops`` is 1 where a transfer lies between a
    node and what it needs. Partners run as one: the forward, then the backward, and both end together.
    """

    stage: IntArray
    phase: IntArray
    chunk: IntArray
    micro_batch: IntArray
    before: IntArray
    needs: IntArray
    hops: FloatArray
    partner: IntArray

    def __len__(self) -> int:
        return len(self.stage)


PassKey = tuple[int, int, int]
"""(stage, chunk, phase)."""


@dataclass
class NodeTimes:
    """Start and end of every pass, arrays (n_nodes, n_draws, n_ranks); sums over passes, (stages, n_draws, n_ranks).

    ``running_s`` from start to end, ``host_s`` waited for the host, ``transfer_s`` waited for what was under way.
    """

    start_s: FloatArray
    end_s: FloatArray
    arrival_s: FloatArray
    running_s: FloatArray
    host_s: FloatArray
    transfer_s: FloatArray


def node_times(
    nodes: Nodes,
    passes: Mapping[PassKey, FoldedPass],
    hop_s: FloatArray,
    shape: tuple[int, int],
    stages: int,
    late_s: Callable[[int], FloatArray | None] = lambda _: None,
) -> NodeTimes:
    """Run the passes of a pipeline, one after the other, all ranks and draws of a stage at once.

    Parameters
    ----------
    nodes : Nodes
        Passes in order.
    passes : mapping of (stage, chunk, phase) to FoldedPass
        What each is.
    hop_s : ndarray broadcastable to (n_draws, n_ranks)
        Transfer between stages, occupying neither.
    shape : tuple of int
        (n_draws, n_ranks).
    stages : int
        Stages of the pipeline.
    late_s : callable
        What hosts take longer to issue a node, broadcastable to (n_draws, n_ranks); None where they do not.
    """
    start, end, arrival = np.zeros((3, len(nodes) + 1, *shape))
    running, host, transfer = np.zeros((3, stages, *shape))
    done = np.zeros(len(nodes), dtype=bool)
    keys = list(zip(nodes.stage.tolist(), nodes.chunk.tolist(), nodes.phase.tolist(), strict=True))
    before_of, needs, partners = nodes.before.tolist(), nodes.needs.tolist(), nodes.partner.tolist()
    hops = nodes.hops.tolist()
    for node in range(len(nodes)):
        if done[node]:
            continue
        pair = sorted([node, partners[node]], key=lambda at: keys[at][2]) if partners[node] >= 0 else [node]
        stage = keys[node][0]
        free = end[before_of[node]]
        for at in pair:
            np.add(end[needs[at]], hops[at] * hop_s, out=arrival[at])
            np.minimum(np.maximum(arrival[at] - free, 0.0), hops[at] * hop_s, out=start[at])
            transfer[stage] += start[at]
        now = free
        for at in pair:
            now = np.maximum(now, arrival[at])
        for at in pair:
            start[at] = now
            now, waited = passes[keys[at]].end_s(now, late_s(at))
            running[stage] += now
            running[stage] -= start[at]
            host[stage] += waited
        for at in pair:
            end[at] = now
            done[at] = True
    return NodeTimes(start[:-1], end[:-1], arrival[:-1], running, host, transfer)


def sums_by_category(
    counts: Mapping[PassKey, int], parts: Mapping[PassKey, dict[str, FloatArray]], shape: tuple[int, int], stages: int
) -> dict[str, FloatArray]:
    """Seconds by category over all passes of a step, arrays (n_draws, stages, n_ranks)."""
    total: dict[str, FloatArray] = {}
    for key, count in counts.items():
        for category, seconds in parts[key].items():
            if category not in total:
                total[category] = np.zeros((shape[0], stages, shape[1]))
            total[category][:, key[0]] += count * seconds
    return total


def pass_counts(nodes: Nodes) -> dict[PassKey, int]:
    """How often each pass runs."""
    counts: dict[PassKey, int] = {}
    for key in zip(nodes.stage.tolist(), nodes.chunk.tolist(), nodes.phase.tolist(), strict=True):
        counts[key] = counts.get(key, 0) + 1
    return counts


def number_in_stage(nodes: Nodes) -> IntArray:
    """Which of its stage's passes each node is, in the order in which the stage runs them."""
    number = np.zeros(len(nodes), dtype=np.int64)
    taken: dict[int, int] = {}
    for node, stage in enumerate(nodes.stage.tolist()):
        number[node] = taken.get(stage, 0)
        taken[stage] = int(number[node]) + 1
    return number


def forward_nodes(stages: int, micro_batches: int) -> Nodes:
    """Forward passes alone: every stage takes the micro-batches in turn."""
    micro_batch, stage = (grid.ravel() for grid in np.mgrid[:micro_batches, :stages])
    at = np.arange(len(stage))
    none = np.full(len(stage), -1)
    return Nodes(
        stage=stage,
        phase=np.zeros_like(stage),
        chunk=stage,
        micro_batch=micro_batch,
        before=np.where(micro_batch > 0, at - stages, -1),
        needs=np.where(stage > 0, at - 1, -1),
        hops=(stage > 0).astype(np.float64),
        partner=none,
    )


def program_nodes(program: Program) -> Nodes:
    """Passes of an unrolled schedule, level by level."""
    order = np.concatenate(program.levels)
    position = np.full(len(program.stage) + 1, -1)
    position[order] = np.arange(len(order))
    phase, chunk = np.divmod(program.duration_row[order], program.placement.chunks)
    return Nodes(
        stage=program.stage[order],
        phase=phase,
        chunk=chunk,
        micro_batch=order % program.micro_batches,
        before=position[program.stage_before[order]],
        needs=position[program.needs[order]],
        hops=program.hops[order],
        partner=position[program.partner[order]],
    )
