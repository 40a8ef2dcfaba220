from __future__ import annotations

import numpy as np
import pytest

from moesim.structure import pipeline_schedules
from moesim.structure.pipeline_schedules import (
    BACKWARD,
    FORWARD,
    build_program,
    micro_batches_in_flight,
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
