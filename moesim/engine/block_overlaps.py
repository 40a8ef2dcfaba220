"""MoE blocks of a step under the mechanisms of overlap that a run asks for, in place of the stack's achieved share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from moesim.cost.layer_times import PricedTable
from moesim.cost.operators import Hardware
from moesim.cost.segment_times import SegmentParts, exchange_loss, segment_times
from moesim.describe.hardware import Stack
from moesim.describe.overlap import Overlap
from moesim.engine.overlaps import BlockOverlap, interleaved_block, overlapped_block
from moesim.structure.columns import FloatArray
from moesim.structure.overlap_programs import Segment

GatheredTable = tuple[PricedTable, Callable[[FloatArray], FloatArray]]
"""A table, and what gathers an array over its cases to those of the block."""
AUTO_DEGREES = (1, 2, 4, 8, 16)
"""Numbers of chunks among which ``auto`` chooses."""
EXCHANGE = "all_to_all"
EXCHANGES: tuple[Segment, ...] = ("exchange_in", "exchange_out")
NOT_COMPUTE = (EXCHANGE, "tensor_parallel", "context_parallel")


SegmentsOfChunks = Callable[[int], dict[Segment, FloatArray]]
"""Seconds of one part of each segment when routed rows are cut into a number of chunks."""


@dataclass(frozen=True)
class PhaseOverlap:
    """What overlap makes of one phase: factor on its compute, and the exchanges' exposed and hidden seconds."""

    stretch: FloatArray
    exposed_s: FloatArray
    hidden_s: FloatArray


class PhaseSeconds(Protocol):
    """Seconds of one phase of a block with the overlap a stack achieves, arrays (n_cases,)."""

    @property
    def compute_s(self) -> FloatArray:
        """All that is no communication."""
        ...

    @property
    def other_s(self) -> FloatArray:
        """Exposed communication but that of the exchanges."""
        ...

    @property
    def exchange_s(self) -> FloatArray:
        """Exchanges, exposed or hidden."""
        ...


@dataclass(frozen=True)
class Totals:
    """One phase of a block with the overlap a stack achieves, seconds by category, arrays (n_cases,).

    ``exposed_part`` is the share of each communication stream that is not hidden.
    """

    exposed_s: Mapping[str, FloatArray]
    hidden_s: Mapping[str, FloatArray]
    exposed_part: Mapping[str, FloatArray]

    @property
    def compute_s(self) -> FloatArray:
        """All that is no communication."""
        return np.asarray(sum((part for name, part in self.exposed_s.items() if name not in NOT_COMPUTE), np.zeros(1)))

    @property
    def other_s(self) -> FloatArray:
        """Exposed communication but that of the exchanges."""
        names = [name for name in NOT_COMPUTE if name != EXCHANGE]
        return np.asarray(sum((self.exposed_s.get(name, 0.0) for name in names), np.zeros(1)))

    @property
    def exchange_s(self) -> FloatArray:
        """Exchanges, exposed or hidden."""
        return np.asarray(self.exposed_s.get(EXCHANGE, 0.0) + self.hidden_s.get(EXCHANGE, 0.0) + np.zeros(1))

    def rewritten(self, found: PhaseOverlap) -> Totals:
        """The same with compute stretched and other exposed and hidden seconds of the exchanges."""
        exposed = {name: part if name in NOT_COMPUTE else part * found.stretch for name, part in self.exposed_s.items()}
        hidden = {**self.hidden_s, EXCHANGE: found.hidden_s}
        return replace(self, exposed_s=exposed | {EXCHANGE: found.exposed_s}, hidden_s=hidden)


