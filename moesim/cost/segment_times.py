"""Seconds of the segments that an overlap program is made of, and what communication costs what runs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesim.cost.operators import Hardware, OperationCost, loaded_gemm, price_all
from moesim.describe.hardware import CommunicationKernels
from moesim.structure.columns import FloatArray
from moesim.structure.overlap_programs import MOVED, Segment, segment_shares
from moesim.structure.step_graph import AttentionCore, Collective, Gemm, MemoryTraffic, Operation, Work

MOST_LOSS = 0.95
"""Compute never stops: a kernel that holds all compute units leaves a twentieth of the speed."""


SegmentParts = dict[tuple[Segment, str], FloatArray]
"""Seconds by segment and stream; what the most loaded rank takes longer is on the stream ``imbalance``."""
IMBALANCE = "imbalance"


def segment_times(
    priced: Sequence[tuple[Operation, OperationCost]], hardware: Hardware, *, is_backward: bool, chunks: int = 1
) -> SegmentParts:
    """Seconds of one part of each segment of a table.

    Parameters
    ----------
    priced : sequence of tuple of Operation and OperationCost
        Those of one table, all phases.
    hardware : Hardware
        Rates.
    is_backward : bool
        Phase.
    chunks : int
        Parts that routed rows are cut into: exchanges of fewer bytes, GEMMs of fewer rows.

    Returns
    -------
    dict of tuple to ndarray of shape (n_cases,)
        By segment and stream, where there is anything.
    """
    shares = segment_shares([operation for operation, _ in priced], is_backward=is_backward)
    kept = [(*pair, share) for pair, share in zip(priced, shares, strict=True) if share]
    if chunks > 1:
        moved = [MOVED.issuperset(share) for _, _, share in kept]
        parts = [_part_of(operation, chunks) for (operation, _, _), moves in zip(kept, moved, strict=True) if moves]
        costs = iter(price_all(parts, hardware))
        kept = [
            (operation, next(costs) if moves else cost, share)
            for (operation, cost, share), moves in zip(kept, moved, strict=True)
        ]
    seconds: SegmentParts = {}
    for operation, cost, share in kept:
        for segment, part in share.items():
            _add(seconds, (segment, operation.stream), part * cost.time_s)
            if operation.load_factor is not None:
                _add(seconds, (segment, IMBALANCE), part * cost.extra_s)
    return seconds


def _add(seconds: SegmentParts, key: tuple[Segment, str], value: FloatArray) -> None:
    seconds[key] = np.add(seconds.get(key, 0.0), value)


def _part_of(operation: Operation, chunks: int) -> Operation:
    """An operation on one chunk of the routed rows."""
    return replace(operation, work=_scaled(operation.work, 1.0 / chunks))


def _scaled(work: Work, factor: float) -> Work:
    match work:
        case Gemm():
            return loaded_gemm(work, np.full(1, factor))
        case AttentionCore():
            return work
        case MemoryTraffic():
            return replace(work, num_bytes=work.num_bytes * factor, compute_s=work.compute_s * factor)
        case _:
            return replace(work, num_bytes=work.num_bytes * factor)


def exchange_loss(
    priced: Sequence[tuple[Operation, OperationCost]], hardware: Hardware, kernels: CommunicationKernels | None
) -> FloatArray:
    """Part of its speed that computing loses while an all-to-all runs, (n_cases,).

    Parameters
    ----------
    priced : sequence of tuple of Operation and OperationCost
        Those of one table; its first all-to-all counts.
    hardware : Hardware
        Rates.
    kernels : CommunicationKernels or None
        What the stack's kernels take; None: nothing.

    Notes
    -----
    max(n/N, passes b/B): n of N compute units; every byte sent at b bytes/s is read or written in memory ``passes``
    times, of B bytes/s.
    """
    exchanges = [(one.work, cost) for one, cost in priced if one.stream == "all_to_all"]
    if kernels is None or not exchanges:
        return np.zeros(1)
    work, cost = exchanges[0]
    assert isinstance(work, Collective)
    units = kernels.all_to_all_units.value / hardware.device.compute_units if kernels.all_to_all_units else 0.0
    passes = kernels.memory_passes.value if kernels.memory_passes else 0.0
    sent = work.num_bytes * (work.group.size - 1.0) / np.maximum(work.group.size, 1.0)
    rate = np.divide(sent, cost.time_s, out=np.zeros_like(cost.time_s), where=cost.time_s > 0)
    lost = np.maximum(units, passes * rate / hardware.device.memory_bandwidth)
    return np.minimum(lost, MOST_LOSS) * (cost.time_s > 0)


def reduction_loss(hardware: Hardware, kernels: CommunicationKernels | None) -> float:
    """Part of its speed that computing loses while gradients or parameters travel: n of N compute units."""
    if kernels is None or kernels.reduction_units is None:
        return 0.0
    return min(kernels.reduction_units.value / hardware.device.compute_units, MOST_LOSS)
