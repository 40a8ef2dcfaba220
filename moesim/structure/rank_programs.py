"""What the ranks of a pipeline stage run: operations in the order of execution, and who waits for whom.

No seconds. A step is the same program on every rank of a stage; what differs between them is how long an operation
takes, so ranks are numbered within their stage and process groups are strides over these numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.structure.columns import Columns, FloatArray, IntArray
from moesim.structure.layers import LayerSequence, StagePlan
from moesim.structure.placement import MESH_COLUMN, dense_mesh, expert_mesh
from moesim.structure.step_graph import AttentionCore, Collective, CollectiveKind, Gemm, MemoryTraffic, Operation, Phase

COMPUTE_PART = 2
GATHERS: tuple[CollectiveKind, ...] = ("all_gather", "broadcast")
MODULES_FIRST: tuple[str, ...] = ("norm_residual",)
MODULE_AFTER: Mapping[str, str] = {"combine": "experts"}
"""Modules that run after another one although a table lists them before it."""
MODULE_OF: Mapping[str, str] = {"expert": "experts"}
"""Prefixes of names that belong to a module of another name."""


@dataclass(frozen=True)
class StreamOperation:
    """One operation of a block on a rank's stream.

    Attributes
    ----------
    name, category, phase, stream : str
        As in the operation table.
    group : str
        Mesh dimension whose ranks wait for one another; empty where nobody waits.
    table, index : int
        Which table of its block, and which operation there.
    grows_with_load : bool
        Whether its seconds follow the tokens routed to a rank.
    is_recomputed_selectively : bool
        Whether selective recompute runs it again.
    num_bytes : float
        Bytes of a collective's buffer; 0 for the others.
    """

    name: str
    category: str
    phase: Phase
    stream: str
    group: str
    table: int
    index: int
    grows_with_load: bool
    is_recomputed_selectively: bool
    num_bytes: float


def stream_operations(tables: Sequence[Sequence[Operation]]) -> tuple[StreamOperation, ...]:
    """Operations of a block's tables as a rank runs them, forward ones first; one case, arrays of shape (1,).

    Backward, modules run in reverse. A module gathers before it computes and reduces after it, in either direction;
    keys and values gather before the attention core; of the all-to-alls around the experts the first brings rows and
    the second takes them back.
    """
    rows = [
        (_row(operation, table, index), operation)
        for table, operations in enumerate(tables)
        for index, operation in enumerate(operations)
    ]
    modules = _module_order([row.name for row, _ in rows])
    ordered: list[StreamOperation] = []
    for direction in (1, -1):
        part = [(row, operation) for row, operation in rows if (row.phase == "forward") == (direction == 1)]
        first_of: dict[str, int] = {}
        for place, (row, _) in enumerate(part):
            first_of.setdefault(_kernel(row.name), place)
        seen: dict[str, int] = {}
        keyed = []
        for place, (row, operation) in enumerate(part):
            step, at = _part_of_module(row, operation, seen), float(place)
            if step == COMPUTE_PART:
                at = direction * first_of[_kernel(row.name)]
            core = first_of.get(row.name.replace(".context_parallel", ".core"))
            if row.stream == "context_parallel" and core is not None:
                step, at = COMPUTE_PART, direction * core + (-0.5 if step < COMPUTE_PART else 0.5)
            keyed.append((direction * modules[_module(row.name)], step, at, place))
        ordered += [part[place][0] for *_, place in sorted(keyed)]
    return tuple(ordered)


def _kernel(name: str) -> str:
    """Name of the operator without the casts around it."""
    return name.removesuffix(".quantise")


def _row(operation: Operation, table: int, index: int) -> StreamOperation:
    work = operation.work
    group, num_bytes = "", 0.0
    if isinstance(work, Collective):
        group = work.group.dimension if float(np.ravel(work.group.size)[0]) > 1 else ""
        num_bytes = float(np.ravel(work.num_bytes)[0])
    return StreamOperation(
        name=operation.name,
        category=operation.category,
        phase=operation.phase,
        stream=operation.stream,
        group=group,
        table=table,
        index=index,
        grows_with_load=operation.load_factor is not None,
        is_recomputed_selectively=operation.is_recomputed_selectively,
        num_bytes=num_bytes,
    )


def _module(name: str) -> str:
    prefix = name.split(".")[0]
    return MODULE_OF.get(prefix, prefix)


def _module_order(names: Sequence[str]) -> dict[str, int]:
    """Modules in the order of their first operation, but for those that run elsewhere."""
    order = list(dict.fromkeys(_module(name) for name in names))
    for module in reversed(MODULES_FIRST):
        if module in order:
            order.insert(0, order.pop(order.index(module)))
    for module, before in MODULE_AFTER.items():
        if module in order and before in order:
            order.remove(module)
            order.insert(order.index(before) + 1, module)
    return {module: place for place, module in enumerate(order)}


def _part_of_module(row: StreamOperation, operation: Operation, seen: dict[str, int]) -> int:
    """Where in its module an operation runs: 0 and 1 before the compute, 2 compute, 3 and 4 after it."""
    work = operation.work
    match work:
        case Gemm() | AttentionCore() | MemoryTraffic():
            return COMPUTE_PART
        case Collective():
            if work.kind == "all_to_all":
                seen[row.name] = seen.get(row.name, 0) + 1
                return 0 if seen[row.name] == 1 else 4
            return 1 if work.kind in GATHERS and row.name != "moe.tensor_parallel" else 3


@dataclass(frozen=True)
class RankGroups:
    """Groups of a stage's ranks ``r, r + stride, ..., r + (size - 1) * stride``, numbered within the stage."""

    size: int
    stride: int

    def members(self, ranks: int) -> IntArray:
        """Ranks of each group, shape (ranks / size, size)."""
        cells = np.arange(ranks).reshape(-1, self.size, self.stride)
        return cells.transpose(0, 2, 1).reshape(-1, self.size)

    def maximum(self, values: FloatArray) -> FloatArray:
        """Largest value of each rank's group, for values (..., ranks) of all ranks; shape as given."""
        shape = values.shape
        if self.size == shape[-1]:
            return np.broadcast_to(values.max(axis=-1, keepdims=True), shape)
        cells = values.reshape(*shape[:-1], -1, self.size, self.stride)
        return np.broadcast_to(cells.max(axis=-2, keepdims=True), cells.shape).reshape(shape)

    def contains(self, other: RankGroups) -> bool:
        """Whether every group of ``other`` lies within one group of these."""
        is_aligned = other.stride % self.stride == 0
        return other.size == 1 or (is_aligned and (self.size * self.stride) % (other.size * other.stride) == 0)


