from __future__ import annotations

from itertools import pairwise

import pytest

from moesim.structure.pipeline_building_blocks import INTERVAL, STRIDES, building_block, squeezed_orders
from moesim.structure.pipeline_orders import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT


@pytest.mark.parametrize("schedule", STRIDES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6, 7, 12, 16])
class TestBuildingBlock:
    def test_no_stage_has_two_operations_in_one_slot_however_often_the_block_repeats(self, schedule, stages):
        slots = building_block(schedule, stages).slots
        for stage in range(stages):
            assert {starts[stage] % INTERVAL for starts in slots.values()} == set(range(INTERVAL))

    def test_a_micro_batch_goes_down_the_v_and_up_and_back(self, schedule, stages):
        slots = building_block(schedule, stages).slots
        path = [
            *slots[FORWARD, 0],
            *slots[FORWARD, 1][::-1],
            *slots[INPUT_GRADIENT, 1],
            *slots[INPUT_GRADIENT, 0][::-1],
        ]
        assert all(before < after for before, after in pairwise(path))
        for chunk in (0, 1):
            gradients = zip(slots[INPUT_GRADIENT, chunk], slots[WEIGHT_GRADIENT, chunk], strict=True)
            assert all(before < after for before, after in gradients)

    def test_squeezing_holds_no_more_than_the_block_does(self, schedule, stages):
        block = building_block(schedule, stages)
        for stage, order in enumerate(squeezed_orders(schedule, stages, 3 * stages)):
            held = most = 0
            for phase, *_ in order:
                held += {FORWARD: 1, WEIGHT_GRADIENT: -1}.get(phase, 0)
                most = max(most, held)
            assert most <= block.most_held(stage)


def test_v_min_on_four_stages_by_hand():
    """Stride 1 all the way: down in slots 0 to 3, up in 4 to 7, input gradients down from 8 and up to 15."""
    slots = building_block("v_min", 4).slots
    assert slots[FORWARD, 0] == (0, 1, 2, 3)
    assert slots[FORWARD, 1] == (7, 6, 5, 4)
    assert slots[INPUT_GRADIENT, 1] == (8, 9, 10, 11)
    assert slots[INPUT_GRADIENT, 0] == (15, 14, 13, 12)
