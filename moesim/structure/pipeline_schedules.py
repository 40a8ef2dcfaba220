"""Pipeline schedules as data: per stage the order of (phase, micro-batch, chunk); and the dependency program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import numpy as np
import numpy.typing as npt

from moesim.describe.scenario import PipelineScheduleName
from moesim.structure.chunk_placement import ChunkPlacement, chunk_placement
from moesim.structure.pipeline_building_blocks import squeezed_orders
from moesim.structure.pipeline_orders import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    StageOrder,
    dual_pipe_order,
    dual_pipe_rounds,
    dual_pipe_v_rounds,
    gpipe_order,
    one_f_one_b_order,
    order_of_rounds,
    pairs_of_rounds,
    zero_bubble_order,
    zero_bubble_v_order,
)

__all__ = [
    "BACKWARD",
    "CLASSIC_SCHEDULES",
    "FORWARD",
    "INPUT_GRADIENT",
    "SCHEDULES",
    "WEIGHT_GRADIENT",
    "Program",
    "StageOrder",
    "build_program",
    "micro_batches_in_flight",
    "overlapped_pairs",
    "stage_order",
]

CLASSIC_SCHEDULES: tuple[str, ...] = ("gpipe", "one_f_one_b", "interleaved_one_f_one_b")
"""Schedules that run both gradients of a backward at once, on chunks placed in a loop."""
SCHEDULES: tuple[str, ...] = get_args(PipelineScheduleName)

IN_FLIGHT_ROUNDS = 4
"""Micro-batches per stage after which a longer step holds no more."""


@dataclass(frozen=True)
class Program:
    """A schedule unrolled: one node per (phase, chunk, micro-batch), grouped into levels.

    Nodes of a level depend only on earlier levels. Predecessor ``n_nodes`` stands for none (finished at time 0). Node
    number = (slot * chunks + chunk) * micro_batches + micro_batch, slot 0 forwards, 1 backwards or input gradients, 2
    weight gradients; weight gradients that run with their input gradient are no nodes of their own.

    Attributes
    ----------
    stages, virtual_stages, micro_batches : int
        Dimensions of the schedule.
    placement : ChunkPlacement
        Which stage holds which chunk.
    levels : tuple of ndarray of shape (n_level,)
        Node numbers of each level.
    stage_before : ndarray of shape (n_nodes,)
        The node that runs before it, or before its pair, on the same stage.
    needs : ndarray of shape (n_nodes,)
        The node whose result it needs: of another chunk; its own forward, for the last chunk's backward; its own input
        gradient, for a weight gradient.
    duration_row : ndarray of shape (n_nodes,)
        Row of the duration table: phase * chunks + chunk in model order; phases as FORWARD, BACKWARD, INPUT_GRADIENT,
        WEIGHT_GRADIENT.
    hops : ndarray of shape (n_nodes,)
        1 where ``needs`` is on another stage, so a transfer lies between; else 0.
    partner : ndarray of shape (n_nodes,)
        The node that runs as one with it (``overlapped_pairs``): both start when both can, both end when both are done;
        ``n_nodes`` where none.
    stage : ndarray of shape (n_nodes,)
        Stage that runs it; -1 where there is no such node.
    first_of_stage, last_of_stage : ndarray of shape (stages,)
        First and last node of each stage.
    """

    stages: int
    virtual_stages: int
    micro_batches: int
    placement: ChunkPlacement
    levels: tuple[npt.NDArray[np.int64], ...]
    stage_before: npt.NDArray[np.int64]
    needs: npt.NDArray[np.int64]
    duration_row: npt.NDArray[np.int64]
    hops: npt.NDArray[np.float64]
    partner: npt.NDArray[np.int64]
    stage: npt.NDArray[np.int64]
    first_of_stage: npt.NDArray[np.int64]
    last_of_stage: npt.NDArray[np.int64]


def stage_order(schedule: str, stage: int, stages: int, virtual_stages: int, micro_batches: int) -> StageOrder:
    """Order in which one stage runs its (phase, micro-batch, chunk of the stage).

    Phases are FORWARD; BACKWARD, both gradients at once; or INPUT_GRADIENT and WEIGHT_GRADIENT apart. Which chunk of
    the model a stage's chunk is, and in which direction it is passed, is ``chunk_placement``. The rules and their
    sources are in ``pipeline_orders`` and ``pipeline_building_blocks``.

    Raises
    ------
    ValueError
        If the schedule is unknown, or does not exist for these stages, chunks and micro-batches.

    Examples
    --------
    >>> [f"{'FBIW'[phase]}{micro_batch}" for phase, micro_batch, _ in stage_order("one_f_one_b", 0, 2, 1, 3)]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    >>> [f"{'FBIW'[phase]}{micro_batch}" for phase, micro_batch, _ in stage_order("zb_h1", 1, 2, 1, 3)]
    ['F0', 'I0', 'F1', 'I1', 'W0', 'F2', 'I2', 'W1', 'W2']
    """
    chunk_placement(schedule, stages, virtual_stages)
    match schedule:
        case "gpipe":
            return gpipe_order(micro_batches)
        case "one_f_one_b":
            return one_f_one_b_order(stage, stages, 1, micro_batches)
        case "interleaved_one_f_one_b":
            return one_f_one_b_order(stage, stages, virtual_stages, micro_batches)
        case "zb_h1" | "zb_h2":
            return zero_bubble_order(stage, stages, micro_batches, trips=1 if schedule == "zb_h1" else 2)
        case "zb_v":
            return zero_bubble_v_order(stage, stages, micro_batches)
        case "v_half" | "v_min":
            return list(squeezed_orders(schedule, stages, micro_batches)[stage])
        case "dualpipe":
            return dual_pipe_order(stage, stages, micro_batches)
        case "dualpipe_v":
            return order_of_rounds(dual_pipe_v_rounds(stage, stages, micro_batches))
        case _:
            raise ValueError(f"unknown pipeline schedule {schedule!r}")


def overlapped_pairs(schedule: str, stage: int, stages: int, micro_batches: int) -> list[int]:
    """Places in ``stage_order`` of forwards that run overlapped with the backward after them: as one operation.

    A pair starts when the inputs of both are there; what either has computed leaves when both have ended. Its time is
    that of the two in turn, each with the communication that the stack hides: pairs of DualPipe and DualPipeV are how
    DeepSeek hides it. All other schedules have none.
    """
    match schedule:
        case "dualpipe":
            return pairs_of_rounds(dual_pipe_rounds(stage, stages, micro_batches))
        case "dualpipe_v":
            return pairs_of_rounds(dual_pipe_v_rounds(stage, stages, micro_batches))
        case _:
            return []


@lru_cache(maxsize=512)
def build_program(schedule: str, stages: int, virtual_stages: int, micro_batches: int) -> Program:
    """Unroll a schedule and sort its nodes into levels.

    Raises
    ------
    ValueError
        If the schedule cannot run: some node waits for ever (deadlock), or interleaving with micro-batches that are no
        multiple of the stages.
    """
    if schedule in CLASSIC_SCHEDULES and virtual_stages > 1 and micro_batches % stages:
        raise ValueError(f"interleaving needs micro-batches ({micro_batches}) in multiples of the stages ({stages})")
    placement = chunk_placement(schedule, stages, virtual_stages)
    orders = [stage_order(schedule, stage, stages, virtual_stages, micro_batches) for stage in range(stages)]
    slots = 3 if any(phase == WEIGHT_GRADIENT for order in orders for phase, *_ in order) else 2
    n_nodes = slots * placement.chunks * micro_batches
    before, partner = np.full((2, n_nodes), n_nodes, dtype=np.int64)
    stage_of, rows = np.full(n_nodes, -1, dtype=np.int64), np.zeros(n_nodes, dtype=np.int64)
    first, last = np.zeros(stages, dtype=np.int64), np.zeros(stages, dtype=np.int64)
    for stage, order in enumerate(orders):
        phase, micro_batch, local = np.array(order, dtype=np.int64).T
        chunk = placement.held[stage, local]
        nodes = (_SLOT[phase] * placement.chunks + chunk) * micro_batches + micro_batch
        before[nodes[1:]] = nodes[:-1]
        forward = np.array(overlapped_pairs(schedule, stage, stages, micro_batches), dtype=np.int64)
        before[nodes[forward + 1]] = before[nodes[forward]]
        partner[nodes[forward]], partner[nodes[forward + 1]] = nodes[forward + 1], nodes[forward]
        stage_of[nodes], rows[nodes] = stage, phase * placement.chunks + chunk
        first[stage], last[stage] = nodes[0], nodes[-1]
    needs = _needed_nodes(slots, placement.chunks, micro_batches)
    source_stage = np.append(stage_of, -1)[needs]
    hops = ((needs < n_nodes) & (source_stage != stage_of)).astype(np.float64)
    levels = _levels(before, needs, partner)
    present = tuple(nodes for level in levels if len(nodes := level[stage_of[level] >= 0]))
    return Program(
        stages=stages,
        virtual_stages=virtual_stages,
        micro_batches=micro_batches,
        placement=placement,
        levels=present,
        stage_before=before,
        needs=needs,
        duration_row=rows,
        hops=hops,
        partner=partner,
        stage=stage_of,
        first_of_stage=first,
        last_of_stage=last,
    )


_SLOT = np.array([0, 1, 1, 2])


def _needed_nodes(slots: int, chunks: int, micro_batches: int) -> npt.NDArray[np.int64]:
    """Node whose result each node needs, for the same micro-batch; ``n_nodes`` where none."""
    n_nodes = slots * chunks * micro_batches
    number = np.arange(n_nodes).reshape(slots, chunks, micro_batches)
    needs = np.full_like(number, n_nodes)
    needs[0, 1:] = number[0, :-1]
    needs[1, :-1] = number[1, 1:]
    needs[1, -1] = number[0, -1]
    needs[2:] = number[1:2]
    return needs.ravel()


def _levels(
    before: npt.NDArray[np.int64], needs: npt.NDArray[np.int64], partner: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], ...]:
    """Sort nodes by longest chain of predecessors, pairs together; refuse cycles.

    A level is what waits for nothing once the levels before it are done, so each edge is looked at once.
    """
    n_nodes = len(before)
    sources = np.concatenate([before, needs, np.append(needs, n_nodes)[partner]])
    targets = np.tile(np.arange(n_nodes), 3)
    sources, targets = sources[sources < n_nodes], targets[sources < n_nodes]
    missing = np.bincount(targets, minlength=n_nodes)
    by_source = targets[np.argsort(sources, kind="stable")]
    bounds = np.append(0, np.cumsum(np.bincount(sources, minlength=n_nodes))).tolist()
    levels, ready = [], np.flatnonzero(missing == 0)
    while len(ready):
        levels.append(ready)
        followers = np.concatenate([by_source[bounds[node] : bounds[node + 1]] for node in ready.tolist()])
        np.subtract.at(missing, followers, 1)
        ready = np.unique(followers[missing[followers] == 0])
    if sum(map(len, levels)) < n_nodes:
        raise ValueError("the schedule deadlocks: some operation waits for itself")
    return tuple(levels)


def micro_batches_in_flight(
    schedule: str, stages: int, virtual_stages: int, micro_batches: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Most chunk activations a stage holds at once, over the chunks it holds.

    A chunk's activations are held from its forward to its backward, or to its weight gradient where that runs apart:
    it reads the inputs of the linear layers, nearly all there is with fused attention (32 of 34 bytes per element in
    arXiv:2401.10241, table 1).

    Returns
    -------
    ndarray of shape (stages, n_cases)
        GPipe: m. 1F1B: min(m, p - s). Interleaved: min(m * v, 2 (p - s - 1) + (v - 1) p + 1) / v (arXiv:2205.05198).
        ZB-H1: at most p; ZB-H2: 2p - 1; ZB-V: p; V-Half: (p + 2) // 2; V-Min: (p + 4) // 3 (arXiv:2401.10241,
        arXiv:2405.15362). DualPipe: (p + 1) / 2 of its two chunks, p + 1 of one (arXiv:2412.19437, table 2); DualPipeV:
        p + 1 / 2. All but the first three are counted from the order.
    """
    stage = np.arange(stages, dtype=np.float64)[:, None]
    if schedule == "gpipe":
        return np.broadcast_to(micro_batches, (stages, len(micro_batches))).copy()
    if schedule == "one_f_one_b" or (schedule in CLASSIC_SCHEDULES and virtual_stages == 1):
        return np.minimum(micro_batches, stages - stage)
    if schedule == "interleaved_one_f_one_b":
        chunks = 2 * (stages - stage - 1) + (virtual_stages - 1) * stages + 1
        return np.minimum(micro_batches * virtual_stages, chunks) / virtual_stages
    counts, inverse = np.unique(np.rint(micro_batches).astype(np.int64), return_inverse=True)
    longest = IN_FLIGHT_ROUNDS * stages
    held = [_counted_in_flight(schedule, stages, virtual_stages, min(int(count), longest)) for count in counts]
    return np.array(held).T[:, inverse]


@lru_cache(maxsize=512)
def _counted_in_flight(schedule: str, stages: int, virtual_stages: int, micro_batches: int) -> tuple[float, ...]:
    """What ``micro_batches_in_flight`` counts from the orders, by stage."""
    change = np.array([1, -1, 0, -1])
    held_chunks = chunk_placement(schedule, stages, virtual_stages).held.shape[1]
    most = []
    for stage in range(stages):
        phases = np.array(stage_order(schedule, stage, stages, virtual_stages, micro_batches))[:, 0]
        most.append(float(np.cumsum(change[phases]).max()) / held_chunks)
    return tuple(most)
