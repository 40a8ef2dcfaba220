"""V-Half and V-Min: schedules that repeat a building block, squeezed (arXiv:2405.15362)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from moesim.structure.pipeline_orders import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, StageOrder

INTERVAL = 6
"""Slots from one micro-batch to the next: three phases of two chunks, one slot each."""

STRIDES: dict[str, tuple[int, int, int, int]] = {"v_min": (1, 1, 1, 1), "v_half": (2, 1, 2, 1)}
"""Slots from stage to stage: forward down, forward up, input gradient down, input gradient up. A stage holds its two
chunks for about p times the sum of the strides, so they set the memory."""

LOOK_AHEAD = 8
"""How many intervals an idle stage looks ahead for something to run."""


@dataclass(frozen=True)
class BuildingBlock:
    """Slot in which each stage starts each (phase, chunk) of micro-batch 0: tuples of length stages."""

    slots: dict[tuple[int, int], tuple[int, ...]]

    def most_held(self, stage: int) -> int:
        """Chunk activations that a stage holds at most while the block repeats, from forward to weight gradient."""
        spans = [(self.slots[FORWARD, chunk][stage], self.slots[WEIGHT_GRADIENT, chunk][stage]) for chunk in (0, 1)]
        return max(sum((now - start) // INTERVAL - (now - end) // INTERVAL for start, end in spans) for now in range(6))


@lru_cache(maxsize=128)
def building_block(schedule: str, stages: int) -> BuildingBlock:
    """Lay a block out: of all turns in which no stage has two operations in one slot, one that holds least.

    Turns are the slots between the last stage's two forwards, between forward and input gradient on the first stage,
    and between the last stage's two input gradients, at least 1 each; the shortest among those that hold alike.
    """
    candidates = []
    for turns in product(range(1, INTERVAL + 1), repeat=3):
        slots = _slots(STRIDES[schedule], turns, stages)
        if slots is not None:
            block = BuildingBlock(slots)
            most = max(block.most_held(stage) for stage in range(stages))
            candidates.append((most, sum(turns), turns, block))
    return min(candidates, key=lambda entry: entry[:3])[3]


def _slots(
    strides: tuple[int, int, int, int], turns: tuple[int, ...], stages: int
) -> dict[tuple[int, int], tuple[int, ...]] | None:
    """Slots of a block, None if they collide; weight gradients take the free slots after their input gradients."""
    last = stages - 1
    starts = [0, last * strides[0] + turns[0]]
    starts.append(starts[1] + last * strides[1] + turns[1])
    starts.append(starts[2] + last * strides[2] + turns[2])
    keys = [(FORWARD, 0), (FORWARD, 1), (INPUT_GRADIENT, 1), (INPUT_GRADIENT, 0)]
    slots: dict[tuple[int, int], list[int]] = {}
    for index, key in enumerate(keys):
        passed = range(stages) if index % 2 == 0 else range(last, -1, -1)
        slots[key] = [starts[index] + strides[index] * steps for steps in passed]
    for chunk in (0, 1):
        slots[WEIGHT_GRADIENT, chunk] = []
    for stage in range(stages):
        taken = {slots[key][stage] % INTERVAL for key in keys}
        if len(taken) < len(keys):
            return None
        for chunk in (1, 0):
            slot = slots[INPUT_GRADIENT, chunk][stage] + 1
            while slot % INTERVAL in taken:
                slot += 1
            taken.add(slot % INTERVAL)
            slots[WEIGHT_GRADIENT, chunk].append(slot)
    return {key: tuple(values) for key, values in slots.items()}


@lru_cache(maxsize=128)
def squeezed_orders(schedule: str, stages: int, micro_batches: int) -> tuple[StageOrder, ...]:
    """Orders of all stages: the repeated block, in which a stage that would wait runs what it can.

    A stage takes the first operation of its repeated block whose input is there. Running a forward early may not
    raise what the stage holds, until the forward's own turn, above what the repeated block holds at most. The first
    operation of the block that is still to run never waits for a later one, so nothing deadlocks.
    """
    block = building_block(schedule, stages)
    squeeze = _Squeeze(block, stages, micro_batches)
    squeeze.run()
    return tuple(squeeze.orders)


class _Squeeze:
    """List scheduling in slots of one operation each."""

    def __init__(self, block: BuildingBlock, stages: int, micro_batches: int) -> None:
        self.stages = stages
        self.waiting: list[StageOrder] = []
        for stage in range(stages):
            timed = [
                (slots[stage] + INTERVAL * index, phase, index, chunk)
                for (phase, chunk), slots in block.slots.items()
                for index in range(micro_batches)
            ]
            self.waiting.append([entry[1:] for entry in sorted(timed)])
        self.limit = [_most_held(order) for order in self.waiting]
        self.held = [0] * stages
        self.orders: list[StageOrder] = [[] for _ in range(stages)]
        self.end: dict[tuple[int, int, int, int], int] = {}

    def run(self) -> None:
        """Let every stage pick in every slot in which it is free."""
        events = [(0, stage) for stage in range(self.stages)]
        while events:
            slot, stage = heapq.heappop(events)
            while events and events[0] == (slot, stage):
                heapq.heappop(events)
            place = self._first_ready(stage, slot)
            if place is None:
                continue
            phase, index, chunk = self.waiting[stage].pop(place)
            self.orders[stage].append((phase, index, chunk))
            self.held[stage] += _change(phase)
            self.end[stage, phase, index, chunk] = slot + 1
            for other in range(max(stage - 1, 0), min(stage + 2, self.stages)):
                heapq.heappush(events, (slot + 1, other))

    def _first_ready(self, stage: int, slot: int) -> int | None:
        """Place, in what waits, of the first operation that can run and may."""
        seen: set[tuple[int, int]] = set()
        most = held = self.held[stage]
        for place, (phase, index, chunk) in enumerate(self.waiting[stage][: LOOK_AHEAD * INTERVAL]):
            if (phase, chunk) not in seen:
                seen.add((phase, chunk))
                may = place == 0 or phase != FORWARD or most < self.limit[stage]
                if may and self._is_ready(stage, phase, index, chunk, slot):
                    return place
            held += _change(phase)
            most = max(most, held)
        return None

    def _is_ready(self, stage: int, phase: int, index: int, chunk: int, slot: int) -> bool:
        source = self._source(stage, phase, chunk)
        if source is None:
            return True
        neighbour, *operation = source
        return self.end.get((neighbour, operation[0], index, operation[1]), slot + 1) <= slot

    def _source(self, stage: int, phase: int, chunk: int) -> tuple[int, int, int] | None:
        """Stage, phase and chunk of what an operation of a V needs."""
        last = self.stages - 1
        if phase == WEIGHT_GRADIENT:
            return stage, INPUT_GRADIENT, chunk
        if (phase, chunk) == (FORWARD, 0):
            return (stage - 1, FORWARD, 0) if stage else None
        if (phase, chunk) == (INPUT_GRADIENT, 1):
            return (stage - 1, INPUT_GRADIENT, 1) if stage else (0, FORWARD, 1)
        return (stage + 1, phase, chunk) if stage < last else (last, phase, 1 - chunk)


def _change(phase: int) -> int:
    return {FORWARD: 1, WEIGHT_GRADIENT: -1}.get(phase, 0)


def _most_held(order: StageOrder) -> int:
    most = held = 0
    for phase, *_ in order:
        held += _change(phase)
        most = max(most, held)
    return most
