"""Pipeline schedules as data: per stage the order of (phase, micro-batch, chunk); and the dependency program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

FORWARD, BACKWARD = 0, 1

StageOrder = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Program:
    """A schedule unrolled: one node per (stage, phase, micro-batch, chunk), grouped into levels.

    Nodes of a level depend only on earlier levels. Predecessor ``n_nodes`` stands for none (finished at time 0).

    Attributes
    ----------
    stages, virtual_stages, micro_batches : int
        Dimensions of the schedule.
    levels : tuple of ndarray of shape (n_level,)
        Node numbers of each level.
    stage_before : ndarray of shape (n_nodes,)
        The node that runs before it on the same stage.
    needs : ndarray of shape (n_nodes,)
        The node whose result it needs from another chunk (or its own forward, for the last chunk's backward).
    duration_row : ndarray of shape (n_nodes,)
        Row of the duration table: phase * (stages * virtual_stages) + chunk in model order.
    hops : ndarray of shape (n_nodes,)
        1 where ``needs`` is on another stage, so a transfer lies between; else 0.
    last_of_stage : ndarray of shape (stages,)
        Last node of each stage.
    """

    stages: int
    virtual_stages: int
    micro_batches: int
    levels: tuple[npt.NDArray[np.int64], ...]
    stage_before: npt.NDArray[np.int64]
    needs: npt.NDArray[np.int64]
    duration_row: npt.NDArray[np.int64]
    hops: npt.NDArray[np.float64]
    last_of_stage: npt.NDArray[np.int64]


def stage_order(schedule: str, stage: int, stages: int, virtual_stages: int, micro_batches: int) -> StageOrder:
    """Order in which one stage runs its (phase, micro-batch, chunk of the stage).

    ``gpipe``: all forwards, then all backwards (arXiv:1811.06965). ``one_f_one_b``: warm-up of stages - stage - 1
    forwards, then one forward and one backward in turn (PipeDream-Flush, arXiv:2006.09503).
    ``interleaved_one_f_one_b``: the same over chunks in groups of ``stages`` micro-batches (Megatron-LM,
    arXiv:2104.04473, section 2.2).

    >>> [f"{'FB'[phase]}{micro_batch}" for phase, micro_batch, _ in stage_order("one_f_one_b", 0, 2, 1, 3)]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    if schedule == "gpipe":
        forwards = [(FORWARD, index, 0) for index in range(micro_batches)]
        return forwards + [(BACKWARD, index, 0) for index in range(micro_batches)]
    total = micro_batches * virtual_stages
    if schedule == "one_f_one_b" or (schedule == "interleaved_one_f_one_b" and virtual_stages == 1):
        warm_up = min(stages - stage - 1, total)
    elif schedule == "interleaved_one_f_one_b":
        warm_up = min(2 * (stages - stage - 1) + (virtual_stages - 1) * stages, total)
    else:
        raise ValueError(f"unknown pipeline schedule {schedule!r}")
    forwards = [(FORWARD, *_position(index, stages, virtual_stages, FORWARD)) for index in range(total)]
    backwards = [(BACKWARD, *_position(index, stages, virtual_stages, BACKWARD)) for index in range(total)]
    order: StageOrder = forwards[:warm_up]
    for index in range(warm_up, total):
        order += [forwards[index], backwards[index - warm_up]]
    return order + backwards[total - warm_up :]


def _position(index: int, stages: int, virtual_stages: int, phase: int) -> tuple[int, int]:
    """Micro-batch and chunk of the index-th forward or backward of a stage."""
    if virtual_stages == 1:
        return index, 0
    group, inside = divmod(index, stages * virtual_stages)
    chunk, offset = divmod(inside, stages)
    if phase == BACKWARD:
        chunk = virtual_stages - 1 - chunk
    return group * stages + offset, chunk


@lru_cache(maxsize=512)
def build_program(schedule: str, stages: int, virtual_stages: int, micro_batches: int) -> Program:
    """Unroll a schedule and sort its nodes into levels.

    Raises
    ------
    ValueError
        If the schedule cannot run: some node waits for ever (deadlock), or interleaving with micro-batches that are no
        multiple of the stages.
    """
    if virtual_stages > 1 and micro_batches % stages:
        raise ValueError(f"interleaving needs micro-batches ({micro_batches}) in multiples of the stages ({stages})")
    chunks = stages * virtual_stages
    per_phase = chunks * micro_batches
    n_nodes = 2 * per_phase

    def number(phase: int, chunk: int, micro_batch: int) -> int:
        return phase * per_phase + chunk * micro_batches + micro_batch

    before = np.full(n_nodes, n_nodes, dtype=np.int64)
    needs = np.full(n_nodes, n_nodes, dtype=np.int64)
    hops = np.zeros(n_nodes)
    last = np.zeros(stages, dtype=np.int64)
    for stage in range(stages):
        previous = n_nodes
        for phase, micro_batch, chunk_of_stage in stage_order(schedule, stage, stages, virtual_stages, micro_batches):
            chunk = chunk_of_stage * stages + stage
            node = number(phase, chunk, micro_batch)
            before[node] = previous
            previous = node
            source = _needed_chunk(phase, chunk, chunks)
            if source is not None:
                needs[node] = number(source[0], source[1], micro_batch)
                hops[node] = float(source[1] % stages != chunk % stages)
        last[stage] = previous
    rows = np.arange(n_nodes) // micro_batches
    levels = _levels(before, needs)
    return Program(stages, virtual_stages, micro_batches, levels, before, needs, rows, hops, last)


def _needed_chunk(phase: int, chunk: int, chunks: int) -> tuple[int, int] | None:
    """Phase and chunk whose result a node needs, for the same micro-batch."""
    if phase == FORWARD:
        return (FORWARD, chunk - 1) if chunk else None
    return (BACKWARD, chunk + 1) if chunk < chunks - 1 else (FORWARD, chunk)


def _levels(before: npt.NDArray[np.int64], needs: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
    """Sort nodes by longest chain of predecessors; refuse cycles."""
    n_nodes = len(before)
    level = np.zeros(n_nodes + 1, dtype=np.int64)
    for _ in range(n_nodes + 1):
        raised = np.maximum(level[before], level[needs]) + 1
        if np.array_equal(raised, level[:-1]):
            break
        level[:-1] = raised
    else:
        raise ValueError("the schedule deadlocks: some operation waits for itself")
    order = np.argsort(level[:-1], kind="stable")
    bounds = np.flatnonzero(np.diff(level[:-1][order])) + 1
    return tuple(np.split(order, bounds))


def micro_batches_in_flight(
    schedule: str, stages: int, virtual_stages: int, micro_batches: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Most chunk activations a stage holds at once, in micro-batches of the whole stage.

    Returns
    -------
    ndarray of shape (stages, n_cases)
        GPipe: m. 1F1B: min(m, p - s). Interleaved: min(m * v, 2 (p - s - 1) + (v - 1) p + 1) / v (arXiv:2205.05198).
    """
    stage = np.arange(stages, dtype=np.float64)[:, None]
    if schedule == "gpipe":
        return np.broadcast_to(micro_batches, (stages, len(micro_batches))).copy()
    if schedule == "one_f_one_b" or virtual_stages == 1:
        return np.minimum(micro_batches, stages - stage)
    chunks = 2 * (stages - stage - 1) + (virtual_stages - 1) * stages + 1
    return np.minimum(micro_batches * virtual_stages, chunks) / virtual_stages
