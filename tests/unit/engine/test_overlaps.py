"""Overlap programs: closed forms, bounds, and work that is slowed but not lost."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine.overlaps import (
    bucketed_reduction_s,
    interleaved_block,
    overlapped_block,
    prefetched_s,
    run_overlap,
    task_seconds,
)
from moesim.errors import SimulationError
from moesim.structure.overlap_programs import (
    COMMUNICATION,
    COMPUTE,
    SEGMENTS,
    OverlapProgram,
    Task,
    chunked_program,
    interleaved_program,
)

NUM_CASES = 200
DEGREES = (1, 2, 3, 4, 8, 16)
COMPUTED = ("head", "experts", "tail", "shared_first", "shared_second")


def drawn(seed, names=SEGMENTS, low=0.0):
    dice = np.random.default_rng(seed)
    return {name: dice.uniform(low, 1.0, NUM_CASES) for name in names}


def cut(seconds, latency_s=0.0):
    """Segments whose moved parts are cut evenly; an exchange also has a latency."""

    def parts(chunks):
        found = dict(seconds)
        for name in ("exchange_in", "experts", "exchange_out"):
            extra = 0.0 if name == "experts" else latency_s
            found[name] = seconds[name] / chunks + extra
        return found

    return parts


def total(seconds, names):
    return sum(seconds[name] for name in names)


@pytest.mark.parametrize("chunks", DEGREES)
def test_even_chunks_take_the_textbook_time(chunks):
    """max(2 a, g + 2 a/c) between what nothing overlaps with."""
    dice = np.random.default_rng(1)
    g, a, around = dice.uniform(0.01, 1.0, (3, NUM_CASES))
    seconds = {"head": around, "exchange_in": a, "experts": g, "exchange_out": a, "tail": around}
    expected = np.where(chunks == 1, 2 * a + g, np.maximum(2 * a, g + 2 * a / chunks)) + 2 * around
    np.testing.assert_allclose(overlapped_block(cut(seconds), [chunks]).time_s, expected, rtol=1e-12)


@pytest.mark.parametrize("has_shared_overlap", [False, True])
@pytest.mark.parametrize("chunks", DEGREES)
def test_times_lie_between_the_longest_stream_and_the_sum(chunks, has_shared_overlap):
    seconds = drawn(2)
    found = overlapped_block(cut(seconds), [chunks], has_shared_overlap=has_shared_overlap)
    compute, exchanges = total(seconds, COMPUTED), total(seconds, ("exchange_in", "exchange_out"))
    assert (found.time_s >= np.maximum(compute, exchanges) * (1 - 1e-12)).all()
    assert (found.time_s <= (compute + exchanges) * (1 + 1e-12)).all()
    np.testing.assert_allclose(found.exposed_s + found.hidden_s, exchanges)
    np.testing.assert_allclose(found.compute_s, compute)


def test_one_chunk_overlaps_nothing():
    seconds = drawn(3)
    found = overlapped_block(cut(seconds), [1], loss=0.5)
    np.testing.assert_allclose(found.time_s, total(seconds, SEGMENTS))
    np.testing.assert_allclose(found.hidden_s, 0.0)


def test_shared_experts_run_during_the_exchanges():
    seconds = drawn(4)
    found = overlapped_block(cut(seconds), [1], has_shared_overlap=True)
    expected = total(seconds, ("head", "experts", "tail"))
    expected += np.maximum(seconds["exchange_in"], seconds["shared_first"])
    expected += np.maximum(seconds["exchange_out"], seconds["shared_second"])
    np.testing.assert_allclose(found.time_s, expected)


@pytest.mark.parametrize("latency_s", [0.0, 0.03])
def test_auto_is_the_best_degree(latency_s):
    parts = cut(drawn(5), latency_s)
    times = np.stack([overlapped_block(parts, [degree]).time_s for degree in DEGREES])
    best = overlapped_block(parts, DEGREES)
    np.testing.assert_array_equal(best.time_s, times.min(axis=0))
    assert (best.time_s == times[[DEGREES.index(int(degree)) for degree in best.chunks], np.arange(NUM_CASES)]).all()
    assert len(np.unique(best.chunks)) > (2 if latency_s else 1)


@pytest.mark.parametrize("has_shared_overlap", [False, True])
@pytest.mark.parametrize("program", [chunked_program, interleaved_program])
def test_without_loss_streams_follow_max_plus(program, has_shared_overlap):
    """An independent evaluation: each task starts when its stream and what it needs are done."""
    unrolled = program(3, has_shared_overlap=has_shared_overlap)
    work_s = np.random.default_rng(6).uniform(0.0, 1.0, (len(unrolled.tasks), NUM_CASES))
    finish = np.zeros_like(work_s)
    free = {COMPUTE: np.zeros(NUM_CASES), COMMUNICATION: np.zeros(NUM_CASES)}
    for index, task in enumerate(unrolled.tasks):
        start = np.maximum.reduce([free[task.stream], *(finish[needed] for needed in task.needs)])
        finish[index] = free[task.stream] = start + work_s[index]
    times = run_overlap(unrolled, work_s)
    np.testing.assert_allclose(times.finish_s, finish, rtol=1e-12)
    np.testing.assert_allclose(times.time_s, finish.max(axis=0), rtol=1e-12)
    np.testing.assert_allclose(times.slowed_s, 0.0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_slowed_work_is_not_lost(seed):
    """Computing at full speed alone and at 1 - loss beside communication does exactly the work there is."""
    program = chunked_program(4, has_shared_overlap=True)
    work_s = np.random.default_rng(seed).uniform(0.0, 1.0, (len(program.tasks), NUM_CASES))
    loss = np.random.default_rng(seed + 10).uniform(0.0, 0.6, NUM_CASES)
    slowed, free = run_overlap(program, work_s, loss), run_overlap(program, work_s)
    computed = (slowed.compute_s - slowed.hidden_s) + slowed.hidden_s * (1.0 - loss)
    np.testing.assert_allclose(computed, work_s[program.stream_order[COMPUTE]].sum(axis=0))
    np.testing.assert_allclose(slowed.slowed_s, slowed.hidden_s * loss, atol=1e-12)
    assert (slowed.time_s >= free.time_s * (1 - 1e-12)).all()
    assert (slowed.time_s <= work_s.sum(axis=0) * (1 + 1e-12)).all()
    assert (slowed.time_s > free.time_s * 1.01).any()


def test_slowing_by_hand():
    """1 s of shared experts beside 1 s of exchange at half speed: half of it is left when the exchange ends."""
    program = chunked_program(1, has_shared_overlap=True)
    seconds = {"exchange_in": np.ones(1), "shared_first": np.ones(1), "experts": np.ones(1)}
    times = run_overlap(program, task_seconds(program, [seconds]), 0.5)
    assert (times.time_s[0], times.slowed_s[0], times.hidden_s[0]) == pytest.approx((2.5, 0.5, 1.0))


def test_two_micro_batches_hide_exchanges_that_are_shorter_than_computing():
    """Head and tail 2 s together, experts 2 s, 1 s each way: per block and pair the 8 s that both compute."""
    seconds = {"head": np.ones(1), "tail": np.ones(1), "experts": 2 * np.ones(1)}
    seconds |= {"exchange_in": np.ones(1), "exchange_out": np.ones(1)}
    found = interleaved_block(seconds, seconds)
    assert (found.time_s[0], found.exposed_s[0], found.hidden_s[0]) == pytest.approx((8.0, 0.0, 4.0))


def test_two_micro_batches_lie_between_the_longest_stream_and_the_sum():
    first, second = drawn(7), drawn(8)
    found = interleaved_block(first, second)
    compute = total(first, COMPUTED) + total(second, COMPUTED)
    exchanges = total(first, ("exchange_in", "exchange_out")) + total(second, ("exchange_in", "exchange_out"))
    assert (found.time_s >= np.maximum(compute, exchanges) * (1 - 1e-9)).all()
    assert (found.time_s <= (compute + exchanges) * (1 + 1e-9)).all()
    np.testing.assert_allclose(found.exposed_s + found.hidden_s, exchanges)


@pytest.mark.parametrize("loss", [0.0, 0.2])
def test_the_pair_is_steady_after_the_first_blocks(loss):
    first, second = drawn(9), drawn(10)
    found = interleaved_block(first, second, loss=loss)
    ends = []
    for layers in (20, 40):
        program = interleaved_program(layers)
        ends.append(run_overlap(program, task_seconds(program, [first, second]), loss).time_s)
    np.testing.assert_allclose(found.time_s, (ends[1] - ends[0]) / 20, rtol=0.02)


def bucket_program(buckets):
    """Backward in as many parts as buckets, each reduced when its part is done."""
    tasks = [Task("experts", COMPUTE, parts=buckets) for _ in range(buckets)]
    tasks += [Task("exchange_out", COMMUNICATION, (index,), buckets) for index in range(buckets)]
    return OverlapProgram(tuple(tasks))


def prefetch_program(layers):
    """Gathers on one stream, the next one with the begin of the layer before it, that is with its own gather's end."""
    tasks = [Task("exchange_in", COMMUNICATION)]
    for layer in range(layers):
        tasks.append(Task("experts", COMPUTE, (2 * layer,)))
        if layer < layers - 1:
            tasks.append(Task("exchange_in", COMMUNICATION, (2 * layer - 1,) if layer else ()))
    return OverlapProgram(tuple(tasks))


