"""Times of layers and model ends over the distinct cases of the columns they read, overlap applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moesim.cost.host_times import expert_messages_s, gap_s, host_time_s, reads_counts, wait_s
from moesim.cost.layer_times import COMMUNICATION_STREAMS, REPORTED_AS, PhaseTimes, PricedTable, price_table, total_s
from moesim.cost.operators import Hardware
from moesim.describe.hardware import OverlapAchieved, Stack
from moesim.describe.overlap import Overlap
from moesim.describe.scenario import Scenario
from moesim.engine.block_overlaps import Totals, block_mechanisms, divided
from moesim.structure.columns import RECOMPUTE_CODES, BoolArray, Columns, Distinct, FloatArray, IntArray
from moesim.structure.layers import LayerKind, LayerSequence
from moesim.structure.lowering import LoweringContext, token_columns
from moesim.structure.lowering_layers import dense_part, embedding_part, head_part, token_prediction_part
from moesim.structure.lowering_moe import LoadFactor, moe_columns, moe_part
from moesim.structure.parameters import mtp_layer_kind
from moesim.structure.step_graph import HostWork

PhaseName = Literal["forward", "backward"]
PHASES: tuple[PhaseName, ...] = ("forward", "backward")


@dataclass
class BlockPhase:
    """One phase of a layer or end, arrays (n_cases,): exposed and hidden seconds by category, and totals.

    ``device_s`` is what the device needs (exposed parts summed), ``serial_s`` with nothing overlapped, ``ideal_s`` at
    peak rates with everything overlapped (the longest of ``ideal_parts_s``: compute and each stream), ``flops``
    executed, ``host_s`` what the host needs to issue it, ``gap_s`` what its kernels start later than in a graph;
    ``routed_device_s`` and ``routed_host_s`` are those of a forward pass until the router has chosen;
    ``weight_gradient_s`` is what of ``device_s`` a schedule may run apart.
    """

    exposed_s: dict[str, FloatArray] = field(default_factory=dict)
    hidden_s: dict[str, FloatArray] = field(default_factory=dict)
    ideal_parts_s: dict[str, FloatArray] = field(default_factory=dict)
    device_s: FloatArray | float = 0.0
    serial_s: FloatArray | float = 0.0
    ideal_s: FloatArray | float = 0.0
    flops: FloatArray | float = 0.0
    host_s: FloatArray | float = 0.0
    gap_s: FloatArray | float = 0.0
    routed_device_s: FloatArray | float = 0.0
    routed_host_s: FloatArray | float = 0.0
    weight_gradient_s: FloatArray | float = 0.0

    @property
    def issued_s(self) -> FloatArray:
        """What the device needs, and the gaps between its kernels."""
        return np.asarray(self.device_s) + self.gap_s

    @property
    def waiting_s(self) -> FloatArray:
        """What the device waits for the host, beside the gaps, where host and device are level before and after."""
        return wait_s(np.asarray(self.host_s), self.issued_s)


@dataclass
class Block:
    """A layer kind or an end of the model."""

    name: str
    is_moe: bool
    forward: BlockPhase
    backward: BlockPhase

    def phase(self, name: PhaseName) -> BlockPhase:
        """Phase by name."""
        return self.forward if name == "forward" else self.backward


@dataclass(frozen=True)
class LayerCases:
    """Blocks over the distinct cases of ``columns``: layer kinds in order, then first and last end.

    ``inverse`` maps a row to its case; ``first`` is the embedding, ``last`` head, loss and token prediction, which has
    ``token_prediction_moe_layers``. ``reads_counts``, for each case: the host waits for the counts of MoE layers.
    """

    rows: IntArray
    inverse: IntArray
    layers: tuple[Block, ...]
    first: Block
    last: Block
    token_prediction_moe_layers: int
    reads_counts: BoolArray


Gather = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class PricedBlock:
    """Priced tables of a layer kind or an end of the model, each with the gathering of its cases to the block's."""

    name: str
    tables: tuple[tuple[PricedTable, Gather], ...]
    is_moe: bool = False
    is_end: bool = False


