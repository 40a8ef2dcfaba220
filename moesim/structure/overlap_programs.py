"""Overlap as dependencies: a block's segments cut into tasks on streams, without seconds.

A MoE block is a head (attention, norms, router, rows put in order), an exchange, the experts, an exchange back and a
tail. What overlaps follows from needs and streams alone: a stream runs its tasks in order, one at a time, each as soon
as what it needs is done. Both exchanges are on one stream, since they use the same links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, Protocol

import numpy as np

from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.step_graph import Phase

Segment = Literal["head", "exchange_in", "experts", "exchange_out", "tail", "shared_first", "shared_second"]
SEGMENTS: tuple[Segment, ...] = (
    "head",
    "exchange_in",
    "experts",
    "exchange_out",
    "tail",
    "shared_first",
    "shared_second",
)
MOVED: frozenset[Segment] = frozenset(("exchange_in", "experts", "exchange_out"))
"""Segments that work on routed rows and can be cut into chunks of them."""

COMPUTE, COMMUNICATION = 0, 1
MOST_CHUNKS = 64


@dataclass(frozen=True)
class Task:
    """Part of a segment on a stream.

    Attributes
    ----------
    segment : str
        What it is a part of.
    stream : int
        ``COMPUTE`` or ``COMMUNICATION``.
    needs : tuple of int
        Tasks of the program that must be done before.
    parts : int
        Equal parts that the segment is cut into; this is one.
    owner : int
        Micro-batch of the program that it belongs to.
    layer : int
        Layer of the program.
    """

    segment: Segment
    stream: int
    needs: tuple[int, ...] = ()
    parts: int = 1
    owner: int = 0
    layer: int = 0


@dataclass(frozen=True)
class OverlapProgram:
    """Tasks in the order in which each stream takes its own."""

    tasks: tuple[Task, ...]

    @cached_property
    def stream_order(self) -> tuple[IntArray, ...]:
        """Tasks of each stream in order; arrays of task numbers."""
        streams = (COMPUTE, COMMUNICATION)
        return tuple(
            np.array([index for index, task in enumerate(self.tasks) if task.stream == stream], dtype=np.int64)
            for stream in streams
        )

    @cached_property
    def padded_needs(self) -> IntArray:
        """Needs of each task, filled up with ``n_tasks``: shape (n_tasks, most needs)."""
        width = max((len(task.needs) for task in self.tasks), default=0)
        needs = np.full((len(self.tasks), width), len(self.tasks), dtype=np.int64)
        for index, task in enumerate(self.tasks):
            needs[index, : len(task.needs)] = task.needs
        return needs


@lru_cache(maxsize=64)
def chunked_program(chunks: int, *, has_shared_overlap: bool = False) -> OverlapProgram:
    """One MoE block whose experts work in chunks, pipelined with the exchanges; 1 chunk: one after the other.

    Parameters
    ----------
    chunks : int
        Parts that the routed rows are cut into (Tutel's and FasterMoE's degree).
    has_shared_overlap : bool
        Whether shared experts run during the exchanges, their first matrices during the first and the others during the
        second (Megatron-Core); else they are a part of the tail.

    Returns
    -------
    OverlapProgram
        All exchanges in are sent before any goes back, so that chunk i + 1 travels while chunk i is computed.

    References
    ----------
    Tutel, arXiv:2206.03382, section 4.2. FasterMoE, PPoPP 2022. PipeMoE, INFOCOM 2023.
    """
    tasks = [Task("head", COMPUTE)]
    tasks += [Task("exchange_in", COMMUNICATION, (0,), chunks) for _ in range(chunks)]
    if has_shared_overlap:
        tasks.append(Task("shared_first", COMPUTE, (0,)))
    experts = len(tasks)
    tasks += [Task("experts", COMPUTE, (1 + index,), chunks) for index in range(chunks)]
    tasks += [Task("exchange_out", COMMUNICATION, (experts + index,), chunks) for index in range(chunks)]
    last = (len(tasks) - 1,)
    if not has_shared_overlap:
        tasks.append(Task("shared_first", COMPUTE, last))
    tasks.append(Task("shared_second", COMPUTE))
    tasks.append(Task("tail", COMPUTE, last))
    return OverlapProgram(tuple(tasks))


@lru_cache(maxsize=64)
def interleaved_program(layers: int, *, has_shared_overlap: bool = False) -> OverlapProgram:
    """Two micro-batches through some MoE blocks, each computing while the other's rows travel.

    Parameters
    ----------
    layers : int
        Blocks that follow one another, so that the exchange back of one overlaps with the head of the next.
    has_shared_overlap : bool
        Whether shared experts run right after the head, before this micro-batch's rows are there.

    Returns
    -------
    OverlapProgram
        Owners 0 and 1; compute takes head 0, head 1, experts 0, experts 1, tail 0 and head 0 of the next block, ...

    References
    ----------
    DeepSeek-V3, arXiv:2412.19437, sections 3.2.1 and 3.4.
    """
    tasks: list[Task] = []
    last: dict[int, int] = {}
    in_flight: dict[int, int] = {}

    def add(segment: Segment, stream: int, owner: int, layer: int, *needs: int) -> int:
        tasks.append(Task(segment, stream, needs, owner=owner, layer=layer))
        return len(tasks) - 1

    def finish(owner: int, layer: int) -> None:
        for segment in ("shared_first", "shared_second") if not has_shared_overlap else ():
            add(segment, COMPUTE, owner, layer, in_flight[owner])
        last[owner] = add("tail", COMPUTE, owner, layer, in_flight[owner])

    for layer in range(layers):
        for owner in (0, 1):
            if layer:
                finish(owner, layer - 1)
            head = add("head", COMPUTE, owner, layer, *([last[owner]] if owner in last else []))
            in_flight[owner] = add("exchange_in", COMMUNICATION, owner, layer, head)
            if has_shared_overlap:
                add("shared_first", COMPUTE, owner, layer)
                add("shared_second", COMPUTE, owner, layer)
        for owner in (0, 1):
            experts = add("experts", COMPUTE, owner, layer, in_flight[owner])
            in_flight[owner] = add("exchange_out", COMMUNICATION, owner, layer, experts)
    for owner in (0, 1):
        finish(owner, layers - 1)
    return OverlapProgram(tuple(tasks))


class NamedOperation(Protocol):
    """An operation of a table, or of a rank's stream."""

    @property
    def name(self) -> str:
        """Operator, dotted."""
        ...

    @property
    def phase(self) -> Phase:
        """Pass that it belongs to."""
        ...

    @property
    def stream(self) -> str:
        """What executes it."""
        ...