@dataclass(frozen=True)
class StageRanks:
    """Ranks of a pipeline's stages.

    Attributes
    ----------
    stages, count : int
        Stages, and ranks of each.
    groups : mapping of str to RankGroups
        By mesh dimension.
    pipeline_stride : int
        Ranks of a stage before the rank numbers of the next stage come.
    """

    stages: int
    count: int
    groups: Mapping[str, RankGroups]
    pipeline_stride: int

    def global_ranks(self, stage: int) -> IntArray:
        """Global rank of each rank of a stage, shape (count,)."""
        local = np.arange(self.count)
        block, inside = np.divmod(local, self.pipeline_stride)
        return block * (self.pipeline_stride * self.stages) + stage * self.pipeline_stride + inside

    def place(self, ranks: npt.ArrayLike) -> tuple[IntArray, IntArray]:
        """Stage of global ranks, and their number within it."""
        block, rest = np.divmod(np.asarray(ranks, dtype=np.int64), self.pipeline_stride * self.stages)
        stage, inside = np.divmod(rest, self.pipeline_stride)
        return stage, block * self.pipeline_stride + inside


def stage_ranks(columns: Columns, rank_order: Sequence[str]) -> StageRanks:
    """Ranks and groups of the stages of one scenario, columns of one row.

    Both meshes are taken without the pipeline. Where it stands between other dimensions, the ranks of a stage are those
    of the dense mesh.
    """
    groups = {}
    for mesh in (dense_mesh(rank_order), expert_mesh(rank_order)):
        stride = 1
        for dimension in mesh:
            if dimension == "pipeline":
                continue
            size = _degree(columns, dimension)
            groups[dimension] = RankGroups(size, stride)
            stride *= size
    faster = dense_mesh(rank_order)[: dense_mesh(rank_order).index("pipeline")]
    pipeline_stride = int(np.prod([_degree(columns, dimension) for dimension in faster]))
    count = int(np.prod([_degree(columns, name) for name in dense_mesh(rank_order) if name != "pipeline"]))
    return StageRanks(_degree(columns, "pipeline"), count, groups, pipeline_stride)


def _degree(columns: Columns, dimension: str) -> int:
    return round(float(columns[MESH_COLUMN[dimension]][0]))


@dataclass(frozen=True)
class LayerOfChunk:
    """A layer: its number in the model (token prediction after the last) and its kind's position."""

    number: int
    kind: int


@dataclass(frozen=True)
class ChunkLayers:
    """What a chunk of the model holds, in order: layers, and the ends of the model."""

    layers: tuple[LayerOfChunk, ...]
    is_first: bool
    is_last: bool


def chunk_layers(sequence: LayerSequence, plan: StagePlan) -> tuple[ChunkLayers, ...]:
    """Layers of every chunk, in model order."""
    chunks = plan.counts.shape[1]
    per_chunk = np.rint(plan.counts.sum(axis=0)).astype(int)
    bounds = np.concatenate([[0], np.cumsum(per_chunk)])
    return tuple(
        ChunkLayers(
            tuple(LayerOfChunk(number, sequence.order[number]) for number in range(bounds[chunk], bounds[chunk + 1])),
            chunk == 0,
            chunk == chunks - 1,
        )
        for chunk in range(chunks)
    )
