"""Seconds of what a rank's streams run: operations of a chunk's pass, with overlap and host work, per rank and draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice, repeat

import numpy as np

from moesim.cost.host_times import expert_messages_s, gap_s, host_time_s
from moesim.cost.layer_times import COMMUNICATION_STREAMS, PhaseTimes, PricedTable
from moesim.describe.hardware import Stack
from moesim.engine.layer_cases import PricedBlock, hidden_seconds
from moesim.structure.columns import RECOMPUTE_CODES, FloatArray
from moesim.structure.pipeline_orders import BACKWARD, FORWARD, WEIGHT_GRADIENT
from moesim.structure.rank_programs import StreamOperation, stream_operations
from moesim.structure.step_graph import Operation

RankSeconds = Mapping[tuple[int, str, int], FloatArray]
"""Seconds of operations that grow with load, by (layer number, phase, position in the layer's MoE table): arrays
broadcastable to (n_draws, ranks of a stage)."""
CollectiveSeconds = Callable[[Operation, tuple[int, str, int]], FloatArray]
"""Seconds of a collective, and of ``RankSeconds`` its key, where links differ; broadcastable to (n_draws, n_ranks)."""


@dataclass(frozen=True)
class TimedOperation:
    """An operation with its seconds, arrays broadcastable to (n_draws, n_ranks).

    ``exposed_s`` runs in line on its stream, ``extra_s`` after it while the fullest rank has more to do, ``hidden_s``
    beside the compute of its block. ``category`` is where an answer counts it.
    """

    operation: StreamOperation
    category: str
    exposed_s: FloatArray
    extra_s: FloatArray
    hidden_s: FloatArray

    @property
    def is_weight_gradient(self) -> bool:
        """Whether schedules with weight gradients apart run it there."""
        return self.operation.phase == "weight_gradient" and self.operation.stream == "compute"


Scope = tuple[TimedOperation, ...]
"""Operations among which communication hides under compute."""


@dataclass(frozen=True)
class BlockTimes:
    """A layer or an end of the model on the ranks of a stage; ``layer`` is its number, -1 for an end.

    ``forward`` and ``backward`` are scopes in order; ``host_forward_s`` and ``host_backward_s`` what the host needs to
    issue them, ``gap_forward_s`` and ``gap_backward_s`` the gaps between their kernels.
    """

    layer: int
    is_moe: bool
    forward: tuple[Scope, ...]
    backward: tuple[Scope, ...]
    host_forward_s: float
    host_backward_s: float
    gap_forward_s: float
    gap_backward_s: float


@dataclass(frozen=True)
class BlockPass:
    """One phase of a block: what runs in it, ``scopes``.

    Where weight gradients run apart, ``earlier`` are the scopes whose communication may still hide under them.
    """

    layer: int
    scopes: tuple[Scope, ...]
    earlier: tuple[Scope, ...] = ()


@dataclass(frozen=True)
class Stretch:
    """Blocks between two moments at which the device has worked off what the host issued.

    It ends when both are done: the blocks, and ``host_s`` (broadcastable to (n_draws, n_ranks)) from its start; then
    ``synchronisation_s``. What the host is ahead and the gaps between kernels are taken off ``host_s``, and the gaps
    added to ``synchronisation_s``: max(device + gap, host) is max(device, host - gap) + gap.
    """

    blocks: tuple[BlockPass, ...]
    host_s: FloatArray
    synchronisation_s: float = 0.0

    def operations(self) -> Iterator[TimedOperation]:
        """Operations in order."""
        for block in self.blocks:
            for scope in block.scopes:
                yield from scope


@dataclass(frozen=True)
class ChunkPass:
    """Everything a stage runs for one micro-batch of one chunk in one phase of the schedule.

    ``zero_s`` are ZeRO's collectives: the share ``zero_overlap`` of them hides beside the stretches and ``later_s``,
    what weight gradients that run apart take, the rest goes before them.
    """

    stretches: tuple[Stretch, ...]
    zero_s: float = 0.0
    zero_overlap: float = 0.0
    later_s: FloatArray = field(default_factory=lambda: np.zeros((1, 1)))

    @property
    def host_s(self) -> FloatArray:
        """What the host needs to issue all of it, without synchronisations."""
        return sum((stretch.host_s for stretch in self.stretches), np.zeros((1, 1)))


ScopeRewrite = Callable[[Scope, Scope], tuple[Scope, Scope]]
"""What mechanisms of overlap make of a block's forward and backward scope."""


@dataclass(frozen=True)
class BlockProgram:
    """Operations of a priced block in the order of execution, their even seconds, and its host seconds by phase.

    ``rewrite`` is for blocks that overlap as a run asks for, not as the stack achieves.
    """

    block: PricedBlock
    stack: Stack
    recompute: int
    rewrite: ScopeRewrite | None = None

    @cached_property
    def operations(self) -> tuple[StreamOperation, ...]:
        """Forward operations, then backward ones."""
        tables = [[operation for operation, _ in table.operations] for table, _ in self.block.tables]
        return stream_operations(tables)

    @cached_property
    def even_s(self) -> dict[tuple[int, int], tuple[float, float]]:
        """Seconds at mean load and what the fullest rank takes longer, by (table, index)."""
        return {
            (at, index): (_one(cost.time_s), _one(cost.extra_s) if operation.load_factor is not None else 0.0)
            for at, (table, _) in enumerate(self.block.tables)
            for index, (operation, cost) in enumerate(table.operations)
        }

    def host_s(self, phase: str) -> float:
        """What the host needs to issue ``forward``, ``backward`` or the ``selective`` repetition."""
        times = [_phase(table, phase) for table, _ in self.block.tables]
        return sum(_one(host_time_s(part.host, part.kernels, self.stack.launch)) for part in times)

    def gap_s(self, phase: str) -> float:
        """Gaps between the kernels of a phase."""
        times = [_phase(table, phase) for table, _ in self.block.tables]
        return sum(_one(gap_s(part.host, part.kernels, self.stack.launch)) for part in times)

    def messages_s(self, phase: str) -> float:
        """What messages to single experts take, see ``host_times.expert_messages_s``."""
        return sum(expert_messages_s(_phase(table, phase).host, self.stack.launch) for table, _ in self.block.tables)

    def times(
        self,
        layer: int,
        loads: RankSeconds,
        compute_factor: FloatArray,
        *,
        is_training: bool,
        collectives: CollectiveSeconds | None = None,
    ) -> BlockTimes:
        """Seconds on the ranks of a stage.

        Parameters
        ----------
        layer : int
            Number of the layer, -1 for an end of the model.
        loads : mapping
            Seconds of operations that grow with load; those it lacks are even.
        compute_factor : ndarray broadcastable to (n_draws, n_ranks)
            How many times longer each rank computes.
        is_training : bool
            Whether there is a backward pass, with recompute.
        collectives : callable, optional
            Seconds of collectives in place of those of ``loads``; None where all links are alike.
        """
        by_phase = {
            name: [row for row in self.operations if (row.phase == "forward") == (name == "forward")]
            for name in ("forward", "backward")
        }
        seconds = {
            (row.table, row.index): self._seconds(row, layer, loads, compute_factor, collectives)
            for row in self.operations
        }
        forward = self._scope(by_phase["forward"], seconds, "forward")
        last = self._scope(by_phase["backward"], seconds, "backward")
        if self.rewrite is not None:
            forward, last = self.rewrite(forward, last)
        backward: tuple[Scope, ...] = (last,)
        repeated = None
        if is_training and not self.block.is_end:
            if self.recompute == RECOMPUTE_CODES["full"]:
                backward, repeated = (_repeated(forward), *backward), "forward"
            elif self.recompute == RECOMPUTE_CODES["selective"]:
                part = [row for row in by_phase["forward"] if row.is_recomputed_selectively]
                backward, repeated = (_repeated(self._scope(part, seconds, "selective")), *backward), "selective"
        phases = ["backward", *([] if repeated is None else [repeated])]
        return BlockTimes(
            layer,
            self.block.is_moe,
            (forward,),
            backward,
            self.host_s("forward"),
            sum(self.host_s(phase) for phase in phases),
            self.gap_s("forward"),
            sum(self.gap_s(phase) for phase in phases),
        )

    def _seconds(
        self,
        row: StreamOperation,
        layer: int,
        loads: RankSeconds,
        compute_factor: FloatArray,
        collectives: CollectiveSeconds | None,
    ) -> tuple[FloatArray, FloatArray]:
        """Seconds of an operation, and what the fullest rank takes longer where its load is not given."""
        time_s, extra_s = (np.full((1, 1), value) for value in self.even_s[row.table, row.index])
        key = (layer, row.phase, row.index)
        if row.group and collectives is not None:
            operation, _ = self.block.tables[row.table][0].operations[row.index]
            time_s, extra_s = collectives(operation, key), np.zeros((1, 1))
        elif row.grows_with_load and key in loads:
            time_s, extra_s = np.atleast_2d(loads[key]), np.zeros((1, 1))
        if row.stream == "compute":
            return time_s * compute_factor, extra_s * compute_factor
        return time_s, extra_s

    def _scope(
        self,
        rows: Sequence[StreamOperation],
        seconds: Mapping[tuple[int, int], tuple[FloatArray, FloatArray]],
        name: str,
    ) -> Scope:
        """Hide what the stack hides; operations that take no time are left out."""
        timed = [(row, *seconds[row.table, row.index]) for row in rows]
        if messages_s := self.messages_s(name):
            first = next((at for at, entry in enumerate(timed) if entry[0].stream == "all_to_all"), len(timed))
            timed.insert(first, (_messages(name), np.full((1, 1), messages_s), np.zeros((1, 1))))
        whole_s: dict[str, FloatArray] = {}
        budget_s = np.zeros((1, 1))
        for row, time_s, extra_s in timed:
            if row.stream in COMMUNICATION_STREAMS:
                whole_s[row.stream] = whole_s.get(row.stream, np.zeros((1, 1))) + time_s
                budget_s = budget_s + extra_s
            else:
                budget_s = budget_s + time_s + extra_s
        hidden_s = hidden_seconds(whole_s, budget_s, self.stack.overlap)
        scope = []
        for row, time_s, extra_s in timed:
            hidden = np.zeros((1, 1))
            if row.stream in hidden_s:
                hidden = time_s * _ratio(hidden_s[row.stream], whole_s[row.stream])
            if time_s.any() or extra_s.any():
                scope.append(TimedOperation(row, row.category, time_s - hidden, extra_s, hidden))
        return tuple(scope)


def _one(values: FloatArray | float) -> float:
    return float(np.ravel(values)[0])


def _ratio(part: FloatArray, whole: FloatArray) -> FloatArray:
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole > 0)


