"""How many micro-batches' activations of each of its chunks a stage holds at once, from the order it runs them in."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moesim.structure.chunk_placement import chunk_placement
from moesim.structure.columns import FloatArray
from moesim.structure.pipeline_orders import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, StageOrder
from moesim.structure.pipeline_schedules import IN_FLIGHT_ROUNDS, stage_order


@lru_cache(maxsize=4096)
def held_at_once(schedule: str, stages: int, virtual_stages: int, micro_batches: int) -> tuple[FloatArray, ...]:
    """Counts of micro-batches that may be the most: no other moment of the stage holds as many of every chunk.

    Parameters
    ----------
    schedule : str
        A pipeline schedule.
    stages, virtual_stages : int
        Stages, and chunks of one where the schedule interleaves.
    micro_batches : int
        Of a step; from ``IN_FLIGHT_ROUNDS`` per stage on a longer step holds no more (but under GPipe).

    Returns
    -------
    tuple of ndarray of shape (n_moments, chunks_of_stage + 1)
        By stage. Activations of a chunk count from its forward to the end of its last gradient; the last column counts
        losses: of the model's last chunk, from its forward to the gradient of its activations.

    Examples
    --------
    Two chunks on each of two stages: the first stage holds three of its first chunk and two of its second, or four and
    one; which is more depends on the chunks.

    >>> first, _ = held_at_once("interleaved_one_f_one_b", 2, 2, 8)
    >>> first.tolist()
    [[3.0, 2.0, 0.0], [4.0, 1.0, 0.0]]
    """
    placement = chunk_placement(schedule, stages, virtual_stages)
    if schedule == "gpipe":  # every micro-batch's loss waits for its backward pass
        return tuple(np.array([[1.0, stage == stages - 1]]) * micro_batches for stage in range(stages))
    micro_batches = min(micro_batches, IN_FLIGHT_ROUNDS * stages)
    found = []
    for stage in range(stages):
        if schedule == "interleaved_one_f_one_b":
            moments = _interleaved_moments(stage, stages, virtual_stages, micro_batches)
        else:
            order = stage_order(schedule, stage, stages, virtual_stages, micro_batches)
            moments = _moments(order, placement.held[stage] == placement.chunks - 1)
        found.append(_undominated(np.unique(moments, axis=0)))
    return tuple(found)


def _moments(order: StageOrder, is_last: npt.NDArray[np.bool_]) -> FloatArray:
    """Counts after each operation of a stage; ``is_last`` of its chunks is the model's last one."""
    phase, _, chunk = np.array(order, dtype=np.int64).T
    change = np.zeros((len(order), len(is_last) + 1))
    begins, ends = phase == FORWARD, (phase == BACKWARD) | (phase == WEIGHT_GRADIENT)
    change[np.arange(len(order)), chunk] = begins * 1.0 - ends
    change[:, -1] = is_last[chunk] * (begins * 1.0 - ((phase == BACKWARD) | (phase == INPUT_GRADIENT)))
    return np.asarray(np.cumsum(change, axis=0))


def _interleaved_moments(stage: int, stages: int, virtual_stages: int, micro_batches: int) -> FloatArray:
    """The same of an interleaved stage after each forward, when it holds most: sweeps ask for many of them."""
    total = micro_batches * virtual_stages
    index = np.arange(total)
    forward = index % (stages * virtual_stages) // stages
    begun = np.cumsum(forward[:, None] == np.arange(virtual_stages), axis=0)
    ended = np.concatenate([np.zeros((1, virtual_stages)), begun[:, ::-1]])  # backwards take the chunks the other way
    warm_up = min(2 * (stages - stage - 1) + (virtual_stages - 1) * stages, total)
    held = begun - ended[np.maximum(index - warm_up, 0)]
    losses = held[:, -1:] * (stage == stages - 1)
    return np.concatenate([held, losses], axis=1)


def _undominated(moments: FloatArray) -> FloatArray:
    """Rows, all different, that no other row reaches or exceeds in every column."""
    at_least = np.asarray((moments[:, None, :] >= moments[None, :, :]).all(axis=2))
    return np.asarray(moments[at_least.sum(axis=0) == 1])  # by itself alone


def most_held(
    schedule: str,
    stages: int,
    virtual_stages: int,
    micro_batches: FloatArray,
    kept: FloatArray,
    loss: FloatArray,
) -> FloatArray:
    """Most bytes of activations that each stage holds at once.

    Parameters
    ----------
    schedule : str
        A pipeline schedule.
    stages, virtual_stages : int
        As :func:`held_at_once` takes them.
    micro_batches : ndarray of shape (n_cases,)
        Of a step.
    kept : ndarray of shape (chunks, n_cases)
        Bytes of one micro-batch on each chunk of the model.
    loss : ndarray of shape (n_cases,)
        Bytes besides on the last chunk, up to the gradient of its activations.

    Returns
    -------
    ndarray of shape (stages, n_cases)
        Bytes.
    """
    placement = chunk_placement(schedule, stages, virtual_stages)
    counts, inverse = np.unique(np.rint(micro_batches).astype(np.int64), return_inverse=True)
    most = np.zeros((stages, len(micro_batches)))
    for index, count in enumerate(counts.tolist()):
        cases = np.flatnonzero(inverse == index)
        for stage, moments in enumerate(held_at_once(schedule, stages, virtual_stages, count)):
            bytes_of = np.concatenate([kept[placement.held[stage]][:, cases], loss[None, cases]])
            most[stage, cases] = (moments @ bytes_of).max(axis=0)
    return most
