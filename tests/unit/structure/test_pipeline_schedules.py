from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.describe.scenario import PipelineParallelism
from moesim.structure import pipeline_schedules
from moesim.structure.activations_in_flight import _moments, _undominated, held_at_once
from moesim.structure.chunk_placement import FOLDED_SCHEDULES, chunk_placement
from moesim.structure.pipeline_schedules import (
    BACKWARD,
    FORWARD,
    IN_FLIGHT_ROUNDS,
    INPUT_GRADIENT,
    SCHEDULES,
    WEIGHT_GRADIENT,
    build_program,
    micro_batches_in_flight,
    overlapped_pairs,
    stage_order,
)

SHAPES = [
    *[
        (schedule, stages, 1, count)
        for schedule in ("gpipe", "one_f_one_b")
        for stages in (1, 2, 5)
        for count in (1, 3, 12)
    ],
    *[
        ("interleaved_one_f_one_b", stages, virtual, stages * rounds)
        for stages in (1, 2, 4)
        for virtual in (2, 3)
        for rounds in (1, 2, 5)
    ],
]


@pytest.mark.parametrize(("schedule", "stages", "virtual", "count"), SHAPES)
class TestStageOrder:
    def test_every_phase_of_every_micro_batch_and_chunk_runs_exactly_once(self, schedule, stages, virtual, count):
        expected = [(phase, index, chunk) for phase in (0, 1) for index in range(count) for chunk in range(virtual)]
        for stage in range(stages):
            assert sorted(stage_order(schedule, stage, stages, virtual, count)) == expected

    def test_every_forward_runs_before_its_backward(self, schedule, stages, virtual, count):
        for stage in range(stages):
            order = stage_order(schedule, stage, stages, virtual, count)
            position = {entry: place for place, entry in enumerate(order)}
            for phase, index, chunk in order:
                if phase == FORWARD:
                    assert position[FORWARD, index, chunk] < position[BACKWARD, index, chunk]

    def test_program_runs_to_its_end_without_deadlock(self, schedule, stages, virtual, count):
        program = build_program(schedule, stages, virtual, count)
        done = np.zeros(len(program.needs) + 1, dtype=bool)
        done[-1] = True
        for level in program.levels:
            assert done[program.stage_before[level]].all()
            assert done[program.needs[level]].all()
            assert not done[level].any()
            done[level] = True
        assert done.all()

    def test_most_activations_held_at_once_are_those_in_flight(self, schedule, stages, virtual, count):
        formula = micro_batches_in_flight(schedule, stages, virtual, np.array([float(count)]))[:, 0]
        for stage in range(stages):
            held = np.cumsum(
                [1 if phase == FORWARD else -1 for phase, *_ in stage_order(schedule, stage, stages, virtual, count)]
            )
            assert held.max() / virtual == formula[stage]


def test_transfers_lie_between_neighbouring_stages_only():
    program = build_program("interleaved_one_f_one_b", 2, 2, 4)
    per_chunk = program.hops.reshape(2, 4, 4)
    assert per_chunk[FORWARD, 0].tolist() == [0] * 4, "the first chunk waits for nothing"
    assert (per_chunk[FORWARD, 1:] == 1).all()
    assert per_chunk[BACKWARD, 3].tolist() == [0] * 4, "the last chunk turns round on its own stage"
    assert (per_chunk[BACKWARD, :3] == 1).all()


def test_interleaving_refuses_micro_batches_that_are_no_multiple_of_the_stages():
    with pytest.raises(ValueError, match="multiples of the stages"):
        build_program("interleaved_one_f_one_b", 4, 2, 6)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="zigzag"):
        stage_order("zigzag", 0, 2, 1, 4)


def test_an_order_that_deadlocks_is_refused(monkeypatch):
    """Stage 0 wants the backward of micro-batch 1 before it has run that micro-batch's forward."""

    def crossed(schedule, stage, stages, virtual_stages, micro_batches):
        if stage == 0:
            return [(FORWARD, 0, 0), (BACKWARD, 1, 0), (FORWARD, 1, 0), (BACKWARD, 0, 0)]
        return [(FORWARD, 0, 0), (FORWARD, 1, 0), (BACKWARD, 1, 0), (BACKWARD, 0, 0)]

    monkeypatch.setattr(pipeline_schedules, "stage_order", crossed)
    with pytest.raises(ValueError, match="deadlock"):
        build_program.__wrapped__("one_f_one_b", 2, 1, 2)


APART = SCHEDULES[3:]


def chunks_of(schedule):
    return 2 if schedule in FOLDED_SCHEDULES else 1


