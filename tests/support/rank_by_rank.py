"""A step rank by rank in plain Python, one operation after the other: slow, short, and without folding or arrays."""

from __future__ import annotations

from moesim.engine.rank_max_plus import GRADIENT_DIMENSIONS, zero_parts_s
from moesim.engine.step_passes import PreparedStep
from moesim.engine.stream_times import ChunkPass
from moesim.structure.pipeline_orders import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from moesim.structure.pipeline_schedules import overlapped_pairs, stage_order

Clocks = list[float]


def pipeline_finish_s(step: PreparedStep, passes: dict[tuple[int, int, int], ChunkPass]) -> list[Clocks]:
    """When each rank of each stage has run its last pass, of a training step in its first draw."""
    schedule = step.system.scenario.parallelism.pipeline.schedule
    plan, count = step.evaluation.plan, step.ranks.count
    placed, micro_batches = plan.placed, round(float(step.columns["num_micro_batches"][0]))
    orders = [
        stage_order(schedule, stage, plan.stages, plan.virtual_stages, micro_batches) for stage in range(plan.stages)
    ]
    pairs = [set(overlapped_pairs(schedule, stage, plan.stages, micro_batches)) for stage in range(plan.stages)]
    clocks, at = [[0.0] * count for _ in orders], [0] * plan.stages
    ended: dict[tuple[str, int, int], tuple[int, Clocks]] = {}

    def arrivals(stage: int, phase: int, micro_batch: int, chunk: int) -> Clocks | None:
        """When the input of a pass is there; None while it is not made."""
        if phase == FORWARD:
            needed = ("forward", chunk - 1, micro_batch) if chunk else None
        elif phase == WEIGHT_GRADIENT:
            needed = ("backward", chunk, micro_batch)
        elif chunk == placed.chunks - 1:
            needed = ("forward", chunk, micro_batch)
        else:
            needed = ("backward", chunk + 1, micro_batch)
        if needed is None:
            return [0.0] * count
        if needed not in ended:
            return None
        source, moments = ended[needed]
        hop_s = step.exposed_hop_s if source != stage else 0.0
        return [moment + hop_s for moment in moments]

    while any(at[stage] < len(order) for stage, order in enumerate(orders)):
        moved = False
        for stage, order in enumerate(orders):
            if at[stage] == len(order):
                continue
            together = order[at[stage] : at[stage] + (2 if at[stage] in pairs[stage] else 1)]
            keys = [(phase, index, int(placed.held[stage, local])) for phase, index, local in together]
            inputs = [arrivals(stage, *key) for key in keys]
            if any(part is None for part in inputs):
                continue
            now = [max(moments) for moments in zip(clocks[stage], *inputs, strict=True)]
            for phase, _, chunk in keys:
                now = _run(step, passes[stage, chunk, phase], now)
            for phase, index, chunk in keys:
                name = {FORWARD: "forward", BACKWARD: "backward", INPUT_GRADIENT: "backward"}.get(phase, "weight")
                ended[name, chunk, index] = (stage, now)
            clocks[stage], at[stage], moved = now, at[stage] + len(together), True
        assert moved, "deadlock"
    return clocks


def _run(step: PreparedStep, part: ChunkPass, now: Clocks) -> Clocks:
    def value(seconds, rank: int) -> float:
        return float(seconds[0, rank if seconds.shape[1] > 1 else 0])

    def met(now: Clocks, dimension: str) -> Clocks:
        if dimension not in step.ranks.groups:
            return now
        together = list(now)
        for members in step.ranks.groups[dimension].members(len(now)):
            latest = max(now[rank] for rank in members)
            for rank in members:
                together[rank] = latest
        return together

    if part.zero_s:
        exposed_s, _ = zero_parts_s(part)
        longest = [value(exposed_s, rank) for rank in range(len(now))]
        for dimension in GRADIENT_DIMENSIONS:
            now, longest = met(now, dimension), met(longest, dimension)
        now = [moment + seconds for moment, seconds in zip(now, longest, strict=True)]
    for stretch in part.stretches:
        began = list(now)
        for block in stretch.blocks:
            for timed in (timed for scope in block.scopes for timed in scope):
                now = met(now, timed.operation.group)
                in_line = met([value(timed.exposed_s, rank) for rank in range(len(now))], timed.operation.group)
                now = [moment + in_line[rank] + value(timed.extra_s, rank) for rank, moment in enumerate(now)]
        for rank, moment in enumerate(began):
            now[rank] = max(now[rank], moment + value(stretch.host_s, rank)) + stretch.synchronisation_s
    return now
