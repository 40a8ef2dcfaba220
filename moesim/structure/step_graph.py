"""The operation table: what a step executes, with shapes over cases and no seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moesim.structure.columns import FloatArray
from moesim.structure.placement import ProcessGroup

Phase = Literal["forward", "activation_gradient", "weight_gradient"]
Stream = Literal[
    "compute",
    "tensor_parallel",
    "expert_tensor_parallel",
    "context_parallel",
    "all_to_all",
    "data_parallel",
    "pipeline_p2p",
]
Extent = FloatArray | float
CollectiveKind = Literal["all_to_all", "all_reduce", "all_gather", "reduce_scatter", "broadcast", "point_to_point"]

CATEGORIES: tuple[str, ...] = (
    "attention",
    "dense_ffn",
    "router",
    "dispatch_combine",
    "expert_gemm",
    "embedding_head_loss",
    "memory_bound",
    "all_to_all",
    "tensor_parallel",
    "context_parallel",
    "data_parallel",
    "pipeline_p2p",
    "recompute",
    "optimizer",
    "host",
    "imbalance",
    "pipeline_bubble",
)


@dataclass(frozen=True)
class Gemm:
    """``groups`` products (rows x inner)(inner x columns), each its own operands; all arrays (n_cases,).

    A GEMM Y[m, n] = X[m, k] W[n, k]^T has rows m, columns n, inner k. ``output_bytes`` per element written,
    ``accumulates`` when the output is read and added to (weight gradients). ``is_ragged`` when the groups are experts
    of one grouped kernel, each with rows of its own number; else they are equal products of one batched kernel.
    ``row_dispersion`` is the variance of those numbers over their mean: 0 where all are equal, 1 where a random router
    spreads its tokens. ``sums_tokens`` when tokens are the inner length (weight gradients), not the rows. ``scaling``
    is what shares a scale of operands of 8 bits and fewer.
    """

    rows: FloatArray
    columns: FloatArray
    inner: FloatArray
    groups: FloatArray
    precision: str
    input_bytes: float
    output_bytes: float
    accumulates: bool = False
    is_ragged: bool = False
    row_dispersion: FloatArray | float = 0.0
    sums_tokens: bool = False
    scaling: str = "tensor"


def linear_extents(rows: Extent, columns: Extent, inner: Extent) -> dict[Phase, tuple[Extent, Extent, Extent]]:
    """Rows, columns and inner length of the three GEMMs of a linear layer Y[m, n] = X[m, k] W[n, k]^T.

    Parameters
    ----------
    rows, columns, inner : ndarray or float
        Extents m, n and k.

    Returns
    -------
    dict
        By phase: forward (m, n, k), activation gradient dX[m, k] = dY W (m, k, n), weight gradient dW[n, k] = dY^T X
        (n, k, m).
    """
    return {
        "forward": (rows, columns, inner),
        "activation_gradient": (rows, inner, columns),
        "weight_gradient": (columns, inner, rows),
    }


@dataclass(frozen=True)
class PrefillShape:
    """What a flash kernel is called with; all arrays (n_cases,) but ``head_size``.

    ``sequences`` of ``length`` queries and as many keys, a fraction of one where its queries are split over a context
    group (which balances the causal mask); where queries and keys differ, the square of as many pairs. ``head_size`` is
    the mean of query-key and value heads.
    """

    sequences: FloatArray
    length: FloatArray
    kv_heads: FloatArray
    head_size: float


@dataclass(frozen=True)
class AttentionCore:
    """Scores, softmax and weighted sum: ``pairs`` of query and key per head and device, arrays (n_cases,).

    ``matmul_width`` is the sum of the inner widths of its products (forward: key + value head size); ``heads`` per
    device. ``visible_fraction`` of the pairs is needed (one half when causal). ``io_elements`` are read or written
    once. ``prefill`` None: decoding, or scores that are stored.
    """

    pairs: FloatArray
    heads: FloatArray
    matmul_width: float
    visible_fraction: float
    io_elements: FloatArray
    precision: str
    element_bytes: float
    prefill: PrefillShape | None = None
    is_backward: bool = False


@dataclass(frozen=True)
class MemoryTraffic:
    """An element-wise or data-moving kernel: bytes read and written, array (n_cases,).

    ``compute_s`` is what the compute units take where they, too, are busy: for converting between widths.
    ``serial_s`` is what steps take that wait for each other and so keep neither memory nor compute units busy.
    """

    num_bytes: FloatArray
    compute_s: FloatArray | float = 0.0
    serial_s: FloatArray | float = 0.0


@dataclass(frozen=True)
class RoutedCopies:
    """Copies of a token where an all-to-all sends one per node: ``choices`` experts on up to ``max_nodes`` nodes."""

    choices: float
    max_nodes: float


@dataclass(frozen=True)
class Collective:
    """A collective of one process group.

    ``num_bytes`` (n_cases,): all_to_all, all_reduce: the buffer of one rank; all_gather: the gathered whole;
    reduce_scatter: the whole before; broadcast,
    point_to_point: the message. ``copies`` None: every choice is sent on its own.
    """

    kind: CollectiveKind
    num_bytes: FloatArray
    group: ProcessGroup
    copies: RoutedCopies | None = None


Work = Gemm | AttentionCore | MemoryTraffic | Collective


@dataclass(frozen=True)
class Operation:
    """One row of the operation table.

    Attributes
    ----------
    name : str
        Operator, dotted: ``attention.qkv``.
    category : str
        One of ``CATEGORIES``: where the answer's breakdown counts it.
    phase : str
        Forward, activation gradient or weight gradient.
    stream : str
        What executes it.
    work : Gemm, AttentionCore, MemoryTraffic or Collective
        Shapes over cases.
    kernels : int
        Launches by the host.
    load_factor : ndarray of shape (n_cases,) or None
        Most loaded rank over mean, for operations that grow with routed load; None for the others.
    is_recomputed_selectively : bool
        Whether selective recompute runs it again in the backward pass.
    slowdown : float
        Time in the stack's kernels over that of the kernels a device's figures describe.
    """

    name: str
    category: str
    phase: Phase
    stream: Stream
    work: Work
    kernels: int = 1
    load_factor: FloatArray | None = None
    is_recomputed_selectively: bool = False
    slowdown: float = 1.0


HostPart = Literal["attention", "dense_ffn", "router", "experts", "rest"]


@dataclass(frozen=True)
class HostWork:
    """What the host issues for one pass of a table.

    ``operations`` of the framework by part of the layer; ``expert_launches`` (n_cases,) kernels launched one by one
    for the local experts where the stack loops over them; ``expert_messages`` between this rank and single experts
    where the stack exchanges rows that way.
    """

    operations: Mapping[HostPart, float] = field(default_factory=dict)
    expert_launches: FloatArray | float = 0.0
    expert_messages: float = 0.0


@dataclass(frozen=True)
class OperationTable:
    """Operations of one layer kind or of the model's ends, over the distinct cases of the columns they read.

    ``forward_host`` and ``backward_host`` are what the host issues for them.
    """

    name: str
    operations: Sequence[Operation]
    forward_host: HostWork = HostWork()
    backward_host: HostWork = HostWork()