@dataclass(frozen=True)
class BlockMechanisms:
    """What a MoE block runs under.

    Attributes
    ----------
    overlap : Overlap
        The run's mechanisms.
    hardware : Hardware
        Rates.
    loss : ndarray of shape (n_cases,) or float
        Part of its speed that computing loses beside an exchange.
    tables : sequence of GatheredTable
        Priced operations of the block.
    """

    overlap: Overlap
    hardware: Hardware
    loss: FloatArray | float
    tables: Sequence[GatheredTable]

    def phases(self, phases: Sequence[Totals]) -> list[Totals]:
        """The forward phase, and the backward phase where there is one."""
        segments = [
            self._segments(one, self.messages_s(one, is_backward=is_backward), is_backward=is_backward)
            for is_backward, one in zip((False, True), phases, strict=False)
        ]
        overlaps = self.phase_overlaps(segments, phases)
        return [one.rewritten(found) for one, found in zip(phases, overlaps, strict=True)]

    def phase_overlaps(
        self, segments: Sequence[SegmentsOfChunks], phases: Sequence[PhaseSeconds]
    ) -> list[PhaseOverlap]:
        """Run the mechanisms.

        Parameters
        ----------
        segments : sequence of SegmentsOfChunks
            Of the forward phase, and of the backward phase where there is one.
        phases : sequence of PhaseSeconds
            The same phases with the overlap a stack achieves.

        Returns
        -------
        list of PhaseOverlap
            One per phase. Of two micro-batches, one forward and one backward where there is a backward phase, each
            phase takes the exchanges' part that it has of both.
        """
        shared, loss = self.overlap.shared_experts, self.loss
        if self.overlap.two_micro_batches:
            both = [phases[0], phases[-1]]
            pair = interleaved_block(segments[0](1), segments[-1](1), has_shared_overlap=shared, loss=loss)
            whole_s = both[0].exchange_s + both[1].exchange_s
            shares = [divided(one.exchange_s, whole_s, 0.0) for one in phases]
            stretch = _stretch(pair, both)
            return [PhaseOverlap(stretch, pair.exposed_s * share, pair.hidden_s * share) for share in shares]
        asked = self.overlap.expert_chunks
        degrees = AUTO_DEGREES if asked == "auto" else (asked or 1,)
        found = [overlapped_block(one, degrees, has_shared_overlap=shared, loss=loss) for one in segments]
        return [
            PhaseOverlap(_stretch(one, [phase]), one.exposed_s, one.hidden_s)
            for one, phase in zip(found, phases, strict=True)
        ]

    def priced(self, *, is_backward: bool, chunks: int = 1) -> SegmentParts:
        """Seconds of one part of each segment, by segment and stream, at the block's cases."""
        total: SegmentParts = {}
        for table, gather in self.tables:
            found = segment_times(table.operations, self.hardware, is_backward=is_backward, chunks=chunks)
            for key, value in found.items():
                total[key] = np.add(total.get(key, 0.0), gather(value))
        return total

    def messages_s(self, totals: PhaseSeconds, *, is_backward: bool) -> FloatArray:
        """What the host's messages to single experts add to the exchanges of a phase."""
        priced = self.priced(is_backward=is_backward)
        exchange_s = sum((value for (_, stream), value in priced.items() if stream == EXCHANGE), np.zeros(1))
        return np.maximum(totals.exchange_s - exchange_s, 0.0)

    def _segments(self, totals: Totals, messages_s: FloatArray, *, is_backward: bool) -> SegmentsOfChunks:
        def parts(chunks: int) -> dict[Segment, FloatArray]:
            seconds: dict[Segment, FloatArray] = {}
            for (segment, stream), value in self.priced(is_backward=is_backward, chunks=chunks).items():
                is_exposed = 1.0 if stream == EXCHANGE else totals.exposed_part.get(stream, 1.0)
                seconds[segment] = seconds.get(segment, np.zeros(1)) + value * is_exposed
            return with_messages(seconds, messages_s)

        return parts


def with_messages(seconds: dict[Segment, FloatArray], messages_s: FloatArray) -> dict[Segment, FloatArray]:
    """Seconds of segments with what the host does for every message to an expert: for every chunk again."""
    each = {segment: seconds.get(segment, np.zeros(1)) + messages_s / len(EXCHANGES) for segment in EXCHANGES}
    return seconds | each


def divided(part: FloatArray, whole: FloatArray, default: float) -> FloatArray:
    """Quotients, and ``default`` where the whole is 0."""
    shape = np.broadcast_shapes(np.shape(part), np.shape(whole))
    return np.asarray(np.divide(part, whole, out=np.full(shape, default), where=np.broadcast_to(whole > 0, shape)))


def _stretch(found: BlockOverlap, phases: Sequence[PhaseSeconds]) -> FloatArray:
    """How much longer compute takes than in one piece with nothing beside it: slowed, and in smaller kernels."""
    other_s = sum((one.other_s for one in phases), np.zeros(1))
    compute_s = sum((one.compute_s for one in phases), np.zeros(1))
    return divided(np.maximum(found.compute_s - other_s, 0.0), compute_s, 1.0)


def block_mechanisms(
    overlap: Overlap, stack: Stack, hardware: Hardware, tables: Sequence[GatheredTable]
) -> BlockMechanisms:
    """Mechanisms of a block whose last table holds the MoE operations.

    Parameters
    ----------
    overlap : Overlap
        The run's mechanisms.
    stack : Stack
        Whose communication kernels run.
    hardware : Hardware
        Rates.
    tables : sequence of GatheredTable
        Priced operations of the block.
    """
    table, gather = tables[-1]
    loss = gather(exchange_loss(table.operations, hardware, stack.communication_kernels))
    return BlockMechanisms(overlap, hardware, loss, tables)
