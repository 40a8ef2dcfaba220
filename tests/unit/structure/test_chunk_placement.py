from __future__ import annotations

import numpy as np
import pytest

from moesim.structure.chunk_placement import FOLDED_SCHEDULES, chunk_placement
from moesim.structure.layers import StagePlan, layer_sequence, stage_plan

PLACED = [
    *[("one_f_one_b", stages, 1) for stages in (1, 2, 5)],
    *[("interleaved_one_f_one_b", stages, virtual) for stages in (1, 3) for virtual in (2, 4)],
    *[(schedule, stages, 2) for schedule in FOLDED_SCHEDULES for stages in (1, 2, 5)],
    *[("dualpipe", stages, 1) for stages in (2, 6)],
]


@pytest.mark.parametrize(("schedule", "stages", "virtual"), PLACED)
class TestPlacement:
    def test_every_direction_finds_each_chunk_on_the_stage_that_holds_it(self, schedule, stages, virtual):
        placed = chunk_placement(schedule, stages, virtual)
        assert placed.chunks == stages * virtual
        for direction in range(placed.directions):
            for chunk in range(placed.chunks):
                stage, local = placed.stage_of[direction, chunk], placed.local_of[direction, chunk]
                assert placed.held[stage, local] == chunk
                assert stage in placed.stages_of(chunk)

    def test_the_stages_hold_as_many_copies_of_each_chunk_as_there_are_directions(self, schedule, stages, virtual):
        placed = chunk_placement(schedule, stages, virtual)
        assert np.bincount(placed.held.ravel()).tolist() == [placed.directions] * placed.chunks

    def test_half_of_a_step_goes_each_way(self, schedule, stages, virtual):
        placed = chunk_placement(schedule, stages, virtual)
        directions = [placed.direction(index, 8) for index in range(8)]
        assert directions == ([0] * 4 + [1] * 4 if schedule == "dualpipe" else [0] * 8)


def test_a_v_crosses_no_stage_where_it_turns():
    """Six chunks on three stages: five boundaries, of which that between chunks 2 and 3 lies inside the last stage."""
    assert chunk_placement("zb_v", 3, 2).transfers == 4
    assert chunk_placement("interleaved_one_f_one_b", 3, 2).transfers == 5
    assert chunk_placement("dualpipe", 6, 1).transfers == 5


@pytest.mark.parametrize(
    ("schedule", "virtual", "words"),
    [("zb_h1", 2, "one chunk"), ("zb_v", 1, "two chunks"), ("dualpipe", 2, "one chunk")],
)
def test_a_wrong_number_of_chunks_is_refused(schedule, virtual, words):
    with pytest.raises(ValueError, match=words):
        chunk_placement(schedule, 4, virtual)


class TestStagePlan:
    counts = np.array([[1.0, 2.0, 3.0, 4.0]])

    def test_what_a_micro_batch_needs_of_a_stage_is_the_mean_of_both_directions(self):
        seconds = np.array([[1.0], [2.0], [3.0], [5.0]])
        plan = StagePlan(4, 1, self.counts, "both_ways")
        assert plan.stage_counts().tolist() == [[5.0, 5.0, 5.0, 5.0]]
        assert plan.stage_sums(seconds).ravel().tolist() == [3.0, 2.5, 2.5, 3.0]
        assert plan.stage_sums(seconds).sum() == seconds.sum()

    def test_a_v_pairs_the_first_chunk_with_the_last(self):
        plan = StagePlan(2, 2, self.counts, "fold")
        assert plan.stage_counts().tolist() == [[5.0, 5.0]]
        assert StagePlan(2, 2, self.counts).stage_counts().tolist() == [[4.0, 6.0]]

    def test_spread_over_chunks_and_summed_again_a_stage_keeps_its_seconds(self):
        per_stage = np.array([[2.0], [4.0]])
        for placement in ("loop", "fold"):
            plan = StagePlan(2, 2, self.counts, placement)
            np.testing.assert_allclose(plan.stage_sums(plan.per_chunk(per_stage)), per_stage)
        mirrored = StagePlan(4, 1, self.counts, "both_ways")
        alike = np.array([[2.0], [4.0], [4.0], [2.0]])
        np.testing.assert_allclose(mirrored.stage_sums(mirrored.per_chunk(alike)), alike / 2)

    def test_layers_per_stage_given_for_a_v_are_those_of_the_stages(self, shipped):
        sequence = layer_sequence(shipped("mixtral_8x7b").scenario.model)
        plan = stage_plan(sequence, 4, 2, (7, 8, 8, 9), "fold")
        assert plan.stage_counts().sum(axis=0).tolist() == [7, 8, 8, 9]
        assert plan.counts.sum() == 32
