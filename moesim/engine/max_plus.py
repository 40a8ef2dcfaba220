"""Finish times of pipeline schedules by max-plus recursion, over many cases at once.

A schedule with a fixed order per stage needs no events: each node starts when the node before it on its stage and the
node it needs have finished. The recursion is max-plus linear, so once all clocks advance by one constant per period,
they do so for ever: long steady states are skipped exactly, and only there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moesim.structure.chunk_placement import chunk_placement
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.pipeline_schedules import CLASSIC_SCHEDULES, Program, build_program

PERIODICITY_TOLERANCE = 1e-12
SIMULATED_PERIODS = 3
CASES_PER_CHUNK = 2048


def program_finish_s(
    program: Program,
    forward_s: FloatArray,
    backward_s: FloatArray,
    hop_s: FloatArray,
    weight_gradient_s: FloatArray | None = None,
) -> FloatArray:
    """Finish time of every node of a program.

    Parameters
    ----------
    program : Program
        Unrolled schedule.
    forward_s, backward_s : ndarray of shape (stages * virtual_stages, n_cases)
        Durations of each chunk, in model order.
    hop_s : ndarray of shape (n_cases,)
        Transfer between neighbouring stages, occupying neither.
    weight_gradient_s : ndarray of shape (stages * virtual_stages, n_cases), optional
        Part of ``backward_s`` that a weight gradient apart takes; the input gradient takes the rest. Needed by programs
        that have such.

    Returns
    -------
    ndarray of shape (n_nodes + 1, n_cases)
        The last row is the start of the step, 0; that of a node which is not there is 0 too.
    """
    durations = np.concatenate([forward_s, backward_s])
    if weight_gradient_s is not None:
        durations = np.concatenate([durations, backward_s - weight_gradient_s, weight_gradient_s])
    finish = np.zeros((len(program.needs) + 1, durations.shape[1]))
    has_pairs = bool((program.partner < len(program.needs)).any())
    for level in program.levels:
        arrival = finish[program.needs[level]] + program.hops[level][:, None] * hop_s
        start = np.maximum(finish[program.stage_before[level]], arrival)
        finish[level] = start + durations[program.duration_row[level]]
        if has_pairs and len(paired := np.flatnonzero(program.partner[level] < len(program.needs))):
            finish[level[paired]] = _pair_end_s(program, finish, durations, hop_s, start[paired], level[paired])
    return finish


def _pair_end_s(
    program: Program,
    finish: FloatArray,
    durations: FloatArray,
    hop_s: FloatArray,
    start: FloatArray,
    nodes: IntArray,
) -> FloatArray:
    """End of nodes that run as one with a partner: the later start, both durations."""
    partner = program.partner[nodes]
    arrival = finish[program.needs[partner]] + program.hops[partner][:, None] * hop_s
    both = durations[program.duration_row[nodes]] + durations[program.duration_row[partner]]
    return np.asarray(np.maximum(start, arrival) + both)


def pipeline_finish_s(
    schedule: str,
    virtual_stages: int,
    micro_batches: IntArray,
    forward_s: FloatArray,
    backward_s: FloatArray,
    hop_s: FloatArray,
    weight_gradient_s: FloatArray | None = None,
) -> FloatArray:
    """Time at which each stage has finished its last work.

    Parameters
    ----------
    schedule : str
        Any of ``pipeline_schedules.SCHEDULES``.
    virtual_stages : int
        Chunks per stage.
    micro_batches : ndarray of shape (n_cases,)
        Micro-batches of each case.
    forward_s, backward_s : ndarray of shape (stages * virtual_stages, n_cases)
        Durations of each chunk, in model order.
    hop_s : ndarray of shape (n_cases,)
        Transfer between neighbouring stages, occupying neither.
    weight_gradient_s : ndarray of shape (stages * virtual_stages, n_cases), optional
        Part of ``backward_s`` that the weight gradients take, for schedules that run them apart.

    Returns
    -------
    ndarray of shape (stages, n_cases)
        Finish times.

    Examples
    --------
    Four equal stages, eight micro-batches, forward 1 s, backward 2 s: (8 + 4 - 1) * 3 s.

    >>> one, two = np.ones((4, 1)), np.full((4, 1), 2.0)
    >>> float(pipeline_finish_s("one_f_one_b", 1, np.array([8]), one, two, np.zeros(1))[0, 0])
    33.0
    """
    stages = len(forward_s) // virtual_stages
    if stages == 1 and virtual_stages == 1:
        return np.asarray((forward_s + backward_s) * micro_batches)
    if schedule == "gpipe":
        return gpipe_finish_s(micro_batches, forward_s, backward_s, hop_s)
    if schedule not in CLASSIC_SCHEDULES and weight_gradient_s is None:
        raise ValueError(f"schedule {schedule} needs the seconds of the weight gradients")
    finish = np.empty((stages, len(micro_batches)))
    for start in range(0, len(micro_batches), CASES_PER_CHUNK):
        part = slice(start, start + CASES_PER_CHUNK)
        arguments = (micro_batches[part], forward_s[:, part], backward_s[:, part], hop_s[part])
        if schedule in CLASSIC_SCHEDULES and virtual_stages == 1:
            finish[:, part] = _one_f_one_b_finish_s(*arguments)
        else:
            weights_s = None if weight_gradient_s is None else weight_gradient_s[:, part]
            finish[:, part] = _unrolled_finish_s(schedule, virtual_stages, *arguments, weights_s)
    return finish


def forward_finish_s(micro_batches: IntArray, forward_s: FloatArray, hop_s: FloatArray) -> FloatArray:
    """Forward passes alone, a flow shop of equal jobs: the last stage ends at sum f + (p - 1) c + (m - 1) max f.

    Every stage is given that time: a step of inference ends with its last stage.
    """
    end = forward_s.sum(axis=0) + (len(forward_s) - 1) * hop_s + (micro_batches - 1) * forward_s.max(axis=0)
    return np.broadcast_to(end, forward_s.shape)


def gpipe_finish_s(
    micro_batches: IntArray, forward_s: FloatArray, backward_s: FloatArray, hop_s: FloatArray
) -> FloatArray:
    """GPipe in closed form: two flow shops of equal jobs, one after the other.

    The last stage ends its forwards at sum f + (p - 1) c + (m - 1) max f; stage s ends its backwards
    sum_(j >= s) b + (p - 1 - s) c + (m - 1) max_(j >= s) b later.
    """
    stages = len(forward_s)
    forward_end = forward_finish_s(micro_batches, forward_s, hop_s)[0]
    finish = np.empty_like(forward_s)
    total, largest = np.zeros_like(hop_s), np.zeros_like(hop_s)
    for stage in range(stages - 1, -1, -1):
        total = total + backward_s[stage]
        largest = np.maximum(largest, backward_s[stage])
        finish[stage] = forward_end + total + (stages - 1 - stage) * hop_s + (micro_batches - 1) * largest
    return finish


class _SlotClock:
    """1F1B for a block of cases, slot by slot: in slot k every stage runs forward k, then backward k - (p - 1 - s).

    A backward needs the one its successor ran in the slot before, so two arrays (stages, n_cases) are the whole state:
    when each stage is free, and when its last backward ended. 20 times faster than the unrolled program, which it
    equals.
    """

    def __init__(self, forward_s: FloatArray, backward_s: FloatArray, hop_s: FloatArray) -> None:
        self.forward_s = np.ascontiguousarray(forward_s)
        self.backward_s = np.ascontiguousarray(backward_s)
        self.hop_s = hop_s
        self.free = np.zeros_like(self.forward_s)
        self.backward_end = np.zeros_like(self.forward_s)

    def take(self, cases: IntArray) -> _SlotClock:
        """The same state for some of the cases."""
        part = _SlotClock(self.forward_s[:, cases], self.backward_s[:, cases], self.hop_s[cases])
        part.free = self.free[:, cases]
        part.backward_end = self.backward_end[:, cases]
        return part

    def shift(self, seconds: FloatArray) -> None:
        """Move all clocks forward."""
        self.free += seconds
        self.backward_end += seconds

    def run(self, first_slot: int, last_slot: int, micro_batches: int) -> None:
        """Run slots of a step of ``micro_batches``."""
        stages = len(self.forward_s)
        for slot in range(first_slot, last_slot):
            if slot < micro_batches:
                self._forwards()
            low = max(0, stages - 1 - slot)
            high = min(stages - 1, micro_batches + stages - 2 - slot)
            self._backwards(low, high)

    def _forwards(self) -> None:
        arrival = self.free[0]
        arrival += self.forward_s[0]
        for stage in range(1, len(self.free)):
            free = self.free[stage]
            np.maximum(free, arrival + self.hop_s, out=free)
            free += self.forward_s[stage]
            arrival = free

    def _backwards(self, low: int, high: int) -> None:
        last = len(self.free) - 1
        inner = min(high, last - 1)
        if inner >= low:
            free = self.free[low : inner + 1]
            np.maximum(free, self.backward_end[low + 1 : inner + 2] + self.hop_s, out=free)
            free += self.backward_s[low : inner + 1]
        if high == last:
            self.free[last] += self.backward_s[last]
        self.backward_end[low : high + 1] = self.free[low : high + 1]


def _one_f_one_b_finish_s(
    micro_batches: IntArray, forward_s: FloatArray, backward_s: FloatArray, hop_s: FloatArray
) -> FloatArray:
    stages = len(forward_s)
    horizon = SIMULATED_PERIODS * stages
    finish = np.empty_like(forward_s)
    for count in np.unique(micro_batches[micro_batches <= horizon]):
        cases = np.flatnonzero(micro_batches == count)
        clock = _SlotClock(forward_s[:, cases], backward_s[:, cases], hop_s[cases])
        clock.run(0, int(count) + stages - 1, int(count))
        finish[:, cases] = clock.free
    long = np.flatnonzero(micro_batches > horizon)
    if len(long):
        clock = _SlotClock(forward_s[:, long], backward_s[:, long], hop_s[long])
        for local, ends in _long_one_f_one_b(clock, micro_batches[long], horizon):
            finish[:, long[local]] = ends
    return finish


def _long_one_f_one_b(
    clock: _SlotClock, micro_batches: IntArray, horizon: int
) -> Iterator[tuple[IntArray, FloatArray]]:
    """Simulate ``horizon`` slots, skip what has become periodic (period 1, else one round trip of p), drain."""
    stages = len(clock.free)
    clock.run(0, horizon - 1, horizon)
    before = clock.free.copy()
    clock.run(horizon - 1, horizon, horizon)
    steady, shift = _constant_shift(before, clock.free)
    cases = np.flatnonzero(steady)
    if len(cases):
        part = clock.take(cases)
        part.shift((micro_batches[cases] - horizon) * shift[cases])
        part.run(horizon, horizon + stages - 1, horizon)
        yield cases, part.free
    rest = np.flatnonzero(~steady)
    for count in np.unique(micro_batches[rest]):
        cases = rest[micro_batches[rest] == count]
        yield cases, _round_trip_periodic(clock.take(cases), int(count), horizon)


def _round_trip_periodic(clock: _SlotClock, micro_batches: int, slot: int) -> FloatArray:
    """Run on in round trips of p slots until they repeat; cases that never do are simulated to the end."""
    stages = len(clock.free)
    skipped = 0
    while slot + 2 * stages <= micro_batches - skipped:
        before = clock.free.copy()
        clock.run(slot, slot + stages, slot + stages)
        slot += stages
        steady, shift = _constant_shift(before, clock.free)
        if steady.all():
            periods = (micro_batches - slot) // stages
            clock.shift(periods * shift)
            skipped = periods * stages
    effective = micro_batches - skipped
    clock.run(slot, effective + stages - 1, effective)
    return clock.free


def _constant_shift(
    before: FloatArray, after: FloatArray
) -> tuple[np.ndarray[tuple[int], np.dtype[np.bool_]], FloatArray]:
    """Whether all stages' clocks moved by one constant, and by how much; shapes (n_cases,)."""
    moved = after - before
    low, high = moved.min(axis=0), moved.max(axis=0)
    return high - low <= PERIODICITY_TOLERANCE * after.max(axis=0), high


