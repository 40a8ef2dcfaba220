from __future__ import annotations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine import max_plus
from moesim.engine.max_plus import gpipe_finish_s, pipeline_finish_s, program_finish_s
from moesim.structure.chunk_placement import FOLDED_SCHEDULES, chunk_placement
from moesim.structure.pipeline_schedules import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    SCHEDULES,
    WEIGHT_GRADIENT,
    build_program,
    overlapped_pairs,
    stage_order,
)

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


APART = SCHEDULES[3:]


def chunks_of(schedule):
    return 2 if schedule in FOLDED_SCHEDULES else 1


def idle_s(schedule, stages, micro_batches, forward=1.0, backward=2.0, weight=1.0):
    """What a step of equal chunks without transfers is longer than its work, and the longest of stages' own spans."""
    virtual = chunks_of(schedule)
    program = build_program(schedule, stages, virtual, micro_batches)
    ones = np.ones((stages * virtual, 1))
    ends = program_finish_s(program, forward * ones, backward * ones, np.zeros(1), weight * ones)[:, 0]
    work = micro_batches * virtual * (forward + backward)
    last = ends[program.last_of_stage]
    begin = ends[program.first_of_stage] - forward
    return last.max() - work, (last - begin).max() - work


class TestPublishedBubbles:
    """Forward, input and weight gradient of equal length (one second) unless said otherwise; no transfers."""

    @pytest.mark.parametrize("stages", range(2, 13))
    def test_zb_h1_idles_a_third_of_one_f_one_b(self, stages):
        """(p - 1) (F + B - W), B the input gradient: arXiv:2401.10241, section 2."""
        idle, _ = idle_s("zb_h1", stages, 3 * stages)
        assert idle == pytest.approx(stages - 1, rel=EXACT)
        assert idle == pytest.approx(idle_s("one_f_one_b", stages, 3 * stages)[0] / 3, rel=EXACT)

    @pytest.mark.parametrize("stages", [2, 4, 8])
    @pytest.mark.parametrize(("forward", "inputs", "weight"), [(1.0, 1.3, 0.7), (1.2, 1.0, 0.8), (1.0, 1.0, 0.5)])
    def test_zb_h1_and_h2_idle_as_published_for_unequal_phases(self, stages, forward, inputs, weight):
        """(p - 1) (F + B - W), and (p - 1) (F + B - 2 W) between a stage's first and last operation; W <= F."""
        idle, _ = idle_s("zb_h1", stages, 4 * stages, forward, inputs + weight, weight)
        assert idle == pytest.approx((stages - 1) * (forward + inputs - weight), rel=1e-9)
        _, own = idle_s("zb_h2", stages, 4 * stages, forward, inputs + weight, weight)
        assert own == pytest.approx((stages - 1) * (forward + inputs - 2 * weight), rel=1e-9)

    @pytest.mark.parametrize("schedule", ["zb_h2", "zb_v"])
    @pytest.mark.parametrize("stages", range(2, 13))
    def test_zb_h2_and_zb_v_idle_only_until_the_first_micro_batch_arrives(self, schedule, stages):
        """No stage waits between its first and its last operation; a step that ends together waits p - 1 forwards."""
        for micro_batches in (2 * stages - 1, 2 * stages, 5 * stages + 1):
            whole, own = idle_s(schedule, stages, micro_batches)
            assert own == pytest.approx(0.0, abs=1e-9)
            assert whole == pytest.approx(stages - 1, rel=EXACT)

    @pytest.mark.parametrize(("schedule", "rounds"), [("v_half", 1 / 2), ("v_min", 2 / 3)])
    @pytest.mark.parametrize("stages", [2, 4, 8, 12, 16])
    def test_v_half_and_v_min_idle_about_as_published(self, schedule, rounds, stages):
        """About p / 2m and 2p / 3m (github.com/sail-sg) of the work, 6 s per micro-batch; not growing with m."""
        idle = idle_s(schedule, stages, 4 * stages)[0]
        assert idle == pytest.approx(rounds * stages * 6, abs=5)
        assert idle == pytest.approx(idle_s(schedule, stages, 10 * stages)[0], rel=EXACT)

    @pytest.mark.parametrize("stages", [2, 4, 8, 12, 16])
    @pytest.mark.parametrize(("forward", "weight"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5), (1.5, 1.1)])
    def test_dualpipe_idles_as_published_where_an_input_gradient_takes_a_forward(self, stages, forward, weight):
        """(p / 2 - 1) (F&B + B - 3 W), B both gradients, F&B a pair in turn: arXiv:2412.19437, table 2; W <= F."""
        backward = forward + weight
        published = (stages / 2 - 1) * (forward + backward + backward - 3 * weight)
        idle = idle_s("dualpipe", stages, 4 * stages, forward, backward, weight)[0]
        assert idle == pytest.approx(published, rel=1e-9, abs=1e-9)
        halved = idle_s("dualpipe_v", stages // 2, 4 * stages, forward, backward, weight)[0]
        assert halved == pytest.approx(published, rel=1e-9, abs=1e-9)


def random_split_times(generator, chunks, cases):
    forward, backward, hop = random_times(generator, chunks, cases)
    return forward, backward, hop, backward * generator.integers(1, 4, (chunks, cases)) / 4


@pytest.mark.parametrize("schedule", APART)
@pytest.mark.parametrize("stages", [2, 4, 6])
def test_skipped_periods_of_gradients_apart_are_exact(schedule, stages):
    generator = np.random.default_rng([stages, len(schedule)])
    virtual = chunks_of(schedule)
    for micro_batches in (13 * stages + stages % 2, 30 * stages + 2):
        times = random_split_times(generator, stages * virtual, 32)
        program = build_program(schedule, stages, virtual, micro_batches)
        expected = program_finish_s(program, *times)[program.last_of_stage]
        actual = pipeline_finish_s(schedule, virtual, np.full(32, micro_batches), *times)
        np.testing.assert_allclose(actual, expected, rtol=EXACT, err_msg=f"{micro_batches} micro-batches")


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(APART), st.integers(2, 4), st.integers(0, 3), st.integers(7, 14), st.integers(0, 2**32 - 1))
def test_skipped_periods_of_gradients_apart_are_exact_for_durations_that_tie(schedule, stages, more, rounds, seed):
    generator = np.random.default_rng(seed)
    stages, virtual = (2 * stages, 1) if schedule == "dualpipe" else (stages, chunks_of(schedule))
    chunks, micro_batches = stages * virtual, 2 * (rounds * stages + more)
    weight = generator.integers(0, 3, (chunks, 16)).astype(float)
    forward = generator.integers(0, 3, (chunks, 16)).astype(float)
    backward, hop = weight + generator.integers(0, 3, (chunks, 16)), generator.integers(0, 3, 16).astype(float)
    program = build_program(schedule, stages, virtual, micro_batches)
    expected = program_finish_s(program, forward, backward, hop, weight)[program.last_of_stage]
    actual = pipeline_finish_s(schedule, virtual, np.full(16, micro_batches), forward, backward, hop, weight)
    np.testing.assert_allclose(actual, expected, rtol=EXACT)