@dataclass(frozen=True)
class PricedBlocks:
    """Blocks over the distinct ``cases`` of ``columns``.

    ``layers`` by kind; ``module`` is what a token-prediction module has around its layer, of kind
    ``module_layer``, None where no step predicts more than one token.
    """

    cases: Distinct
    columns: Columns
    layers: tuple[PricedBlock, ...]
    first: PricedBlock
    last: PricedBlock
    module: PricedBlock | None
    module_layer: int


def layer_case_columns(scenario: Scenario) -> tuple[str, ...]:
    """Columns that decide the time of a layer."""
    names = (*token_columns(scenario), "recompute")
    if scenario.model.moe is not None:
        names = (*moe_columns(scenario), "recompute")
    return tuple(dict.fromkeys(names))


def priced_blocks(
    scenario: Scenario,
    stack: Stack,
    sequence: LayerSequence,
    columns: Columns,
    hardware: Hardware,
    load_factor: LoadFactor,
) -> PricedBlocks:
    """Price every table once per distinct case of what it reads."""
    cases = columns.distinct(layer_case_columns(scenario))
    at_cases = columns.take(cases.rows)
    token_cases = at_cases.distinct(token_columns(scenario))
    context = LoweringContext(scenario, stack, at_cases.take(token_cases.rows))

    def gather(values: FloatArray) -> FloatArray:
        return np.broadcast_to(values, token_cases.rows.shape)[token_cases.inverse]

    layers = []
    for kind in sequence.kinds:
        if kind.side == "encoder" and scenario.workload.kind == "decode":
            layers.append(PricedBlock(kind.name, ()))  # the source was encoded before
            continue
        tables: list[tuple[PricedTable, Gather]] = [(price_table(dense_part(context, kind), hardware), gather)]
        if kind.is_moe:
            tables.append(_moe_tables(scenario, stack, at_cases, kind, hardware, load_factor))
        layers.append(PricedBlock(kind.name, tuple(tables), is_moe=kind.is_moe))
    first = PricedBlock("first", ((price_table(embedding_part(context), hardware), gather),), is_end=True)
    head = (price_table(head_part(context), hardware), gather)
    last, module, module_layer = PricedBlock("last", (head,), is_end=True), None, 0
    if sequence.mtp_layers and scenario.workload.kind == "training":
        projection = (price_table(token_prediction_part(context), hardware), gather)
        module = PricedBlock("mtp", (projection, head), is_end=True)
        module_layer = sequence.kinds.index(mtp_layer_kind(sequence))
    return PricedBlocks(cases, at_cases, tuple(layers), first, last, module, module_layer)


def layer_cases(
    scenario: Scenario,
    stack: Stack,
    sequence: LayerSequence,
    columns: Columns,
    hardware: Hardware,
    load_factor: LoadFactor,
) -> LayerCases:
    """Price every table once per distinct case of what it reads, then apply recompute and overlap."""
    priced = priced_blocks(scenario, stack, sequence, columns, hardware, load_factor)
    is_training = scenario.workload.kind == "training"
    assembler = _Assembler(stack, is_training, priced.columns["recompute"], scenario.overlap, hardware)
    layers = tuple(assembler.block(block) for block in priced.layers)
    first, last, moe_modules = assembler.block(priced.first), assembler.block(priced.last), 0
    if priced.module is not None:
        module, inner = assembler.block(priced.module), layers[priced.module_layer]
        for _ in range(sequence.mtp_layers):
            last = _joined(_joined(last, module), inner)
        moe_modules = sequence.mtp_layers * inner.is_moe
    sharing = priced.columns["expert"] * priced.columns["expert_tensor"]
    reads = reads_counts(stack.launch, sharing)
    return LayerCases(priced.cases.rows, priced.cases.inverse, layers, first, last, moe_modules, reads)


def _moe_tables(
    scenario: Scenario,
    stack: Stack,
    at_cases: Columns,
    kind: LayerKind,
    hardware: Hardware,
    load_factor: LoadFactor,
) -> tuple[PricedTable, Gather]:
    moe_cases = at_cases.distinct(moe_columns(scenario))
    context = LoweringContext(scenario, stack, at_cases.take(moe_cases.rows))
    priced = price_table(moe_part(context, kind, load_factor), hardware)
    return priced, lambda values: np.broadcast_to(values, moe_cases.rows.shape)[moe_cases.inverse]


