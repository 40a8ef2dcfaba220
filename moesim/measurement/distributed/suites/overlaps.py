"""Compute beside a collective: each alone, and both at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, Shape, Work
from moesim.measurement.distributed.suites.collectives import sent_fraction, start_collective
from moesim.measurement.distributed.targets import DistributedTarget

if TYPE_CHECKING:
    from moesim.measurement.distributed.ranks import Ranks
    from moesim.measurement.workbenches import Workbench

COLLECTIVES = ("all_to_all", "all_reduce", "all_gather")
SIZES = (2**26, 2**28, 2**24)
CPU_SIZES = (2**20, 2**22)
# m, n, k of the product; how many elements are added where compute is bound by memory.
PRODUCT = (8192, 8192, 4096)
CPU_PRODUCT = (128, 512, 512)
ADDED = 2**28
CPU_ADDED = 2**19
PARTS = ("compute", "collective", "together")


def cases(target: DistributedTarget) -> list[Case]:
    """Return the cases of overlap, three for each pair; none for a rank alone."""
    if target.ranks.size == 1:
        return []
    sizes, dtype = (CPU_SIZES if target.device == "cpu" else SIZES), target.dtypes[0]
    return [
        _case(target, compute, collective, size, dtype, part)
        for size in sizes
        for collective in COLLECTIVES
        for compute in ("gemm", "add")
        for part in PARTS
    ]


def _case(target: DistributedTarget, compute: str, collective: str, size: int, dtype: str, part: str) -> Case:
    num_ranks, element = target.ranks.size, ELEMENT_BYTES[dtype]
    elements = max(size // element // num_ranks, 1) * num_ranks
    m, n, k = CPU_PRODUCT if target.device == "cpu" else PRODUCT
    added = CPU_ADDED if target.device == "cpu" else ADDED
    named: Shape = {
        "ranks": num_ranks,
        "compute": compute,
        "collective": collective,
        "size": elements * element,
        **({"m": m, "n": n, "k": k} if compute == "gemm" else {"elements": added}),
    }
    held = element * ((m * n + m * k + n * k) if compute == "gemm" else 3 * added)
    prepare = partial(
        _prepare,
        ranks=target.ranks,
        parts=(compute, collective),
        elements=elements,
        sizes=(m, n, k) if compute == "gemm" else (added,),
        dtype=dtype,
        part=part,
    )
    return Case(
        suite="overlap",
        operation=part,
        pass_name="forward",
        dtype=dtype,
        shape=named,
        flops=2.0 * m * n * k if compute == "gemm" and part != "collective" else 0.0,
        traffic_bytes=elements * element * sent_fraction(collective, num_ranks) if part != "compute" else float(held),
        working_set_bytes=float(held + 2 * elements * element),
        prepare=prepare,
        rotates=False,  # two collectives of the same buffers must not be under way at once, nor their computes differ
    )


def _prepare(
    bench: Workbench,
    *,
    ranks: Ranks,
    parts: tuple[str, str],
    elements: int,
    sizes: tuple[int, ...],
    dtype: str,
    part: str,
) -> Work:
    name, collective = parts
    compute = _compute(bench, name, sizes, dtype)
    start = start_collective(bench, collective, elements, dtype, ranks.size)

    def communicate() -> None:
        start().wait()

    def together() -> None:
        pending = start()
        compute()
        pending.wait()

    named = f"{'torch.mm' if name == 'gemm' else 'torch.add'}, {collective}"
    if part == "compute":
        return Work(compute, named)
    return Work(communicate if part == "collective" else together, f"{named}, async_op")


def _compute(bench: Workbench, name: str, sizes: tuple[int, ...], dtype: str) -> Callable[[], object]:
    import torch

    if name == "gemm":
        m, n, k = sizes
        inputs, weight = bench.normal(m, k, dtype=dtype), bench.weight(n, k, dtype=dtype)
        out = bench.empty(m, n, dtype=dtype)
        return lambda: torch.mm(inputs, weight.t(), out=out)
    left, right = bench.normal(*sizes, dtype=dtype), bench.normal(*sizes, dtype=dtype)
    added = bench.empty(*sizes, dtype=dtype)
    return lambda: torch.add(left, right, out=added)