def _phase(table: PricedTable, phase: str) -> PhaseTimes:
    return {"forward": table.forward, "backward": table.backward, "selective": table.selective}[phase]


def _messages(phase: str) -> StreamOperation:
    return StreamOperation(
        name="experts.messages",
        category="all_to_all",
        phase="activation_gradient" if phase == "backward" else "forward",
        stream="all_to_all",
        group="",
        table=-1,
        index=-1,
        grows_with_load=False,
        is_recomputed_selectively=False,
        num_bytes=0.0,
    )


def _repeated(scope: Scope) -> Scope:
    return tuple(replace(timed, category="recompute") for timed in scope)


@dataclass(frozen=True)
class StretchRule:
    """When the device waits for the host: after every block of a forward pass, or once per pass.

    ``synchronisation_s`` is what copying counts to the host takes in each MoE layer. ``lead_forward_s`` by block (else
    one number for the pass) and ``lead_backward_s`` are what the host is ahead, see ``host_leads``.
    """

    per_block: bool
    synchronisation_s: float
    lead_forward_s: tuple[float, ...] = ()
    lead_backward_s: float = 0.0


@dataclass(frozen=True)
class ChunkBlocks:
    """Blocks of a chunk on the ranks of a stage, in order.

    ``groups`` has together what is one block to the host: a layer, or an end of the model. ``zero_s`` by phase are
    ZeRO's collectives of a pass, of which the share ``zero_overlap`` by phase hides.
    """

    groups: tuple[tuple[BlockTimes, ...], ...]
    rule: StretchRule
    zero_s: Mapping[int, float]
    zero_overlap: Mapping[int, float]

    def chunk_pass(self, phase: int) -> ChunkPass:
        """The pass of a phase of the schedule."""
        zero_s, overlap = self.zero_s.get(phase, 0.0), self.zero_overlap.get(phase, 0.0)
        if phase == FORWARD:
            return ChunkPass(self._forward(), zero_s, overlap)
        if phase == WEIGHT_GRADIENT:
            return ChunkPass((Stretch(self._weight_gradients(), np.zeros((1, 1))),))
        host_s, gap_s = self._backward_host_s()
        if phase == BACKWARD:
            blocks = tuple(BlockPass(block.layer, block.backward) for block in self._reversed())
            return ChunkPass((Stretch(blocks, host_s, gap_s),), zero_s, overlap)
        blocks = tuple(BlockPass(block.layer, _split(block.backward)[0]) for block in self._reversed())
        later_s = sum((timed.exposed_s + timed.extra_s for timed in self._weight_operations()), np.zeros((1, 1)))
        stretch = Stretch(blocks, np.maximum(host_s - later_s, 0.0), gap_s)
        return ChunkPass((stretch,), zero_s, overlap, later_s)

    def _forward(self) -> tuple[Stretch, ...]:
        passes = [tuple(BlockPass(block.layer, block.forward) for block in group) for group in self.groups]
        host_s = [sum(block.host_forward_s for block in group) for group in self.groups]
        gaps_s = [sum(block.gap_forward_s for block in group) for group in self.groups]
        reads_s = [sum(block.is_moe for block in group) * self.rule.synchronisation_s for group in self.groups]
        if not self.rule.per_block:
            passes = [tuple(block for group in passes for block in group)]
            host_s, gaps_s, reads_s = [sum(host_s)], [sum(gaps_s)], [sum(reads_s)]
        leads = list(islice(chain(self.rule.lead_forward_s, repeat(0.0)), len(host_s)))
        return tuple(
            Stretch(blocks, _late_host_s(host, lead + gap), gap + read)
            for blocks, host, lead, gap, read in zip(passes, host_s, leads, gaps_s, reads_s, strict=True)
        )

    def _backward_host_s(self) -> tuple[FloatArray, float]:
        """What the host needs longer than leads and gaps, and the gaps."""
        host_s = sum(block.host_backward_s for block in self._reversed())
        gap_s = sum(block.gap_backward_s for block in self._reversed())
        return _late_host_s(host_s, self.rule.lead_backward_s + gap_s), gap_s

    def _weight_operations(self) -> Iterator[TimedOperation]:
        for block in self._reversed():
            for scope in _split(block.backward)[1]:
                yield from scope

    def _weight_gradients(self) -> tuple[BlockPass, ...]:
        passes = []
        for block in self._reversed():
            inputs, weights = _split(block.backward)
            passes.append(BlockPass(block.layer, weights, earlier=inputs))
        return tuple(passes)

    def _reversed(self) -> Iterator[BlockTimes]:
        for group in reversed(self.groups):
            yield from reversed(group)


def _late_host_s(host_s: float, less_s: float) -> FloatArray:
    return np.full((1, 1), max(host_s - less_s, 0.0))


def _split(scopes: tuple[Scope, ...]) -> tuple[tuple[Scope, ...], tuple[Scope, ...]]:
    """Scopes without weight gradients, and the weight gradients alone."""
    inputs = tuple(tuple(timed for timed in scope if not timed.is_weight_gradient) for scope in scopes)
    weights = tuple(tuple(timed for timed in scope if timed.is_weight_gradient) for scope in scopes)
    return inputs, weights