def _sum_by_key(one: dict[str, FloatArray], two: dict[str, FloatArray]) -> dict[str, FloatArray]:
    return {key: np.add(one.get(key, 0.0), two.get(key, 0.0)) for key in one | two}


def _joined(block: Block, other: Block) -> Block:
    """Two blocks as one: every quantity added."""

    def join(one: BlockPhase, two: BlockPhase) -> BlockPhase:
        return BlockPhase(
            _sum_by_key(one.exposed_s, two.exposed_s),
            _sum_by_key(one.hidden_s, two.hidden_s),
            {},
            one.device_s + two.device_s,
            one.serial_s + two.serial_s,
            one.ideal_s + two.ideal_s,
            one.flops + two.flops,
            one.host_s + two.host_s,
            one.gap_s + two.gap_s,
            weight_gradient_s=one.weight_gradient_s + two.weight_gradient_s,
        )

    name, is_moe = f"{block.name}+{other.name}", block.is_moe or other.is_moe
    return Block(name, is_moe, join(block.forward, other.forward), join(block.backward, other.backward))


StreamSeconds = dict[str, tuple[FloatArray, FloatArray]]


@dataclass(frozen=True)
class _Assembler:
    """Puts priced tables together into blocks: recompute added to the backward phase, communication overlapped."""

    stack: Stack
    is_training: bool
    recompute: FloatArray
    overlap: Overlap
    hardware: Hardware

    def block(self, priced: PricedBlock) -> Block:
        """One block; ends of the model are never recomputed."""
        forward, backward, selective = BlockPhase(), BlockPhase(), BlockPhase()
        for table, gather in priced.tables:
            for phase, times in (
                (forward, table.forward),
                (backward, table.backward),
                (selective, table.selective),
            ):
                _accumulate(phase, times, gather)
                host_s = host_time_s(times.host, times.kernels, self.stack.launch)
                phase.host_s = phase.host_s + gather(np.zeros(1) + host_s)
                phase.gap_s = phase.gap_s + gather(np.zeros(1) + gap_s(times.host, times.kernels, self.stack.launch))
                if messages_s := expert_messages_s(times.host, self.stack.launch):
                    phase.exposed_s["all_to_all"] = np.add(phase.exposed_s.get("all_to_all", 0.0), messages_s)
                    phase.serial_s = phase.serial_s + messages_s
        if priced.is_moe:
            self._until_routed(priced, forward)
        streams = [self._overlap(phase) for phase in (forward, backward, selective)]
        if priced.is_moe and self.overlap.is_in_blocks:
            self._run_mechanisms(priced, (forward, backward), streams)
        if self.is_training and not priced.is_end:
            self._recompute(backward, forward, selective)
        return Block(priced.name, priced.is_moe, forward, backward)

    def _until_routed(self, priced: PricedBlock, forward: BlockPhase) -> None:
        """Work of a MoE layer until its router has chosen: the dense part, nothing overlapped, and the router."""
        (dense, of_dense), (moe, of_moe) = priced.tables
        dense_s = np.add(total_s(dense.forward.compute_s), total_s(dense.forward.communication_s))
        router_s = moe.forward.compute_s.get("router", np.zeros(1))
        forward.routed_device_s = of_dense(np.zeros(1) + dense_s) + of_moe(router_s)
        launch, work = self.stack.launch, moe.forward.host
        router = HostWork({part: count for part, count in work.operations.items() if part == "router"})
        dense_host_s = host_time_s(dense.forward.host, dense.forward.kernels, launch)
        forward.routed_host_s = of_dense(np.zeros(1) + dense_host_s) + of_moe(
            np.zeros(1) + host_time_s(router, 0, launch)
        )

    def _overlap(self, phase: BlockPhase) -> StreamSeconds:
        """Hide each communication under compute, at most the share the stack achieves and the compute there is.

        Returns seconds and hidden seconds of each stream.
        """
        budget = sum((value for key, value in phase.exposed_s.items() if key not in COMMUNICATION_STREAMS), 0.0)
        streams = {}
        for stream, hidden in hidden_seconds(phase.exposed_s, budget, self.stack.overlap).items():
            streams[stream] = (phase.exposed_s[stream], hidden)
            phase.exposed_s[stream], phase.hidden_s[stream] = phase.exposed_s[stream] - hidden, hidden
        for stream, name in REPORTED_AS.items():
            for parts in (phase.exposed_s, phase.hidden_s):
                if stream in parts:
                    parts[name] = parts.get(name, 0.0) + parts.pop(stream)
        phase.device_s = sum(phase.exposed_s.values(), 0.0)
        if phase.ideal_parts_s:
            phase.ideal_s = np.maximum.reduce(list(phase.ideal_parts_s.values()))
        return streams

    def _run_mechanisms(
        self, priced: PricedBlock, phases: Sequence[BlockPhase], streams: Sequence[StreamSeconds]
    ) -> None:
        """Replace what the stack achieves by what the run's mechanisms do."""
        phases = phases if self.is_training else phases[:1]
        before = [
            Totals(
                phase.exposed_s,
                phase.hidden_s,
                {name: 1.0 - divided(hidden, whole, 0.0) for name, (whole, hidden) in seconds.items()},
            )
            for phase, seconds in zip(phases, streams, strict=False)
        ]
        after = block_mechanisms(self.overlap, self.stack, self.hardware, priced.tables).phases(before)
        for phase, plain, totals in zip(phases, before, after, strict=True):
            phase.exposed_s, phase.hidden_s = dict(totals.exposed_s), dict(totals.hidden_s)
            phase.device_s = sum(phase.exposed_s.values(), 0.0)
            phase.weight_gradient_s = phase.weight_gradient_s * divided(totals.compute_s, plain.compute_s, 1.0)

    def _recompute(self, backward: BlockPhase, forward: BlockPhase, selective: BlockPhase) -> None:
        full = (self.recompute == RECOMPUTE_CODES["full"]).astype(np.float64)
        part = (self.recompute == RECOMPUTE_CODES["selective"]).astype(np.float64)

        def repeated(attribute: str) -> FloatArray:
            return np.asarray(full * getattr(forward, attribute) + part * getattr(selective, attribute))

        backward.exposed_s["recompute"] = repeated("device_s")
        backward.hidden_s["recompute"] = full * sum(forward.hidden_s.values(), 0.0)
        for attribute in ("device_s", "serial_s", "ideal_s", "flops", "host_s", "gap_s"):
            setattr(backward, attribute, getattr(backward, attribute) + repeated(attribute))