@pytest.mark.parametrize("micro_batches", [1000, 1002, 1026])
def test_stages_between_lighter_ends_repeat_after_other_than_p_micro_batches_and_are_skipped(
    monkeypatch, micro_batches
):
    """DeepSeek-V3's sixteen stages: what limits the rate is a round trip of no multiple of p micro-batches."""
    unrolled = []

    def counted(*arguments):
        unrolled.append(arguments[-1])
        return build_program(*arguments)

    ends_and_inner = ((0.033, 0.047, 0.042), (0.097, 0.156, 0.114), (0.036, 0.079, 0.058))
    forward, backward, weight = (np.array([[first], *[[inner]] * 14, [last]]) for first, inner, last in ends_and_inner)
    times = (forward, backward, np.array([0.0015]), weight)
    program = build_program("dualpipe", 16, 1, micro_batches)
    expected = program_finish_s(program, *times)[program.last_of_stage]
    monkeypatch.setattr(max_plus, "build_program", counted)
    actual = pipeline_finish_s("dualpipe", 1, np.array([micro_batches]), *times)
    np.testing.assert_allclose(actual, expected, rtol=EXACT)
    assert max(unrolled) < micro_batches


def split_longest_path_s(schedule, stages, micro_batches, times):
    """End of each stage by networkx, pairs as one node, what each needs written down anew from the chunks' stages."""
    virtual = chunks_of(schedule)
    placed, (forward, backward, hop, weight) = chunk_placement(schedule, stages, virtual), times
    seconds = {
        FORWARD: forward,
        BACKWARD: backward,
        INPUT_GRADIENT: backward - weight,
        WEIGHT_GRADIENT: weight,
    }
    graph, node_of, stage_of, lasts, length = networkx.DiGraph(), {}, {}, [], {}
    for stage in range(stages):
        order = stage_order(schedule, stage, stages, virtual, micro_batches)
        firsts = set(overlapped_pairs(schedule, stage, stages, micro_batches))
        before = None
        for place, (phase, index, local) in enumerate(order):
            kind = "B" if phase in (BACKWARD, INPUT_GRADIENT) else "FxxW"[phase]
            chunk = int(placed.held[stage, local])
            if place - 1 in firsts:
                node = before
            else:
                node = (stage, place)
                graph.add_node(node)
                length[node] = 0.0
                if before is not None:
                    graph.add_edge(before, node, delay=0.0)
            length[node] += float(seconds[phase][chunk, 0])
            node_of[kind, chunk, index], stage_of[node] = node, stage
            before = node
        lasts.append(before)
    for (kind, chunk, index), node in node_of.items():
        source = {
            "F": ("F", chunk - 1, index),
            "B": ("B", chunk + 1, index) if chunk + 1 < placed.chunks else ("F", chunk, index),
            "W": ("B", chunk, index),
        }[kind]
        if source in node_of and node_of[source] != node:
            delay = float(hop[0]) if stage_of[node_of[source]] != stage_of[node] else 0.0
            known = graph.get_edge_data(node_of[source], node, {"delay": 0.0})["delay"]
            graph.add_edge(node_of[source], node, delay=max(delay, known))
    ends = {}
    for node in networkx.topological_sort(graph):
        arrivals = [ends[source] + delay for source, _, delay in graph.in_edges(node, data="delay")]
        ends[node] = max(arrivals, default=0.0) + length[node]
    return np.array([ends[last] for last in lasts])


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(APART), st.integers(1, 6), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_finish_times_with_gradients_apart_equal_the_longest_path(schedule, stages, count, seed):
    if schedule == "dualpipe":
        stages += stages % 2
    if schedule.startswith("dualpipe"):
        count = 2 * stages + count + count % 2
    times = random_split_times(np.random.default_rng(seed), stages * chunks_of(schedule), 1)
    expected = split_longest_path_s(schedule, stages, count, times)
    actual = pipeline_finish_s(schedule, chunks_of(schedule), np.array([count]), *times)[:, 0]
    np.testing.assert_allclose(actual, expected, rtol=EXACT)


def test_weight_gradients_do_not_change_schedules_that_run_them_with_the_input_gradients():
    forward, backward, hop, weight = random_split_times(np.random.default_rng(4), 8, 16)
    for schedule, virtual, count in (("gpipe", 1, 9), ("one_f_one_b", 1, 40), ("interleaved_one_f_one_b", 2, 12)):
        whole = pipeline_finish_s(schedule, virtual, np.full(16, count), forward, backward, hop)
        split = pipeline_finish_s(schedule, virtual, np.full(16, count), forward, backward, hop, weight)
        assert (whole == split).all()


def test_gradients_apart_need_the_seconds_of_the_weight_gradients():
    ones = np.ones((4, 1))
    with pytest.raises(ValueError, match="zb_h1"):
        pipeline_finish_s("zb_h1", 1, np.array([8]), ones, ones, np.zeros(1))
