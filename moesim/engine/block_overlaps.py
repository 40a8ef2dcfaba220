"""MoE blocks of a step under the mechanisms of overlap that a run asks for, in place of the stack's achieved share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.cost.layer_times import REPORTED_AS, PricedTable
from moesim.cost.operators import Hardware
from moesim.cost.segment_times import exchange_loss, segment_times
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


@dataclass(frozen=True)
class Totals:
    """One phase of a block with the overlap a stack achieves, seconds by category, arrays (n_cases,)."""

    exposed_s: Mapping[str, FloatArray]
    hidden_s: Mapping[str, FloatArray]

    def exposed_part(self, stream: str) -> FloatArray | float:
        """Share of a stream's communication that is not hidden."""
        name = REPORTED_AS.get(stream, stream)
        exposed, hidden = self.exposed_s.get(name, 0.0), self.hidden_s.get(name, 0.0)
        whole = np.asarray(exposed + hidden)
        return np.asarray(np.divide(exposed, whole, out=np.ones_like(whole), where=whole > 0))

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

    def rewritten(self, stretch: FloatArray, exposed_s: FloatArray, hidden_s: FloatArray) -> Totals:
        """The same with compute stretched and other exposed and hidden seconds of the exchanges."""
        exposed = {name: part if name in NOT_COMPUTE else part * stretch for name, part in self.exposed_s.items()}
        return Totals(exposed | {EXCHANGE: exposed_s}, {**self.hidden_s, EXCHANGE: hidden_s})


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

    def phases(self, forward: Totals, backward: Totals | None) -> tuple[Totals, Totals | None]:
        """Both phases of the block; ``backward`` None where there is none."""
        if not self.overlap.two_micro_batches:
            return self._chunked(forward, is_backward=False), backward and self._chunked(backward, is_backward=True)
        first = self._segments(forward, is_backward=False)(1)
        second = self._segments(backward, is_backward=True)(1) if backward else first
        found = interleaved_block(first, second, has_shared_overlap=self.overlap.shared_experts, loss=self.loss)
        both = [forward, backward or forward]
        stretch = _stretch(found, both)
        exchange_s = sum(totals.exchange_s for totals in both)
        written = []
        for totals in both:
            share = np.divide(totals.exchange_s, exchange_s, out=np.zeros_like(exchange_s), where=exchange_s > 0)
            written.append(totals.rewritten(stretch, found.exposed_s * share, found.hidden_s * share))
        return written[0], written[1] if backward else None

    def _chunked(self, totals: Totals, *, is_backward: bool) -> Totals:
        asked = self.overlap.expert_chunks
        degrees = AUTO_DEGREES if asked == "auto" else (asked or 1,)
        found = overlapped_block(
            self._segments(totals, is_backward=is_backward),
            degrees,
            has_shared_overlap=self.overlap.shared_experts,
            loss=self.loss,
        )
        return totals.rewritten(_stretch(found, [totals]), found.exposed_s, found.hidden_s)

    def _segments(self, totals: Totals, *, is_backward: bool) -> Callable[[int], dict[Segment, FloatArray]]:
        """Seconds of parts of segments; what the host does for each message to an expert is done for every chunk."""

        def parts(chunks: int) -> dict[Segment, FloatArray]:
            seconds: dict[Segment, FloatArray] = {}
            for table, gather in self.tables:
                priced = segment_times(table.operations, self.hardware, is_backward=is_backward, chunks=chunks)
                for (segment, stream), value in priced.items():
                    is_exposed = 1.0 if stream == EXCHANGE else totals.exposed_part(stream)
                    seconds[segment] = seconds.get(segment, np.zeros(1)) + gather(value) * is_exposed
            return seconds

        messages_s = np.maximum(totals.exchange_s - self._exchange_s(is_backward=is_backward), 0.0)

        def with_messages(chunks: int) -> dict[Segment, FloatArray]:
            seconds = parts(chunks)
            for segment in EXCHANGES:
                seconds[segment] = seconds.get(segment, np.zeros(1)) + messages_s / len(EXCHANGES)
            return seconds

        return with_messages

    def _exchange_s(self, *, is_backward: bool) -> FloatArray:
        total = np.zeros(1)
        for table, gather in self.tables:
            priced = segment_times(table.operations, self.hardware, is_backward=is_backward)
            for (_, stream), value in priced.items():
                if stream == EXCHANGE:
                    total = total + gather(value)
        return total


def _stretch(found: BlockOverlap, phases: Sequence[Totals]) -> FloatArray:
    """How much longer compute takes than in one piece with nothing beside it: slowed, and in smaller kernels."""
    other_s, compute_s = sum(one.other_s for one in phases), sum(one.compute_s for one in phases)
    busy_s = np.maximum(found.compute_s - other_s, 0.0)
    return np.divide(busy_s, compute_s, out=np.ones_like(busy_s + compute_s), where=compute_s > 0)


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
