"""Collectives between all ranks: equal and uneven all-to-all, reductions, gathers, ping-pong, and several at once.

Sizes are those of nccl-tests: the buffer of a rank, of an all-gather what it ends with. ``bytes`` of a record is what
the busiest rank sends to others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from moesim.measurement.cases import ELEMENT_BYTES, Case, Shape, Work
from moesim.measurement.distributed.layer_shapes import ExpertLayerShape
from moesim.measurement.distributed.layer_work import layer_rows
from moesim.measurement.distributed.row_exchanges import all_to_all_rows
from moesim.measurement.distributed.targets import DistributedTarget

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.distributed.ranks import Ranks
    from moesim.measurement.workbenches import Workbench

SIZES = tuple(2**power for power in (24, 28, 20, 16, 12, 26, 22, 18, 14, 10))
CPU_SIZES = tuple(2**power for power in (18, 22, 12, 20, 16, 10, 14))
PRESETS = ("W1", "W2", "W3", "W5", "W4", "W0")
UNEVEN = (ExpertLayerShape(4096, 4096, 1, 64, 2), ExpertLayerShape(4096, 7168, 1, 64, 8))
CPU_UNEVEN = (ExpertLayerShape(256, 256, 1, 16, 2), ExpertLayerShape(1024, 512, 1, 16, 2))
OPERATIONS = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter", "ping_pong", "ping_pong_pairs")
TOGETHER = ("all_to_all+all_reduce", "all_reduce+all_reduce")


class AbstractPending(Protocol):
    """A collective that is under way."""

    def wait(self) -> object:
        """Wait for it: the host, or the device's stream."""


@dataclass(frozen=True, slots=True)
class Buffers:
    """What a collective reads and writes on one rank."""

    source: Tensor
    goal: Tensor


def cases(target: DistributedTarget) -> list[Case]:
    """Return the cases of collectives, sizes in turn with presets; none for a rank alone."""
    if target.ranks.size == 1:
        return []
    on_cpu = target.device == "cpu"
    dtype = target.dtypes[0]
    found: list[Case] = []
    uneven = [
        _uneven_case(target, shape, preset, dtype)
        for preset in PRESETS
        for shape in (CPU_UNEVEN if on_cpu else UNEVEN)
        if shape.num_experts % target.ranks.expert_parallel == 0
    ]
    for index, size in enumerate(CPU_SIZES if on_cpu else SIZES):
        found += [_case(target, operation, size, dtype) for operation in OPERATIONS]
        found += [_case(target, operation, size, dtype) for operation in TOGETHER if index % 2 == 0]
        found += uneven[2 * index : 2 * index + 2]
    return found


def sent_fraction(operation: str, num_ranks: int) -> float:
    """Bytes that a rank sends, over the size, if every byte takes the shortest way.

    Parameters
    ----------
    operation : str
        One of ``OPERATIONS``, or several joined by ``+``.
    num_ranks : int
        Of all ranks.

    Examples
    --------
    >>> sent_fraction("all_reduce", 4), sent_fraction("all_to_all+all_reduce", 4), sent_fraction("ping_pong", 4)
    (1.5, 2.25, 1.0)
    """
    if operation.startswith("ping_pong"):
        return 1.0
    part = (num_ranks - 1) / num_ranks
    return sum(2 * part if one == "all_reduce" else part for one in operation.split("+"))