def legal_count(schedule, stages, count):
    """The nearest number of micro-batches, and of stages, that a schedule takes."""
    if schedule == "dualpipe":
        stages += stages % 2
        return stages, 2 * max(-(-count // 2), stages)
    return stages, max(count, 2 * stages) if schedule == "dualpipe_v" else count


def test_every_schedule_of_the_schema_has_an_order():
    assert PipelineParallelism.model_json_schema()["properties"]["schedule"]["enum"] == list(SCHEDULES)


@settings(deadline=None, max_examples=120)
@given(st.sampled_from(APART), st.integers(1, 12), st.integers(1, 40))
def test_gradients_apart_run_once_each_in_the_order_of_what_they_need(schedule, stages, count):
    stages, count = legal_count(schedule, stages, count)
    placed = chunk_placement(schedule, stages, chunks_of(schedule))
    for stage in range(stages):
        order = stage_order(schedule, stage, stages, chunks_of(schedule), count)
        place = {entry: index for index, entry in enumerate(order)}
        assert len(place) == len(order), "nothing twice"
        for local in range(placed.held.shape[1]):
            mine = [index for index in range(count) if placed.direction(index, count) == local % placed.directions]
            assert {entry[1] for entry in order if entry[2] == local} == set(mine)
            for index in mine:
                backward = place.get((BACKWARD, index, local), place.get((INPUT_GRADIENT, index, local)))
                assert place[FORWARD, index, local] < backward
                is_joint = (BACKWARD, index, local) in place
                assert is_joint == ((WEIGHT_GRADIENT, index, local) not in place)
                assert is_joint or backward < place[WEIGHT_GRADIENT, index, local]
            assert len(mine) * placed.directions == count
        kinds = Counter(phase for phase, *_ in order)
        assert kinds[INPUT_GRADIENT] == kinds[WEIGHT_GRADIENT]
        assert kinds[FORWARD] == kinds[BACKWARD] + kinds[INPUT_GRADIENT] == count * chunks_of(schedule)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(APART), st.integers(1, 12), st.integers(1, 40))
def test_programs_with_gradients_apart_run_to_their_end(schedule, stages, count):
    stages, count = legal_count(schedule, stages, count)
    program = build_program(schedule, stages, chunks_of(schedule), count)
    done = np.zeros(len(program.needs) + 1, dtype=bool)
    done[-1] = True
    for level in program.levels:
        partner_needs = np.append(program.needs, -1)[program.partner[level]]
        for before in (program.stage_before[level], program.needs[level], partner_needs):
            assert done[before].all()
        done[level] = True
    assert done[:-1].sum() == (program.stage >= 0).sum()
    lengths = [len(stage_order(schedule, stage, stages, chunks_of(schedule), count)) for stage in range(stages)]
    assert np.bincount(program.stage[program.stage >= 0]).tolist() == lengths


@pytest.mark.parametrize("schedule", APART)
@pytest.mark.parametrize("stages", [2, 4, 8, 12])
def test_activations_held_are_as_published(schedule, stages):
    """In micro-batches of a stage: arXiv:2401.10241 sections 2 and 6, arXiv:2405.15362, arXiv:2412.19437 table 2.

    V-Half and V-Min by the formulas of their authors' page; DualPipe's p + 1 are of one of its two chunks, DualPipeV's
    2p + 1 of half a stage.
    """
    published = {
        "zb_h1": stages,
        "zb_h2": 2 * stages - 1,
        "zb_v": stages,
        "v_half": (stages + 2) // 2,
        "v_min": (stages + 4) // 3,
        "dualpipe": (stages + 1) / 2,
        "dualpipe_v": (2 * stages + 1) / 2,
    }
    held = micro_batches_in_flight(schedule, stages, chunks_of(schedule), np.array([4.0 * stages, 64.0]))
    assert held.max(axis=0).tolist() == [published[schedule]] * 2


@pytest.mark.parametrize("schedule", APART)
@pytest.mark.parametrize("stages", [2, 3, 8])
def test_a_longer_step_holds_no_more_than_counted(schedule, stages):
    """The count stops at 4 p micro-batches."""
    for count in (1, 3, 2 * stages, 4 * stages + 2, 11 * stages + 4):
        legal_stages, legal = legal_count(schedule, stages, count)
        virtual = chunks_of(schedule)
        counted = micro_batches_in_flight(schedule, legal_stages, virtual, np.array([float(legal)]))[:, 0]
        chunks = chunk_placement(schedule, legal_stages, virtual).held.shape[1]
        for stage in range(legal_stages):
            phases = [entry[0] for entry in stage_order(schedule, stage, legal_stages, virtual, legal)]
            held = np.cumsum([{FORWARD: 1, INPUT_GRADIENT: 0}.get(phase, -1) for phase in phases])
            assert held[-1] == 0
            assert held.max() / chunks == counted[stage], (stage, legal)


def test_zb_h1_on_four_stages_by_hand():
    """Figure 3 of arXiv:2401.10241: the last stage lets p - 1 weight gradients wait."""
    words = ["".join("FBIW"[phase] for phase, *_ in stage_order("zb_h1", stage, 4, 1, 6)) for stage in (0, 3)]
    assert words == ["FFFFIWFIWFIWIWIWIW", "FIFIFIFIWFIWFIWWWW"]


def test_dualpipe_on_eight_stages_and_twenty_micro_batches_as_drawn():
    """Figure 5 of arXiv:2412.19437, first and fourth stage: ten micro-batches each way, 0 .. 9 and 10 .. 19."""
    first = stage_order("dualpipe", 0, 8, 1, 20)
    assert [entry[1] for entry in first[:7]] == [0, 1, 2, 3, 4, 5, 6]
    assert first[7:11] == [(FORWARD, 10, 1), (INPUT_GRADIENT, 10, 1), (WEIGHT_GRADIENT, 10, 1), (FORWARD, 11, 1)]
    inner = stage_order("dualpipe", 3, 8, 1, 20)
    assert inner[:8] == [(FORWARD, index + 10 * way, way) for index in range(4) for way in (0, 1)]
    assert inner[8:12] == [(FORWARD, 4, 0), (BACKWARD, 10, 1), (FORWARD, 14, 1), (BACKWARD, 0, 0)]
    mirrored = [(phase, (index + 10) % 20, 1 - way) for phase, index, way in stage_order("dualpipe", 7, 8, 1, 20)]
    assert mirrored == first


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipe_v"])
def test_pairs_are_a_forward_and_the_backward_of_the_other_chunk_after_it(schedule):
    for stage in range(4):
        order = stage_order(schedule, stage, 4, chunks_of(schedule), 16)
        pairs = overlapped_pairs(schedule, stage, 4, 16)
        assert pairs
        for place in pairs:
            (forward, _, chunk), (backward, _, other) = order[place : place + 2]
            assert (forward, backward, chunk + other) == (FORWARD, BACKWARD, 1)


def test_dualpipe_v_is_the_lower_half_of_dualpipe():
    """Cut in half: stage s of p runs what stage s of 2p stages runs, one chunk of the V for each direction."""
    for stage in range(4):
        whole = [(phase, index % 20, chunk) for phase, index, chunk in stage_order("dualpipe", stage, 8, 1, 40)]
        assert stage_order("dualpipe_v", stage, 4, 2, 20) == whole


@pytest.mark.parametrize(
    ("stages", "count", "schedule"), [(3, 12, "dualpipe"), (4, 7, "dualpipe_v"), (4, 9, "dualpipe")]
)
def test_dualpipe_refuses_what_it_cannot_fill(stages, count, schedule):
    with pytest.raises(ValueError, match=schedule):
        build_program(schedule, stages, chunks_of(schedule), count)


@pytest.mark.parametrize(("stages", "virtual", "count"), [(2, 2, 8), (4, 3, 12), (3, 4, 3), (8, 2, 32), (1, 3, 2)])
def test_moments_of_interleaved_stages_are_those_of_their_orders(stages: int, virtual: int, count: int) -> None:
    placement = chunk_placement("interleaved_one_f_one_b", stages, virtual)
    for stage, found in enumerate(held_at_once("interleaved_one_f_one_b", stages, virtual, count)):
        order = stage_order("interleaved_one_f_one_b", stage, stages, virtual, min(count, IN_FLIGHT_ROUNDS * stages))
        moments = _moments(order, placement.held[stage] == placement.chunks - 1)
        assert found.tolist() == _undominated(np.unique(moments, axis=0)).tolist()


def test_chunks_held_at_once_sum_to_the_micro_batches_in_flight() -> None:
    for schedule, stages, virtual in (("interleaved_one_f_one_b", 4, 3), ("zb_v", 4, 2), ("dualpipe", 4, 1)):
        in_flight = micro_batches_in_flight(schedule, stages, virtual, np.array([24.0]))[:, 0]
        held = held_at_once(schedule, stages, virtual, 24)
        chunks = held[0].shape[1] - 1
        assert [moments[:, :-1].sum(axis=1).max() / chunks for moments in held] == in_flight.tolist()