def segment_shares(operations: Sequence[NamedOperation], *, is_backward: bool) -> list[dict[Segment, float]]:
    """How a MoE layer's operations spread over the segments of a phase.

    Parameters
    ----------
    operations : sequence of NamedOperation
        Tables of a layer, dense part and MoE part; those of other phases count nowhere.
    is_backward : bool
        Which phase: the backward pass runs the segments the other way round.

    Returns
    -------
    list of dict
        Share of each operation by segment, in the order of the operations; they sum to 1, or it is empty. Rows are put
        in order half before and half after the exchanges.
    """
    exchanges = 0
    shares: list[dict[Segment, float]] = []
    for operation in operations:
        share: dict[Segment, float] = {}
        if (operation.phase != "forward") == is_backward:
            if operation.stream == "all_to_all":
                share = {"exchange_out" if exchanges % 2 else "exchange_in": 1.0}
                exchanges += 1
            else:
                share = _shares_of(operation.name, is_backward=is_backward)
        shares.append(share)
    return shares


def _shares_of(name: str, *, is_backward: bool) -> dict[Segment, float]:
    first, second = name.partition(".")[::2]
    match first:
        case "expert" | "experts":
            return {"experts": 1.0}
        case "shared_expert":
            is_late = second.startswith("down") is not is_backward
            return {"shared_second" if is_late else "shared_first": 1.0}
        case "dispatch" if second == "permute":
            return {"head": 0.5, "tail": 0.5}
        case "combine" | "moe":
            return {"head" if is_backward else "tail": 1.0}
        case _:
            return {"tail" if is_backward else "head": 1.0}


def bucket_count(num_bytes: FloatArray, bucket_bytes: float) -> FloatArray:
    """Buckets that gradients fill: ceil(bytes / bucket), at least one; shape of ``num_bytes``."""
    return np.maximum(np.ceil(num_bytes / bucket_bytes), 1.0)