def _case(target: DistributedTarget, operation: str, size: int, dtype: str) -> Case:
    """Return one collective; a size that does not divide is cut to whole elements of every rank."""
    num_ranks, element = target.ranks.size, ELEMENT_BYTES[dtype]
    elements = max(size // element // num_ranks, 1) * num_ranks
    moved = elements * element
    named: Shape = {"ranks": num_ranks, "size": moved}
    return Case(
        suite="collectives",
        operation=operation,
        pass_name="forward",
        dtype=dtype,
        shape=named,
        flops=0.0,
        traffic_bytes=moved * sent_fraction(operation, num_ranks),
        working_set_bytes=2.0 * moved * len(operation.split("+")),
        prepare=partial(_prepare, ranks=target.ranks, operation=operation, elements=elements, dtype=dtype),
    )


def _prepare(bench: Workbench, *, ranks: Ranks, operation: str, elements: int, dtype: str) -> Work:
    if operation.startswith("ping_pong"):
        return _ping_pong(bench, ranks, elements, dtype, is_paired=operation.endswith("pairs"))
    names = operation.split("+")
    starts = [_START[name] for name in names]
    buffers = [_buffers(bench, name, elements, dtype, ranks.size) for name in names]
    if len(names) == 1:
        (start,), (one,) = starts, buffers
        return Work(lambda: start(one, is_asynchronous=False), _IMPLEMENTATION[operation])
    groups = _own_groups(ranks, len(names))

    def together() -> None:
        pending = [
            start(one, is_asynchronous=True, group=group)
            for start, one, group in zip(starts, buffers, groups, strict=True)
        ]
        for work in pending:
            work.wait()

    return Work(together, " beside ".join(_IMPLEMENTATION[name] for name in names))


def start_collective(
    bench: Workbench, operation: str, elements: int, dtype: str, num_ranks: int
) -> Callable[[], AbstractPending]:
    """Fill the buffers of a collective between all ranks, and return what starts it.

    Parameters
    ----------
    bench : Workbench
        The device.
    operation : str
        ``all_to_all``, ``all_reduce``, ``all_gather`` or ``reduce_scatter``.
    elements : int
        Of the whole buffer, a multiple of the ranks.
    dtype : str
        Of the elements.
    num_ranks : int
        Of all ranks.
    """
    start, buffers = _START[operation], _buffers(bench, operation, elements, dtype, num_ranks)
    return lambda: start(buffers, is_asynchronous=True)


def _own_groups(ranks: Ranks, number: int) -> list[object]:
    """Return a group of all ranks for each collective of several at once; one group would do them in turn."""
    import torch.distributed as dist

    while len(ranks.side_groups) < number - 1:
        ranks.side_groups.append(dist.new_group(list(range(ranks.size))))
    return [dist.group.WORLD, *ranks.side_groups[: number - 1]]


def _buffers(bench: Workbench, operation: str, elements: int, dtype: str, num_ranks: int) -> Buffers:
    part = elements // num_ranks
    own = part if operation == "all_gather" else elements
    written = part if operation == "reduce_scatter" else elements
    return Buffers(bench.normal(own, dtype=dtype), bench.normal(written, dtype=dtype))


def _all_to_all(buffers: Buffers, *, is_asynchronous: bool, group: object = None) -> AbstractPending:
    import torch.distributed as dist

    pending: AbstractPending = dist.all_to_all_single(
        buffers.goal, buffers.source, group=group, async_op=is_asynchronous
    )
    return pending


def _all_reduce(buffers: Buffers, *, is_asynchronous: bool, group: object = None) -> AbstractPending:
    """Take the maximum: as many bytes as a sum, and values that stay finite however often it is called."""
    import torch.distributed as dist

    pending: AbstractPending = dist.all_reduce(
        buffers.source, op=dist.ReduceOp.MAX, group=group, async_op=is_asynchronous
    )
    return pending


def _all_gather(buffers: Buffers, *, is_asynchronous: bool, group: object = None) -> AbstractPending:
    import torch.distributed as dist

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name
    pending: AbstractPending = gather(buffers.goal, buffers.source, group=group, async_op=is_asynchronous)
    return pending


def _reduce_scatter(buffers: Buffers, *, is_asynchronous: bool, group: object = None) -> AbstractPending:
    import torch.distributed as dist

    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the older name
    pending: AbstractPending = scatter(buffers.goal, buffers.source, group=group, async_op=is_asynchronous)
    return pending


def _ping_pong(bench: Workbench, ranks: Ranks, elements: int, dtype: str, *, is_paired: bool) -> Work:
    """Send and return a message: the first and the last rank, or all ranks in pairs at once; seconds are one way."""
    import torch.distributed as dist

    sent, answer = bench.normal(elements, dtype=dtype), bench.normal(elements, dtype=dtype)
    if is_paired:
        peer, is_asker = ranks.rank ^ 1, ranks.rank % 2 == 0
        takes_part = peer < ranks.size
    else:
        peer, is_asker = ranks.size - 1 - ranks.rank, ranks.rank == 0
        takes_part = ranks.rank in (0, ranks.size - 1)

    def play() -> None:
        if not takes_part:
            return
        if is_asker:
            dist.send(sent, peer)
            dist.recv(answer, peer)
        else:
            dist.recv(answer, peer)
            dist.send(sent, peer)

    return Work(play, "send, recv", 2)


def _uneven_case(target: DistributedTarget, shape: ExpertLayerShape, preset: str, dtype: str) -> Case:
    (routed,) = target.draws(preset, shape, 1)
    rows, row_bytes = layer_rows(shape, routed), shape.hidden * ELEMENT_BYTES[dtype]
    named: Shape = {
        "preset": preset,
        "step": routed.step,
        **target.group_names(),
        "tokens": shape.tokens,
        "hidden": shape.hidden,
        "experts": shape.num_experts,
        "experts_per_token": shape.experts_per_token,
    }
    between = rows.sent.reshape(len(rows.sent), len(rows.sent), -1).sum(axis=2)
    return Case(
        suite="collectives",
        operation="all_to_all_v",
        pass_name="forward",
        dtype=dtype,
        shape=named,
        flops=0.0,
        traffic_bytes=float(rows.off_rank * row_bytes),
        working_set_bytes=2.0 * row_bytes * max(int(rows.sent.sum(axis=1).max()), int(rows.received.max())),
        prepare=partial(
            _prepare_uneven, ranks=target.ranks, between=between.tolist(), hidden=shape.hidden, dtype=dtype
        ),
        loads=rows.loads,
    )


def _prepare_uneven(bench: Workbench, *, ranks: Ranks, between: list[list[int]], hidden: int, dtype: str) -> Work:
    """Fill rows; their numbers are known, as in the backward pass of a layer."""
    me = ranks.expert_rank
    sent, received = tuple(between[me]), tuple(row[me] for row in between)
    rows = bench.normal(sum(sent), hidden, dtype=dtype)
    return Work(lambda: all_to_all_rows(rows, sent, received, ranks.expert_group), "all_to_all_single, uneven")


_START: dict[str, Callable[..., AbstractPending]] = {
    "all_to_all": _all_to_all,
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
}
_IMPLEMENTATION = {
    "all_to_all": "all_to_all_single",
    "all_reduce": "all_reduce, MAX",
    "all_gather": "all_gather_single",
    "reduce_scatter": "reduce_scatter_single",
}
