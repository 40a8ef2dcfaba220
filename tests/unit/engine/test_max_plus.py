from __future__ import annotations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.max_plus import gpipe_finish_s, pipeline_finish_s, program_finish_s
from moesim.structure.pipeline_schedules import BACKWARD, FORWARD, build_program, stage_order

EXACT = 1e-12
FloatArray = np.ndarray


def random_times(generator: np.random.Generator, chunks: int, cases: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Forward, backward and hop times; small whole numbers in half of the cases, so that ties and periods occur."""
    whole = generator.random(cases) < 0.5
    forward = np.where(whole, generator.integers(1, 5, (chunks, cases)), generator.uniform(0.1, 2.0, (chunks, cases)))
    backward = np.where(whole, generator.integers(1, 9, (chunks, cases)), generator.uniform(0.1, 4.0, (chunks, cases)))
    hop = np.where(whole, generator.integers(0, 3, cases), generator.uniform(0.0, 0.5, cases))
    return forward, backward, hop


def unrolled_finish_s(schedule, stages, virtual, micro_batches, forward, backward, hop):
    program = build_program(schedule, stages, virtual, micro_batches)
    return program_finish_s(program, forward, backward, hop)[program.last_of_stage]


@pytest.mark.parametrize("stages", range(1, 13))
@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b"])
def test_recursion_equals_the_unrolled_program(schedule, stages):
    generator = np.random.default_rng([stages, len(schedule)])
    for micro_batches in (1, 2, 3, stages, stages + 1, 3 * stages, 3 * stages + 1, 5 * stages + 3, 97, 200):
        forward, backward, hop = random_times(generator, stages, 24)
        expected = unrolled_finish_s(schedule, stages, 1, micro_batches, forward, backward, hop)
        counts = np.full(24, micro_batches)
        actual = pipeline_finish_s(schedule, 1, counts, forward, backward, hop)
        np.testing.assert_allclose(actual, expected, rtol=EXACT, err_msg=f"{micro_batches} micro-batches")


@pytest.mark.parametrize("virtual", [2, 3, 4])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
def test_interleaved_recursion_equals_the_unrolled_program(stages, virtual):
    generator = np.random.default_rng([stages, virtual])
    for rounds in (1, 2, 3, 5, 7, 11, 25):
        micro_batches = rounds * stages
        forward, backward, hop = random_times(generator, stages * virtual, 64)
        arguments = ("interleaved_one_f_one_b", stages, virtual, micro_batches, forward, backward, hop)
        expected = unrolled_finish_s(*arguments)
        counts = np.full(64, micro_batches)
        actual = pipeline_finish_s("interleaved_one_f_one_b", virtual, counts, forward, backward, hop)
        np.testing.assert_allclose(actual, expected, rtol=EXACT, err_msg=f"{micro_batches} micro-batches")


@settings(deadline=None, max_examples=150)
@given(
    st.integers(2, 4),
    st.integers(2, 3),
    st.integers(7, 16),
    st.integers(0, 2**32 - 1),
)
def test_skipped_periods_of_interleaving_are_exact_for_durations_that_tie(stages, virtual, rounds, seed):
    """Small whole durations are where a pipeline can look periodic for a period before it is."""
    generator = np.random.default_rng(seed)
    chunks = stages * virtual
    forward = generator.integers(0, 3, (chunks, 32)).astype(float)
    backward = generator.integers(0, 4, (chunks, 32)).astype(float)
    hop = generator.integers(0, 3, 32).astype(float)
    micro_batches = rounds * stages
    schedule = "interleaved_one_f_one_b"
    expected = unrolled_finish_s(schedule, stages, virtual, micro_batches, forward, backward, hop)
    actual = pipeline_finish_s(schedule, virtual, np.full(32, micro_batches), forward, backward, hop)
    np.testing.assert_allclose(actual, expected, rtol=EXACT)


def test_skipped_periods_are_exact_where_transfers_outlast_equal_stages():
    """Two stages of two equal chunks, hops five times as long: two periods alike do not make a steady state."""
    ones, hop = np.ones((4, 1)), np.array([5.0])
    schedule = "interleaved_one_f_one_b"
    expected = unrolled_finish_s(schedule, 2, 2, 24, ones, ones, hop)
    actual = pipeline_finish_s(schedule, 2, np.array([24]), ones, ones, hop)
    np.testing.assert_allclose(actual, expected, rtol=EXACT)


def test_many_cases_with_different_micro_batches_equal_each_case_alone():
    generator = np.random.default_rng(5)
    forward, backward, hop = random_times(generator, 6, 300)
    counts = generator.integers(1, 200, 300)
    together = pipeline_finish_s("one_f_one_b", 1, counts, forward, backward, hop)
    for case in range(300):
        one = slice(case, case + 1)
        alone = pipeline_finish_s("one_f_one_b", 1, counts[one], forward[:, one], backward[:, one], hop[one])
        np.testing.assert_allclose(together[:, one], alone, rtol=EXACT)


def test_thousands_of_micro_batches_equal_the_unrolled_program():
    generator = np.random.default_rng(6)
    forward, backward, hop = random_times(generator, 3, 8)
    for micro_batches in (1000, 4001):
        expected = unrolled_finish_s("one_f_one_b", 3, 1, micro_batches, forward, backward, hop)
        actual = pipeline_finish_s("one_f_one_b", 1, np.full(8, micro_batches), forward, backward, hop)
        np.testing.assert_allclose(actual, expected, rtol=EXACT)


@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (2, 1), (4, 2), (4, 64), (12, 200)])
def test_equal_stages_take_m_plus_p_minus_1_rounds_and_idle_p_minus_1_of_m(schedule, stages, micro_batches):
    forward, backward = 3.0, 5.0
    ones = np.ones((stages, 1))
    finish = pipeline_finish_s(
        schedule, 1, np.array([micro_batches]), forward * ones, backward * ones, np.zeros(1)
    ).max()
    busy = micro_batches * (forward + backward)
    assert finish == pytest.approx((micro_batches + stages - 1) * (forward + backward), rel=EXACT)
    assert (finish - busy) / busy == pytest.approx((stages - 1) / micro_batches, rel=EXACT, abs=EXACT)


@pytest.mark.parametrize("virtual", [2, 3, 4])
@pytest.mark.parametrize(("stages", "rounds"), [(2, 1), (2, 6), (4, 3), (8, 16)])
def test_interleaving_divides_the_bubble_of_equal_stages_by_the_chunks(stages, rounds, virtual):
    micro_batches = np.array([stages * rounds])
    ones = np.ones((stages * virtual, 1))
    finish = pipeline_finish_s(
        "interleaved_one_f_one_b", virtual, micro_batches, ones / virtual, 2 * ones / virtual, np.zeros(1)
    )
    bubble = finish.max() - 3.0 * micro_batches[0]
    assert bubble == pytest.approx((stages - 1) * 3.0 / virtual, rel=1e-9)


def test_a_formula_with_the_mean_stage_misses_one_heavy_stage_by_more_than_ten_percent():
    """Stage 3 of 8 takes 1.5 times the others: each round waits for it, so (m + p - 1) * mean is far too short."""
    forward, backward = np.ones((8, 1)), np.full((8, 1), 2.0)
    forward[3], backward[3] = 1.5, 3.0
    finish = pipeline_finish_s("one_f_one_b", 1, np.array([32]), forward, backward, np.zeros(1)).max()
    mean = (32 + 7) * float((forward + backward).mean())
    assert mean < 0.9 * finish
    # Exactly: the heavy stage is busy for 32 * 4.5 s, begins after 3 forwards, ends 3 backwards before the step;
    # and its first micro-batch is back from the four stages after it in 12 s, of which four forwards of 1.5 s fill 6.
    assert finish == pytest.approx(32 * 4.5 + 3 * 1.0 + 3 * 2.0 + 12.0 - 4 * 1.5, rel=EXACT)


def longest_path_s(schedule, stages, virtual, micro_batches, forward, backward, hop):
    """End of each stage by networkx: the order on a stage and the flow of micro-batches, written down anew."""
    graph = networkx.DiGraph()
    chunks = stages * virtual
    duration = {
        (phase, chunk, index): (forward, backward)[phase][chunk]
        for phase in (FORWARD, BACKWARD)
        for chunk in range(chunks)
        for index in range(micro_batches)
    }
    graph.add_nodes_from([*duration, "start"])
    lasts = []
    for stage in range(stages):
        before = "start"
        for phase, index, local in stage_order(schedule, stage, stages, virtual, micro_batches):
            node = (phase, local * stages + stage, index)
            graph.add_edge(before, node, weight=duration[node])
            before = node
        lasts.append(before)
    for phase, chunk, index in duration:
        after = (FORWARD, chunk + 1, index) if phase == FORWARD else (BACKWARD, chunk - 1, index)
        if after in duration:
            delay = hop if stages > 1 else 0.0
            _raise_weight(graph, (phase, chunk, index), after, delay + duration[after])
    for index in range(micro_batches):
        turn = (BACKWARD, chunks - 1, index)
        _raise_weight(graph, (FORWARD, chunks - 1, index), turn, duration[turn])
    ends = {"start": 0.0}
    for node in networkx.topological_sort(graph):
        incoming = [ends[before] + weight for before, _, weight in graph.in_edges(node, data="weight")]
        ends[node] = max(incoming, default=0.0)
    return np.array([ends[last] for last in lasts])


def _raise_weight(graph, start, end, weight):
    known = graph.get_edge_data(start, end, {"weight": weight})["weight"]
    graph.add_edge(start, end, weight=max(known, weight))


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(["gpipe", "one_f_one_b", "interleaved_one_f_one_b"]),
    st.integers(1, 5),
    st.integers(2, 3),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
)
def test_finish_times_equal_the_longest_path(schedule, stages, virtual, count, seed):
    if schedule == "interleaved_one_f_one_b":
        count *= stages
    else:
        virtual = 1
    generator = np.random.default_rng(seed)
    forward, backward, hop = random_times(generator, stages * virtual, 1)
    expected = longest_path_s(schedule, stages, virtual, count, forward[:, 0], backward[:, 0], float(hop[0]))
    actual = pipeline_finish_s(schedule, virtual, np.array([count]), forward, backward, hop)[:, 0]
    np.testing.assert_allclose(actual, expected, rtol=EXACT)


def test_interleaving_without_virtual_stages_is_the_program_of_its_name():
    """One chunk per stage: recursion and unrolled program must agree on what the schedule is."""
    forward, backward, hop = random_times(np.random.default_rng(8), 4, 16)
    expected = unrolled_finish_s("interleaved_one_f_one_b", 4, 1, 12, forward, backward, hop)
    actual = pipeline_finish_s("interleaved_one_f_one_b", 1, np.full(16, 12), forward, backward, hop)
    np.testing.assert_allclose(actual, expected, rtol=EXACT)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_a_longer_operation_never_ends_the_step_earlier(stages, count, seed):
    generator = np.random.default_rng(seed)
    forward, backward, hop = random_times(generator, stages, 16)
    longer = forward.copy()
    longer[generator.integers(stages)] *= 1.5
    for schedule in ("gpipe", "one_f_one_b"):
        before = pipeline_finish_s(schedule, 1, np.full(16, count), forward, backward, hop)
        after = pipeline_finish_s(schedule, 1, np.full(16, count), longer, backward, hop)
        assert (after >= before * (1 - EXACT)).all()


def test_gpipe_of_two_stages_by_hand():
    """F 1, 2, B 3, 1, a hop of 1, two micro-batches: last forward at 6, first stage ends at 6 + 1 + 1 + 3 + 3."""
    forward, backward = np.array([[1.0], [2.0]]), np.array([[3.0], [1.0]])
    finish = gpipe_finish_s(np.array([2]), forward, backward, np.ones(1))
    assert finish[:, 0].tolist() == [14.0, 8.0]