def _unrolled_finish_s(
    schedule: str,
    virtual_stages: int,
    micro_batches: IntArray,
    forward_s: FloatArray,
    backward_s: FloatArray,
    hop_s: FloatArray,
    weight_gradient_s: FloatArray | None,
) -> FloatArray:
    stages = len(forward_s) // virtual_stages
    finish = np.empty((stages, len(micro_batches)))
    for count in np.unique(micro_batches):
        cases = np.flatnonzero(micro_batches == count)
        weights_s = None if weight_gradient_s is None else weight_gradient_s[:, cases]
        arguments = (forward_s[:, cases], backward_s[:, cases], hop_s[cases], weights_s)
        finish[:, cases] = _periodic_program_finish_s(schedule, virtual_stages, int(count), *arguments)
    return finish


def _periodic_program_finish_s(
    schedule: str,
    virtual_stages: int,
    micro_batches: int,
    forward_s: FloatArray,
    backward_s: FloatArray,
    hop_s: FloatArray,
    weight_gradient_s: FloatArray | None,
) -> FloatArray:
    """Unroll a shorter step; where its last two periods are alike, add the periods left out.

    Periods are counted in micro-batches of one direction: p of them, the group of an interleaved order. Other orders
    repeat every micro-batch, so that any number may be a period of their times; all to 2p are tried.
    """
    stages = len(forward_s) // virtual_stages
    directions = chunk_placement(schedule, stages, virtual_stages).directions
    each = micro_batches // directions
    periods = range(stages, stages + 1 if schedule in CLASSIC_SCHEDULES else 2 * stages + 1)

    def unroll(count: int, cases: IntArray) -> tuple[Program, FloatArray]:
        program = build_program(schedule, stages, virtual_stages, count * directions)
        weights_s = None if weight_gradient_s is None else weight_gradient_s[:, cases]
        return program, program_finish_s(program, forward_s[:, cases], backward_s[:, cases], hop_s[cases], weights_s)

    finish = np.empty((stages, len(hop_s)))
    open_cases = np.arange(len(hop_s))
    rounds = 2 * SIMULATED_PERIODS
    while len(open_cases):
        simulated = min(each, each % stages + rounds * stages)
        program, nodes = unroll(simulated, open_cases)
        if simulated == each:
            finish[:, open_cases] = nodes[program.last_of_stage]
            return finish
        for period in periods:
            steady, shift = _steady_shift(program, nodes, period)
            done = open_cases[steady]
            left_out, rest = divmod(each - simulated, period)
            ends = nodes[program.last_of_stage][:, steady]
            if rest and len(done):
                longer, longer_nodes = unroll(simulated + rest, done)
                ends = longer_nodes[longer.last_of_stage]
            finish[:, done] = ends + left_out * shift[steady]
            open_cases, nodes = open_cases[~steady], nodes[:, ~steady]
            if not len(open_cases):
                break
        rounds *= 2
    return finish


def _steady_shift(
    program: Program, nodes: FloatArray, period: int
) -> tuple[np.ndarray[tuple[int], np.dtype[np.bool_]], FloatArray]:
    """Compare the last ``2 * stages`` micro-batches before the drain with those one period earlier, chunks and phases.

    The state of a schedule spans two groups of micro-batches (warm-up is up to (v + 1) p - 2 chunks), hence two. The
    window ends ``2 * stages`` micro-batches before the last, so that neither warm-up nor drain touches it.
    """
    stages, directions = program.stages, program.placement.directions
    each = program.micro_batches // directions
    per_node = nodes[:-1].reshape(-1, each, nodes.shape[1])
    middle = each - 2 * stages
    late = slice(middle - 2 * stages, middle)
    moved = per_node[:, late] - per_node[:, late.start - period : middle - period]
    moved = moved[(program.stage >= 0).reshape(-1, each)[:, late]]
    low, high = moved.min(axis=0), moved.max(axis=0)
    return high - low <= PERIODICITY_TOLERANCE * nodes.max(axis=0), high
