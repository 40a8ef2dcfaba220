"""Seconds of the segments that an overlap program is made of, and what communication costs what runs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesim.cost.operators import Hardware, loaded_gemm, price_all
from moesim.describe.hardware import CommunicationKernels
from moesim.structure.columns import FloatArray
from moesim.structure.overlap_programs import MOVED, Segment, segment_shares
from moesim.structure.step_graph import AttentionCore, Collective, Gemm, Operation, Work

MOST_LOSS = 0.95
"""Compute never stops: a kernel that holds all compute units leaves a twentieth of the speed."""


SegmentParts = dict[tuple[Segment, str], FloatArray]
"""Seconds by segment and stream; what the most loaded rank takes longer is on the stream ``imbalance``."""
IMBALANCE = "imbalance"


def segment_times(
    operations: Sequence[Operation], hardware: Hardware, *, is_backward: bool, chunks: int = 1
) -> SegmentParts:
    """Seconds of one part of each segment of a table.

    Parameters
    ----------
    operations : sequence of Operation
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
    shares = segment_shares(operations, is_backward=is_backward)
    kept = [(operation, share) for operation, share in zip(operations, shares, strict=True) if share]
    costs = price_all([_part_of(operation, share, chunks) for operation, share in kept], hardware)
    seconds: SegmentParts = {}
    for (operation, share), cost in zip(kept, costs, strict=True):
        for segment, part in share.items():
            key = (segment, operation.stream)
            seconds[key] = seconds.get(key, 0.0) + part * cost.time_s
            if operation.load_factor is not None:
                extra = (segment, IMBALANCE)
                seconds[extra] = seconds.get(extra, 0.0) + part * cost.extra_s
    return seconds


def _part_of(operation: Operation, share: dict[Segment, float], chunks: int) -> Operation:
    """An operation on one chunk of the routed rows, or as it is where it does not work on them."""
    if chunks == 1 or not MOVED.issuperset(share):
        return operation
    return replace(operation, work=_scaled(operation.work, 1.0 / chunks))


def _scaled(work: Work, factor: float) -> Work:
    match work:
        case Gemm():
            return loaded_gemm(work, np.full(1, factor))
        case AttentionCore():
            return work
        case _:
            return replace(work, num_bytes=work.num_bytes * factor)


def exchange_loss(
    operations: Sequence[Operation], hardware: Hardware, kernels: CommunicationKernels | None, compute_units: float
) -> FloatArray:
    """Part of its speed that computing loses while an all-to-all runs, (n_cases,).

    Parameters
    ----------
    operations : sequence of Operation
        Whose first all-to-all counts.
    hardware : Hardware
        Rates.
    kernels : CommunicationKernels or None
        What the stack's kernels take; None: nothing.
    compute_units : float
        Those of the device.

    Notes
    -----
    max(n/N, passes b/B): n of N compute units; every byte sent at b bytes/s is read or written in memory ``passes``
    times, of B bytes/s.
    """
    exchange = next((operation for operation in operations if operation.stream == "all_to_all"), None)
    if kernels is None or exchange is None or not isinstance(exchange.work, Collective):
        return np.zeros(1)
    units = kernels.all_to_all_units.value / compute_units if kernels.all_to_all_units else 0.0
    passes = kernels.memory_passes.value if kernels.memory_passes else 0.0
    (cost,) = price_all([exchange], hardware)
    size = exchange.work.group.size
    sent = exchange.work.num_bytes * (size - 1.0) / np.maximum(size, 1.0)
    rate = np.divide(sent, cost.time_s, out=np.zeros_like(cost.time_s), where=cost.time_s > 0)
    lost = np.maximum(units, passes * rate / hardware.device.memory_bandwidth)
    return np.minimum(lost, MOST_LOSS) * (cost.time_s > 0)


def reduction_loss(kernels: CommunicationKernels | None, compute_units: float) -> float:
    """Part of its speed that computing loses while gradients or parameters travel: n of N compute units."""
    if kernels is None or kernels.reduction_units is None:
        return 0.0
    return min(kernels.reduction_units.value / compute_units, MOST_LOSS)
