"""Mechanisms of overlap on the ranks of a stage: a block's scopes, rewritten as ``block_overlaps`` does its totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.cost.segment_times import IMBALANCE, SegmentParts
from moesim.engine.block_overlaps import (
    EXCHANGE,
    BlockMechanisms,
    PhaseOverlap,
    SegmentsOfChunks,
    divided,
    with_messages,
)
from moesim.engine.stream_times import Scope, ScopeRewrite, TimedOperation
from moesim.structure.columns import FloatArray
from moesim.structure.overlap_programs import Segment, segment_shares


def scope_rewrite(mechanisms: BlockMechanisms) -> ScopeRewrite:
    """Rewrite a block's forward and backward scope under its mechanisms.

    Parameters
    ----------
    mechanisms : BlockMechanisms
        Of the block, at even load.

    Returns
    -------
    callable
        Takes and gives scopes whose seconds are broadcastable to (n_draws, n_ranks).
    """

    def rewrite(forward: Scope, backward: Scope) -> tuple[Scope, Scope]:
        scopes = [forward, backward] if backward else [forward]
        phases = [_ScopeSeconds(scope) for scope in scopes]
        shape = np.broadcast_shapes(*(phase.shape for phase in phases))
        segments = [
            _segments(mechanisms, scope, shape, is_backward=is_backward)
            for is_backward, scope in zip((False, True), scopes, strict=False)
        ]
        flat = [_Flat(phase, shape) for phase in phases]
        found = mechanisms.phase_overlaps(segments, flat)
        written = [_rewritten(scope, overlap, shape) for scope, overlap in zip(scopes, found, strict=True)]
        return written[0], written[1] if backward else backward

    return rewrite


@dataclass(frozen=True)
class _ScopeSeconds:
    """Seconds of a scope, arrays broadcastable to (n_draws, n_ranks)."""

    scope: Scope

    @property
    def shape(self) -> tuple[int, ...]:
        arrays = [part for timed in self.scope for part in (timed.exposed_s, timed.extra_s, timed.hidden_s)]
        return np.broadcast_shapes((1, 1), *(part.shape for part in arrays))

    @property
    def compute_s(self) -> FloatArray:
        compute = [timed.exposed_s for timed in self.scope if timed.operation.stream == "compute"]
        return sum([*compute, *(timed.extra_s for timed in self.scope)], np.zeros((1, 1)))

    @property
    def other_s(self) -> FloatArray:
        others = [timed.exposed_s for timed in self.scope if timed.operation.stream not in ("compute", EXCHANGE)]
        return sum(others, np.zeros((1, 1)))

    @property
    def exchange_s(self) -> FloatArray:
        return sum((_whole_s(timed) for timed in _exchanges(self.scope)), np.zeros((1, 1)))


@dataclass(frozen=True)
class _Flat:
    """The same with draws and ranks in one dimension."""

    seconds: _ScopeSeconds
    shape: tuple[int, ...]

    @property
    def compute_s(self) -> FloatArray:
        return _flat(self.seconds.compute_s, self.shape)

    @property
    def other_s(self) -> FloatArray:
        return _flat(self.seconds.other_s, self.shape)

    @property
    def exchange_s(self) -> FloatArray:
        return _flat(self.seconds.exchange_s, self.shape)


def _flat(values: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    return np.broadcast_to(values, shape).ravel()


def _exchanges(scope: Scope) -> Sequence[TimedOperation]:
    return [timed for timed in scope if timed.operation.stream == EXCHANGE]


def _whole_s(timed: TimedOperation) -> FloatArray:
    return timed.exposed_s + timed.hidden_s


def _segments(
    mechanisms: BlockMechanisms, scope: Scope, shape: tuple[int, ...], *, is_backward: bool
) -> SegmentsOfChunks:
    """Seconds of parts of segments on every rank: cut into chunks they grow as they do at even load."""
    messages = [timed for timed in scope if timed.operation.table < 0]
    timed_of_tables = [timed for timed in scope if timed.operation.table >= 0]
    shares = segment_shares([timed.operation for timed in timed_of_tables], is_backward=is_backward)
    whole: SegmentParts = {}
    for timed, share in zip(timed_of_tables, shares, strict=True):
        stream = timed.operation.stream
        seconds = _whole_s(timed) if stream == EXCHANGE else timed.exposed_s
        for segment, part in share.items():
            for key, value in (((segment, stream), seconds), ((segment, IMBALANCE), timed.extra_s)):
                whole[key] = whole.get(key, np.zeros(1)) + _flat(value * part, shape)
    messages_s = _flat(sum((_whole_s(timed) for timed in messages), np.zeros((1, 1))), shape)
    in_one = mechanisms.priced(is_backward=is_backward)

    def parts(chunks: int) -> dict[Segment, FloatArray]:
        cut = mechanisms.priced(is_backward=is_backward, chunks=chunks)
        seconds: dict[Segment, FloatArray] = {}
        for key, value in whole.items():
            kept = divided(cut[key], in_one[key], 1.0 / chunks) if key in cut else np.full(1, 1.0 / chunks)
            seconds[key[0]] = seconds.get(key[0], np.zeros(1)) + value * kept
        return with_messages(seconds, messages_s)

    return parts


def _rewritten(scope: Scope, found: PhaseOverlap, shape: tuple[int, ...]) -> Scope:
    stretch, exposed_s, hidden_s = (
        np.broadcast_to(part, (int(np.prod(shape)),)).reshape(shape)
        for part in (found.stretch, found.exposed_s, found.hidden_s)
    )
    exchange_s = _ScopeSeconds(scope).exchange_s
    written = []
    for timed in scope:
        extra_s = timed.extra_s * stretch
        if timed.operation.stream == EXCHANGE:
            share = divided(_whole_s(timed), exchange_s, 0.0)
            timed = replace(timed, exposed_s=exposed_s * share, hidden_s=hidden_s * share)
        elif timed.operation.stream == "compute":
            timed = replace(timed, exposed_s=timed.exposed_s * stretch)
        written.append(replace(timed, extra_s=extra_s))
    return tuple(written)
