"""A scenario prepared to run rank by rank: its pipeline's passes, priced for some draws of loads and speeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol

import numpy as np

from moesim.cost.state_costs import hop_message
from moesim.engine.analytical import PlanEvaluation, System, evaluate
from moesim.engine.block_overlaps import block_mechanisms
from moesim.engine.breakdowns import StepEnd, step_end
from moesim.engine.layer_cases import PricedBlock, PricedBlocks, priced_blocks
from moesim.engine.overlapped_scopes import scope_rewrite
from moesim.engine.rank_max_plus import (
    Nodes,
    PassKey,
    forward_nodes,
    number_in_stage,
    pass_counts,
    program_nodes,
)
from moesim.engine.stream_times import (
    BlockProgram,
    BlockTimes,
    ChunkBlocks,
    ChunkPass,
    RankSeconds,
    ScopeRewrite,
    StretchRule,
)
from moesim.structure.columns import Columns, FloatArray, IntArray
from moesim.structure.layers import LayerSequence, layer_sequence
from moesim.structure.lowering import LoweringContext
from moesim.structure.pipeline_orders import BACKWARD, FORWARD, INPUT_GRADIENT
from moesim.structure.pipeline_schedules import build_program
from moesim.structure.rank_programs import ChunkLayers, StageRanks, chunk_layers, stage_ranks
from moesim.structure.step_graph import Operation


class LinkPrices(Protocol):
    """What collectives and transfers take where links differ."""

    def collective_s(self, at: tuple[int, int], operation: Operation, key: tuple[int, str, int]) -> FloatArray:
        """Seconds on the ranks of a (stage, direction), of the operation with a key of ``RankSeconds``."""

    def zero_s(self, stage: int, chunk: int) -> Mapping[int, float]:
        """Seconds of ZeRO's collectives of a chunk's pass, by phase."""

    def hop_s(self, node: int) -> FloatArray:
        """Seconds by which a node is later than what it needs from another stage, shape (1, n_ranks)."""

    def step_ends(self) -> list[StepEnd]:
        """What each stage does after its last pass."""


@dataclass(frozen=True)
class PreparedStep:
    """One scenario, priced once; ``columns`` has one row."""

    system: System
    columns: Columns
    sequence: LayerSequence
    evaluation: PlanEvaluation
    priced: PricedBlocks
    ranks: StageRanks
    chunks: tuple[ChunkLayers, ...]
    nodes: Nodes

    @cached_property
    def counts(self) -> dict[PassKey, int]:
        """How often each pass runs."""
        return pass_counts(self.nodes)

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return self.evaluation.plan.stages

    @property
    def is_training(self) -> bool:
        """Whether there is a backward pass."""
        return self.system.scenario.workload.kind == "training"

    @property
    def hop_s(self) -> float:
        """Transfer between stages."""
        return float(self.evaluation.times.hop_s[self.evaluation.pass_case[0]])

    @property
    def exposed_hop_s(self) -> float:
        """Part of it by which the next stage is later."""
        return float(self.evaluation.times.exposed_hop_s[self.evaluation.pass_case[0]])

    @property
    def hop_bytes(self) -> float:
        """Bytes a rank sends to the next stage for one micro-batch."""
        context = LoweringContext(self.system.scenario, self.system.stack, self.columns)
        return float(hop_message(self.columns, context).num_bytes[0])

    def step_ends(self) -> list[StepEnd]:
        """What each stage does after its last pass."""
        return [step_end(self.evaluation, 0, stage) for stage in range(self.stages)]

    @cached_property
    def pass_number(self) -> IntArray:
        """Which of its stage's passes each node is."""
        return number_in_stage(self.nodes)

    @property
    def passes_per_rank(self) -> int:
        """Most passes that a rank runs."""
        return int(self.pass_number.max()) + 1

    def direction(self, stage: int, chunk: int) -> int:
        """Direction in which micro-batches pass a chunk where a stage holds it."""
        return int(np.flatnonzero(self.evaluation.plan.placed.stage_of[:, chunk] == stage)[0])

    def passes(
        self,
        loads: Sequence[RankSeconds],
        compute_factor: Callable[[int], FloatArray],
        links: LinkPrices | None = None,
    ) -> dict[PassKey, ChunkPass]:
        """Every pass of the pipeline on the ranks of its stage.

        Parameters
        ----------
        loads : sequence of mapping
            Seconds of operations that grow with load, for each direction of the pipeline; one stands for all.
        compute_factor : callable
            How many times longer the ranks of a stage compute, broadcastable to (n_draws, n_ranks).
        links : LinkPrices, optional
            Where links differ, what collectives take instead.
        """
        builder = _PassBuilder(self, loads, compute_factor, links)
        return {key: builder.chunk_pass(*key) for key in self.counts}

    @cached_property
    def block_programs(self) -> tuple[BlockProgram, ...]:
        """Programs of the layer kinds, then of first, last and, where there is one, token-prediction module."""
        priced, recompute = self.priced, int(self.columns["recompute"][0])
        blocks: list[PricedBlock] = [*priced.layers, priced.first, priced.last]
        if priced.module is not None:
            blocks.append(priced.module)
        stack = self.system.stack
        return tuple(BlockProgram(block, stack, recompute, self._rewrite(block)) for block in blocks)

    def _rewrite(self, block: PricedBlock) -> ScopeRewrite | None:
        overlap = self.system.scenario.overlap
        if not (block.is_moe and overlap.is_in_blocks):
            return None
        return scope_rewrite(block_mechanisms(overlap, self.system.stack, self.system.hardware, block.tables))

    def stretch_rule(self, chunk: int) -> StretchRule:
        """When a chunk's passes wait for the host: where counts are read, after every block of a forward pass."""
        launch, evaluation = self.system.stack.launch, self.evaluation
        waits, case = evaluation.times.chunk.waits, evaluation.times.chunk_case[evaluation.pass_case[0]]
        per_block = bool(waits.reads_counts[case])
        sync_s = per_block * launch.host_synchronisations_per_moe_layer * launch.host_synchronisation_time.value
        ahead_s = float(evaluation.update_lead_s[0])
        sooner_s = min(ahead_s, float(waits.late_s[0, chunk, case]))
        forward_s = waits.leading_s[chunk] if per_block else (waits.lead_s[0, chunk] + sooner_s,)
        backward_s = float(waits.lead_s[1, chunk, case]) + (ahead_s - sooner_s)
        return StretchRule(per_block, sync_s, tuple(float(part[case]) for part in forward_s), backward_s)

    def zero_s(self, chunk: int) -> dict[int, float]:
        """Seconds of ZeRO's collectives of a chunk's pass, by phase."""
        case = self.evaluation.pass_case[0]
        forward, backward = (float(part[chunk, case]) for part in self.evaluation.times.zero_pass_s)
        return {FORWARD: forward, BACKWARD: backward, INPUT_GRADIENT: backward}

    def zero_overlap(self, chunk: int) -> dict[int, float]:
        """Share of them that hides: as the stack achieves, or as prefetching does."""
        if not self.system.scenario.overlap.prefetch:
            return dict.fromkeys((FORWARD, BACKWARD, INPUT_GRADIENT), self.evaluation.data_parallel_overlap)
        case, times, whole = self.evaluation.pass_case[0], self.evaluation.times, self.zero_s(chunk)
        forward, backward = (float(part[chunk, case]) for part in times.zero_pass_hidden_s)
        hidden = {FORWARD: forward, BACKWARD: backward, INPUT_GRADIENT: backward}
        return {phase: hidden[phase] / whole[phase] if whole[phase] else 0.0 for phase in hidden}