def hidden_seconds(
    whole_s: Mapping[str, FloatArray], budget_s: FloatArray | float, overlap: OverlapAchieved
) -> dict[str, FloatArray]:
    """How much of each stream's seconds hides under compute: the share the stack achieves, and at most what is left.

    Parameters
    ----------
    whole_s : mapping of str to ndarray
        Seconds by stream; keys that are no communication stream are left out.
    budget_s : ndarray or float
        Seconds of compute.
    overlap : OverlapAchieved
        Shares of a stack.

    Returns
    -------
    dict
        Hidden seconds of each communication stream there is.
    """
    hidden_s = {}
    for stream in COMMUNICATION_STREAMS:
        if stream in whole_s:
            hidden_s[stream] = np.minimum(whole_s[stream] * getattr(overlap, stream), budget_s)
            budget_s = budget_s - hidden_s[stream]
    return hidden_s


def _accumulate(phase: BlockPhase, times: PhaseTimes, gather: Gather) -> None:
    """Add one priced phase, gathered to the block's cases; communication is still all exposed."""
    zero = np.zeros(1)
    for key, value in (times.compute_s | times.communication_s).items():
        phase.exposed_s[key] = phase.exposed_s.get(key, 0.0) + gather(value)
    phase.exposed_s["imbalance"] = phase.exposed_s.get("imbalance", 0.0) + gather(zero + times.imbalance_s)
    serial = total_s(times.compute_s) + np.asarray(total_s(times.communication_s)) + times.imbalance_s
    phase.serial_s = phase.serial_s + gather(zero + serial)
    parts = {"compute": times.ideal_compute_s, **times.ideal_communication_s}
    for key, part in parts.items():
        phase.ideal_parts_s[key] = phase.ideal_parts_s.get(key, 0.0) + gather(zero + part)
    phase.flops = phase.flops + gather(zero + times.flops)
    phase.weight_gradient_s = phase.weight_gradient_s + gather(zero + times.weight_gradient_s)
