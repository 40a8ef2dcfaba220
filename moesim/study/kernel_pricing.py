"""Many operations of one case each, priced as few operations of many cases: the same seconds, far fewer calls."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from moesim.cost.operators import Hardware, price_all
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import AttentionCore, Gemm, MemoryTraffic, Operation, PrefillShape, Work


def operation_seconds(operations: Sequence[Operation], hardware: Hardware) -> FloatArray:
    """Seconds of operations on one device at mean load.

    Parameters
    ----------
    operations : sequence of Operation
        Kernels whose arrays have the shape (1,).
    hardware : Hardware
        What they run on.

    Returns
    -------
    ndarray of shape (n_operations,)
        As :func:`~moesim.cost.operators.price_all` prices each.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, operation in enumerate(operations):
        groups.setdefault(_kind(operation), []).append(index)
    joined = [_joined([operations[index] for index in members]) for members in groups.values()]
    seconds = np.zeros(len(operations))
    for members, cost in zip(groups.values(), price_all(joined, hardware), strict=True):
        seconds[members] = np.broadcast_to(cost.time_s, len(members))
    return seconds


def _kind(operation: Operation) -> Hashable:
    """What operations must agree in to be cases of one."""
    match operation.work:
        case Gemm() as work:
            scalars: tuple[Hashable, ...] = (work.precision, work.input_bytes, work.output_bytes)
            scalars += (work.accumulates, work.is_ragged, work.sums_tokens, work.scaling)
        case MemoryTraffic():
            scalars = ()
        case AttentionCore() as work:
            head_size = None if work.prefill is None else work.prefill.head_size
            scalars = (work.matmul_width, work.visible_fraction, work.precision, work.element_bytes, head_size)
            scalars += (work.is_backward,)
        case _:
            scalars = (id(operation),)
    return (type(operation.work).__name__, operation.kernels, operation.slowdown, *scalars)


def _joined(operations: Sequence[Operation]) -> Operation:
    works = [operation.work for operation in operations]
    return replace(operations[0], work=_joined_work(works), load_factor=None)


def _joined_work(works: Sequence[Work]) -> Work:
    first = works[0]
    match first:
        case Gemm():
            rows, columns = _together(works, "rows"), _together(works, "columns")
            return replace(
                first,
                rows=rows,
                columns=columns,
                inner=_together(works, "inner"),
                groups=_together(works, "groups"),
                row_dispersion=_together(works, "row_dispersion"),
            )
        case MemoryTraffic():
            return replace(
                first,
                num_bytes=_together(works, "num_bytes"),
                compute_s=_together(works, "compute_s"),
                serial_s=_together(works, "serial_s"),
            )
        case AttentionCore():
            pairs, heads = _together(works, "pairs"), _together(works, "heads")
            joined = replace(first, pairs=pairs, heads=heads, io_elements=_together(works, "io_elements"))
            calls = [work.prefill for work in works if isinstance(work, AttentionCore) and work.prefill is not None]
            return joined if not calls else replace(joined, prefill=_joined_calls(calls))
        case _:
            return first


def _joined_calls(calls: Sequence[PrefillShape]) -> PrefillShape:
    sequences, length = _together(calls, "sequences"), _together(calls, "length")
    return replace(calls[0], sequences=sequences, length=length, kv_heads=_together(calls, "kv_heads"))


def _together(parts: Sequence[object], name: str) -> FloatArray:
    """One array of a field's arrays."""
    return np.concatenate([np.atleast_1d(getattr(part, name)) for part in parts])