@pytest.mark.parametrize("loss", [0.0, 0.3])
@pytest.mark.parametrize("buckets", [1, 2, 7])
def test_buckets_take_the_time_of_their_program(buckets, loss):
    backward_s, bucket_s = np.random.default_rng(11).uniform(0.0, 1.0, (2, NUM_CASES))
    program = bucket_program(buckets)
    parts = {"experts": backward_s / buckets, "exchange_out": bucket_s}
    times = run_overlap(program, task_seconds(program, [parts]), loss)
    time_s, hidden_s = bucketed_reduction_s(backward_s, bucket_s, np.full(NUM_CASES, float(buckets)), loss)
    np.testing.assert_allclose(time_s, times.time_s)
    np.testing.assert_allclose(hidden_s, times.hidden_s, atol=1e-12)


@pytest.mark.parametrize("loss", [0.0, 0.3])
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_prefetching_takes_the_time_of_its_program(layers, loss):
    compute_s, gather_s = np.random.default_rng(12).uniform(0.0, 1.0, (2, NUM_CASES))
    program = prefetch_program(layers)
    parts = {"experts": compute_s / layers, "exchange_in": gather_s / layers}
    times = run_overlap(program, task_seconds(program, [parts]), loss)
    found = prefetched_s(compute_s, gather_s, np.full(NUM_CASES, float(layers)), loss=loss)
    np.testing.assert_allclose(found, times.time_s)


@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_gathers_and_reductions_of_layers_hide_but_for_the_first_and_the_last(loss):
    """Long compute: a gather and a reduction stand alone, the others only slow; short compute: all of them count."""
    one, layers = np.ones(1), np.full(1, 10.0)
    slowed = loss * (9 + 9) * 0.1
    assert prefetched_s(100 * one, one, layers, one, loss=loss) == pytest.approx(100 + 0.1 + 0.1 + slowed)
    assert prefetched_s(0 * one, one, layers, one, loss=loss) == pytest.approx(2.0)


def test_tasks_that_wait_for_each_other_are_noticed():
    program = OverlapProgram((Task("head", COMPUTE, (1,)), Task("exchange_in", COMMUNICATION, (0,))))
    with pytest.raises(SimulationError, match="wait for each other"):
        run_overlap(program, np.ones((2, 1)))


@pytest.mark.parametrize(("work", "loss"), [(1.0, 1.0), (1.0, -0.1), (-1.0, 0.0), (1.0, np.nan)])
def test_impossible_work_and_losses_are_refused(work, loss):
    with pytest.raises(ValueError, match="losses from 0"):
        run_overlap(OverlapProgram((Task("head", COMPUTE),)), np.full((1, 1), work), loss)
