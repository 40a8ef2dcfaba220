"""Overlap programs over many cases at once: who waits for whom, and what running beside communication costs.

Kernels that communicate hold compute units and memory bandwidth. While one runs, computing goes on at 1 - loss of its
speed, and no work is lost: a task ends when the integral of its speed is its work. Communication keeps its own speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from moesim.errors import SimulationError
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.overlap_programs import (
    COMMUNICATION,
    COMPUTE,
    OverlapProgram,
    Segment,
    chunked_program,
    interleaved_program,
)

SegmentSeconds = Mapping[Segment, FloatArray]
"""Seconds of one part of each segment, arrays (n_cases,); a segment that is missing takes none."""

SAME_TIME = 1e-13
WARM_LAYERS, STEADY_LAYERS = 3, 2
"""Blocks before two interleaved micro-batches repeat themselves, and blocks that are then averaged."""


@dataclass(frozen=True)
class OverlapTimes:
    """What became of a program, arrays (n_cases,).

    Attributes
    ----------
    time_s : ndarray
        End of its last task.
    compute_s : ndarray
        Time the compute stream was busy, slowed where communication ran beside it.
    slowed_s : ndarray
        Part of it that the slowing added.
    exposed_s : ndarray
        Time in which communication ran and the compute stream had nothing to do: ``time_s - compute_s``.
    hidden_s : ndarray
        Time in which both ran.
    finish_s : ndarray of shape (n_tasks, n_cases)
        End of each task.
    """

    time_s: FloatArray
    compute_s: FloatArray
    slowed_s: FloatArray
    exposed_s: FloatArray
    hidden_s: FloatArray
    finish_s: FloatArray


def run_overlap(program: OverlapProgram, work_s: FloatArray, loss: FloatArray | float = 0.0) -> OverlapTimes:
    """Run a program.

    Parameters
    ----------
    program : OverlapProgram
        Tasks on streams.
    work_s : ndarray of shape (n_tasks, n_cases)
        Seconds of each task with nothing beside it.
    loss : ndarray of shape (n_cases,) or float
        Part of its speed that computing loses while communication runs, in [0, 1).

    Raises
    ------
    ValueError
        If a loss is outside [0, 1) or work is negative.
    SimulationError
        If the tasks wait for each other.

    Examples
    --------
    Two chunks of 1 s exchange, 1 s experts, 1 s back: of 2 + 2 + 2 s, 1 s of each exchange is hidden.

    >>> program = chunked_program(2)
    >>> work_s = np.array([[float(task.parts == 2)] for task in program.tasks])
    >>> run_overlap(program, work_s).time_s.tolist()
    [4.0]
    """
    losses = np.broadcast_to(np.asarray(loss, dtype=np.float64), work_s.shape[1:])
    if not ((losses >= 0.0) & (losses < 1.0)).all() or not (work_s >= 0.0).all():
        raise ValueError("an overlap program needs work of at least 0 s and losses from 0 to below 1")
    return _Run(program, work_s, losses).result()


class _Run:
    """Both streams of all cases, from the end of one task to the end of the next."""

    def __init__(self, program: OverlapProgram, work_s: FloatArray, loss: FloatArray) -> None:
        num_tasks, num_cases = work_s.shape
        self.order = program.stream_order
        self.needs = program.padded_needs
        self.speed_beside = 1.0 - loss
        self.cases: IntArray = np.arange(num_cases)
        self.remaining = work_s.astype(np.float64)
        self.place = [np.zeros(num_cases, np.int64) for _ in self.order]
        self.is_done = np.zeros((num_tasks + 1, num_cases), np.bool_)
        self.is_done[-1] = True
        self.finish_s = np.zeros((num_tasks, num_cases))
        self.now_s, self.compute_s, self.both_s = np.zeros((3, num_cases))
        self.work_s = work_s[self.order[COMPUTE]].sum(axis=0)
        for _ in range(num_tasks):
            if not self._advance():
                break

    def _heads(self, stream: int) -> tuple[IntArray, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        """Next task of a stream in every case, and whether it can run; a stream that is done has some task."""
        order, place = self.order[stream], self.place[stream]
        if not len(order):
            return place, np.zeros(len(place), np.bool_)
        head = order[np.minimum(place, len(order) - 1)]
        can_run = place < len(order)
        for column in self.needs.T:
            can_run &= self.is_done[column[head], self.cases]
        return head, can_run

    def _advance(self) -> bool:
        """Go on to the next end of a task in each case; False if nothing is left."""
        heads = [self._heads(stream) for stream in (COMPUTE, COMMUNICATION)]
        runs = np.stack([can_run for _, can_run in heads])
        if not runs.any():
            if not self.is_done.all():
                raise SimulationError("tasks of an overlap program wait for each other")
            return False
        is_both = runs.all(axis=0)
        speeds = [np.where(is_both, self.speed_beside, 1.0), np.ones(len(self.cases))]
        left = [
            np.where(can_run, self.remaining[head, self.cases] / speeds[stream], np.inf)
            for stream, (head, can_run) in enumerate(heads)
        ]
        step_s = np.minimum.reduce(left)
        step_s = np.where(np.isfinite(step_s), step_s, 0.0)
        self.now_s += step_s
        self.compute_s += step_s * runs[COMPUTE]
        self.both_s += step_s * is_both
        for stream, (head, can_run) in enumerate(heads):
            ends = can_run & (left[stream] <= step_s * (1.0 + SAME_TIME))
            taken = self.remaining[head, self.cases] - step_s * speeds[stream]
            self.remaining[head[can_run], self.cases[can_run]] = np.where(ends, 0.0, np.maximum(taken, 0.0))[can_run]
            self.is_done[head[ends], self.cases[ends]] = True
            self.finish_s[head[ends], self.cases[ends]] = self.now_s[ends]
            self.place[stream] += ends
        return True

    def result(self) -> OverlapTimes:
        """What happened."""
        return OverlapTimes(
            time_s=self.now_s,
            compute_s=self.compute_s,
            slowed_s=np.maximum(self.compute_s - self.work_s, 0.0),
            exposed_s=np.maximum(self.now_s - self.compute_s, 0.0),
            hidden_s=self.both_s,
            finish_s=self.finish_s,
        )


@dataclass(frozen=True)
class BlockOverlap:
    """Times of one pass through a block, arrays (n_cases,), as in ``OverlapTimes``; ``chunks`` that were taken."""

    time_s: FloatArray
    compute_s: FloatArray
    slowed_s: FloatArray
    exposed_s: FloatArray
    hidden_s: FloatArray
    chunks: FloatArray


def task_seconds(program: OverlapProgram, of_owner: Sequence[SegmentSeconds]) -> FloatArray:
    """Work of every task, (n_tasks, n_cases), from seconds of parts of segments per owner."""
    shape = np.broadcast_shapes(*(np.shape(value) for seconds in of_owner for value in seconds.values()))
    zero = np.zeros(shape)
    return np.stack([zero + of_owner[task.owner].get(task.segment, zero) for task in program.tasks])


def overlapped_block(
    segments: Callable[[int], SegmentSeconds],
    degrees: Sequence[int],
    *,
    has_shared_overlap: bool = False,
    loss: FloatArray | float = 0.0,
) -> BlockOverlap:
    """One block whose experts work in chunks, with the best of some degrees in every case.

    Parameters
    ----------
    segments : callable
        Seconds of one part of each segment when routed rows are cut into a number of chunks: smaller GEMMs are less
        efficient and every exchange has its latency.
    degrees : sequence of int
        Numbers of chunks to choose from, the first one where times are equal; 1 does not cut.
    has_shared_overlap : bool
        Whether shared experts run during the exchanges.
    loss : ndarray of shape (n_cases,) or float
        As for ``run_overlap``.

    Returns
    -------
    BlockOverlap
        Of the degree that is fastest in each case.

    Notes
    -----
    With c chunks of g/c computing and a/c exchange each way and nothing else, t = max(2 a, g + 2 a/c).

    Examples
    --------
    4 s of experts and 2 s each way without latency: 8 s in one piece, 4 + 4/4 s in four.

    >>> def even(chunks):
    ...     parts = {"exchange_in": 2.0, "experts": 4.0, "exchange_out": 2.0}
    ...     return {name: np.array([seconds / chunks]) for name, seconds in parts.items()}
    >>> [float(overlapped_block(even, [degree]).time_s[0]) for degree in (1, 4)]
    [8.0, 5.0]
    """
    best: BlockOverlap | None = None
    for degree in degrees:
        program = chunked_program(degree, has_shared_overlap=has_shared_overlap)
        times = run_overlap(program, task_seconds(program, [segments(degree)]), loss)
        found = BlockOverlap(
            times.time_s, times.compute_s, times.slowed_s, times.exposed_s, times.hidden_s, times.time_s * 0.0 + degree
        )
        best = found if best is None else _faster(best, found)
    if best is None:
        raise ValueError("no degree to choose from")
    return best


def _faster(one: BlockOverlap, other: BlockOverlap) -> BlockOverlap:
    is_other = other.time_s < one.time_s
    chosen = {item.name: np.where(is_other, getattr(other, item.name), getattr(one, item.name)) for item in fields(one)}
    return BlockOverlap(**chosen)


def interleaved_block(
    first: SegmentSeconds,
    second: SegmentSeconds,
    *,
    has_shared_overlap: bool = False,
    loss: FloatArray | float = 0.0,
) -> BlockOverlap:
    """Two micro-batches through one block of many alike, in the steady state: times of both together.

    Parameters
    ----------
    first, second : mapping
        Seconds of each segment of one micro-batch and of the other: forward and forward, or forward and backward.
    has_shared_overlap : bool
        Whether shared experts run before the micro-batch's rows are there.
    loss : ndarray of shape (n_cases,) or float
        As for ``run_overlap``.

    Returns
    -------
    BlockOverlap
        What one more block adds for the pair; ``chunks`` is 1.
    """
    runs = []
    for layers in (WARM_LAYERS, WARM_LAYERS + STEADY_LAYERS):
        program = interleaved_program(layers, has_shared_overlap=has_shared_overlap)
        runs.append(run_overlap(program, task_seconds(program, [first, second]), loss))
    time_s, compute_s, slowed_s, exposed_s, hidden_s = (
        np.maximum(getattr(runs[1], name) - getattr(runs[0], name), 0.0) / STEADY_LAYERS
        for name in ("time_s", "compute_s", "slowed_s", "exposed_s", "hidden_s")
    )
    return BlockOverlap(time_s, compute_s, slowed_s, exposed_s, hidden_s, np.ones_like(time_s))


def bucketed_reduction_s(
    backward_s: FloatArray, bucket_s: FloatArray, buckets: FloatArray, loss: FloatArray | float = 0.0
) -> tuple[FloatArray, FloatArray]:
    """Gradient buckets that are reduced one by one during the last backward pass.

    Parameters
    ----------
    backward_s : ndarray of shape (n_cases,)
        Backward pass of the last micro-batch, over which buckets fill evenly.
    bucket_s : ndarray of shape (n_cases,)
        Reduction of one bucket.
    buckets : ndarray of shape (n_cases,)
        How many.
    loss : ndarray of shape (n_cases,) or float
        Part of its speed that computing loses while a bucket is reduced.

    Returns
    -------
    tuple of ndarray of shape (n_cases,)
        Time from the begin of the backward pass to the last bucket's end, and reduction time that was hidden.

    Notes
    -----
    A bucket fills in f = b/n. While reductions queue (r >= f/(1 - loss)) they never pause after the first bucket:
    t = f + n r. Else each has ended before the next bucket is full: it slows r of every f but the first, and the last
    one stands alone: t = b + (n - 1) r loss + r. Both are max-plus: the larger holds.
    """
    fill_s = backward_s / buckets
    lost = np.broadcast_to(np.asarray(loss, dtype=np.float64), fill_s.shape)
    queued_s = fill_s + buckets * bucket_s
    paced_s = backward_s + (buckets - 1.0) * bucket_s * lost + bucket_s
    time_s = np.maximum(queued_s, paced_s)
    beside_s = np.minimum((buckets - 1.0) * bucket_s, (backward_s - fill_s) / (1.0 - lost))
    return time_s, beside_s


def hidden_reduction_s(
    reduction_s: FloatArray,
    backward_s: FloatArray,
    achieved: float,
    buckets: FloatArray,
    loss: float = 0.0,
) -> FloatArray:
    """How much less than its own time the gradients' reduction adds to a step.

    Parameters
    ----------
    reduction_s, backward_s : ndarray
        Reduction of a stage, and its backward pass of the last micro-batch.
    achieved : float
        Share that the stack hides where it is not told how.
    buckets : ndarray
        Buckets that are reduced one by one during the backward pass; 0 where the stack's share counts.
    loss : float
        Part of its speed that computing loses while a bucket is reduced.
    """
    as_achieved = np.minimum(reduction_s * achieved, backward_s)
    if not np.any(buckets):
        return as_achieved
    count = np.maximum(buckets, 1.0)
    time_s, _ = bucketed_reduction_s(backward_s, reduction_s / count, count, loss)
    return np.where(buckets > 0, np.clip(reduction_s - (time_s - backward_s), 0.0, reduction_s), as_achieved)


def prefetched_s(
    compute_s: FloatArray,
    gather_s: FloatArray,
    layers: FloatArray,
    scatter_s: FloatArray | float = 0.0,
    *,
    loss: FloatArray | float = 0.0,
) -> FloatArray:
    """A pass over layers whose parameters are gathered one layer ahead (FSDP, ZeRO-3).

    Parameters
    ----------
    compute_s, gather_s : ndarray of shape (n_cases,)
        Computing and gathers of all layers together, alike in every layer.
    layers : ndarray of shape (n_cases,)
        Layers of the pass.
    scatter_s : ndarray of shape (n_cases,) or float
        Reductions of the layers' gradients, each while the next layer is computed.
    loss : ndarray of shape (n_cases,) or float
        Part of its speed that computing loses while communication runs.

    Returns
    -------
    ndarray of shape (n_cases,)
        Seconds.

    Notes
    -----
    The gather of layer i + 1 starts with layer i's computing, the reduction of layer i - 1 follows it: with a, r, g of
    one layer t = a + g1 + (n - 2) max(a + r, g2) + gn + r, where g2 = g + loss (a + r), or all of g slowed if that is
    less; in the first layer there is nothing to reduce yet and in the last nothing left to gather.
    """
    gather, compute, scatter = gather_s / layers, compute_s / layers, scatter_s / layers

    def beside(communication: FloatArray) -> FloatArray:
        slowed = np.minimum(compute + loss * communication, compute / (1.0 - loss))
        return np.asarray(np.maximum(communication, slowed))

    ends = beside(gather) + beside(scatter + 0.0 * gather)
    inner = (layers - 2.0) * beside(gather + scatter) + ends
    return np.asarray(gather + np.where(layers > 1, inner, compute) + scatter)