def prepare_step(system: System, columns: Columns) -> PreparedStep:
    """Price a scenario, resolved and legal, and lay out its pipeline.

    Raises
    ------
    ValueError
        If there is more than one row.
    """
    if len(columns) != 1:
        raise ValueError(f"one scenario at a time, not {len(columns)}")
    scenario = system.scenario
    sequence = layer_sequence(scenario.model)
    (evaluation,) = evaluate(system, columns)
    plan, micro_batches = evaluation.plan, round(float(columns["num_micro_batches"][0]))
    if scenario.workload.kind == "training":
        schedule = scenario.parallelism.pipeline.schedule
        nodes = program_nodes(build_program(schedule, plan.stages, plan.virtual_stages, micro_batches))
    else:
        nodes = forward_nodes(plan.stages, micro_batches)
    return PreparedStep(
        system=system,
        columns=columns,
        sequence=sequence,
        evaluation=evaluation,
        priced=priced_blocks(scenario, system.stack, sequence, columns, system.hardware, system.load_factor),
        ranks=stage_ranks(columns, scenario.parallelism.rank_order),
        chunks=chunk_layers(sequence, plan),
        nodes=nodes,
    )


class _PassBuilder:
    """Builds passes; what two of them share is worked out once."""

    def __init__(
        self,
        step: PreparedStep,
        loads: Sequence[RankSeconds],
        compute_factor: Callable[[int], FloatArray],
        links: LinkPrices | None,
    ) -> None:
        self.step, self.links = step, links
        self.loads = loads
        self.loaded_layers = [{layer for layer, *_ in seconds} for seconds in loads]
        self.factors = {stage: compute_factor(stage) for stage in range(step.stages)}
        self.known: dict[tuple[int, int, int, int], BlockTimes] = {}
        self.blocks: dict[tuple[int, int], ChunkBlocks] = {}

    def chunk_pass(self, stage: int, chunk: int, phase: int) -> ChunkPass:
        if (stage, chunk) not in self.blocks:
            self.blocks[stage, chunk] = ChunkBlocks(
                groups=tuple(self._groups(stage, chunk)),
                rule=self.step.stretch_rule(chunk),
                zero_s=self.step.zero_s(chunk) if self.links is None else self.links.zero_s(stage, chunk),
                zero_overlap=self.step.zero_overlap(chunk),
            )
        return self.blocks[stage, chunk].chunk_pass(phase)

    def _groups(self, stage: int, number: int) -> Iterator[tuple[BlockTimes, ...]]:
        """Blocks of a chunk, together those that are one to the host."""
        priced, chunk = self.step.priced, self.step.chunks[number]
        kinds = len(priced.layers)
        at = (stage, self.step.direction(stage, number) % len(self.loads))
        if chunk.is_first:
            yield (self._times(at, kinds, -1),)
        for layer in chunk.layers:
            yield (self._times(at, layer.kind, layer.number),)
        if chunk.is_last:
            last = [self._times(at, kinds + 1, -1)]
            modules = self.step.sequence.mtp_layers if priced.module is not None else 0
            for module in range(modules):
                last.append(self._times(at, kinds + 2, -1))
                last.append(self._times(at, priced.module_layer, len(self.step.sequence.order) + module))
            yield tuple(last)

    def _times(self, at: tuple[int, int], program: int, layer: int) -> BlockTimes:
        stage, direction = at
        loaded = layer if layer in self.loaded_layers[direction] else -1
        key = (*at, program, loaded)
        if key not in self.known:
            self.known[key] = self.step.block_programs[program].times(
                loaded,
                self.loads[direction],
                self.factors[stage],
                is_training=self.step.is_training,
                collectives=None if self.links is None else partial(self.links.collective_s, at),
            )
        return replace(self.known[key], layer=layer)
