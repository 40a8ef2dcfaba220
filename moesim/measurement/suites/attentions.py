"""Causal self-attention between its projections: every head with keys of its own, or keys shared by groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, PassName, Shape, Target, Work

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench

BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
FORWARD_PRODUCTS = 2.0
BACKWARD_PRODUCTS = 5.0
"""S again, dP, dV, dQ, dK: the scores are not kept."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Queries, keys and values of a batch of equally long sequences.

    ``value_size`` elements of a value and of the result, where they differ from those of a key (latent attention).
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_size: int
    value_size: int = 0

    @property
    def value_width(self) -> int:
        """Elements of one value."""
        return self.value_size or self.head_size

    def names(self) -> dict[str, int]:
        """Sizes as a case names them."""
        return {name: size for name, size in asdict(self).items() if size or name != "value_size"}


SHAPES = (
    AttentionShape(2, 4096, 32, 8, 128),
    AttentionShape(2, 4096, 32, 32, 128),
    AttentionShape(8, 1024, 16, 16, 64),
    AttentionShape(1, 8192, 32, 8, 128),
    AttentionShape(4, 2048, 64, 8, 128),
    AttentionShape(1, 32768, 8, 1, 128),
    AttentionShape(32, 512, 16, 16, 64),
    AttentionShape(2, 2048, 32, 4, 128),
    AttentionShape(1, 1024, 32, 8, 128),
    AttentionShape(4, 4096, 16, 16, 64),
    AttentionShape(16, 2048, 8, 8, 128),
    AttentionShape(1, 16384, 16, 2, 128),
    AttentionShape(2, 4096, 16, 16, 192),
    AttentionShape(1, 4000, 32, 8, 128),
    AttentionShape(2, 4096, 64, 8, 64),
    AttentionShape(1, 16384, 64, 8, 64),
    AttentionShape(2, 4096, 16, 16, 192, 128),
    AttentionShape(1, 4096, 128, 128, 192, 128),
    AttentionShape(4, 2048, 16, 16, 192),
    AttentionShape(1, 8192, 32, 32, 192, 128),
    AttentionShape(8, 1024, 32, 32, 192, 128),
    AttentionShape(1, 8192, 16, 16, 192),
    AttentionShape(8, 1024, 16, 16, 192),
    AttentionShape(32, 512, 32, 8, 128),
    AttentionShape(8, 1024, 32, 32, 128),
    AttentionShape(1, 512, 32, 8, 128),
    AttentionShape(4, 1024, 64, 8, 128),
    AttentionShape(16, 512, 16, 16, 192, 128),
    AttentionShape(64, 256, 16, 16, 64),
    AttentionShape(16, 1024, 64, 8, 64),
    AttentionShape(4, 2048, 32, 32, 64),
    AttentionShape(1, 8192, 64, 8, 64),
    AttentionShape(2, 4096, 16, 8, 256),
    AttentionShape(8, 1024, 16, 8, 256),
    AttentionShape(1, 8192, 16, 4, 256),
    AttentionShape(16, 512, 16, 8, 256),
    AttentionShape(1, 2048, 32, 8, 128),
    AttentionShape(1, 2048, 16, 16, 192, 128),
)
CPU_SHAPES = (AttentionShape(1, 128, 4, 4, 32), AttentionShape(2, 128, 8, 2, 32))


def cases(target: Target) -> list[Case]:
    """Return the cases of attention; on a GPU with each library that torch may choose."""
    if target.device == "cpu":
        wanted = [(shape, "default") for shape in CPU_SHAPES]
    else:
        first, rest = SHAPES[:2], SHAPES[2:]
        wanted = [(shape, method) for shape in first for method in ("flash", "cudnn")]
        wanted += [(shape, method) for shape in rest for method in ("flash", "cudnn")]
        wanted += [(shape, method) for shape in first for method in ("default", "efficient")]
    kinds: tuple[PassName, ...] = ("forward", "backward")
    return [_case(shape, method, dtype, kind) for shape, method in wanted for dtype in target.dtypes for kind in kinds]


def _case(shape: AttentionShape, method: str, dtype: str, kind: PassName) -> Case:
    io_bytes = attention_bytes(shape, dtype)
    named: Shape = {**shape.names(), "method": method}
    return Case(
        suite="attention",
        operation="causal_attention",
        pass_name=kind,
        dtype=dtype,
        shape=named,
        flops=causal_flops(shape, kind),
        traffic_bytes=io_bytes if kind == "forward" else 2 * io_bytes,
        working_set_bytes=io_bytes if kind == "forward" else 2 * io_bytes,
        prepare=partial(prepare_attention, shape=shape, method=method, dtype=dtype, kind=kind),
    )


def causal_product_flops(shape: AttentionShape) -> float:
    """Arithmetic of one product of all pairs that the mask keeps: half of 2 b h s^2 d.

    Examples
    --------
    >>> causal_product_flops(AttentionShape(1, 4, 2, 2, 8))
    256.0
    """
    return float(shape.batch * shape.heads * shape.length**2 * shape.head_size)


def causal_flops(shape: AttentionShape, kind: PassName) -> float:
    """Arithmetic of a pass: products with keys (scores; backward scores again, dQ and dK) and with values.

    Examples
    --------
    >>> causal_flops(AttentionShape(1, 4, 2, 2, 8, 4), "forward")
    384.0
    >>> causal_flops(AttentionShape(1, 4, 2, 2, 8), "backward")
    1280.0
    """
    keys, products = (1.0, FORWARD_PRODUCTS) if kind == "forward" else (3.0, BACKWARD_PRODUCTS)
    share = shape.value_width / shape.head_size
    return causal_product_flops(shape) * (keys + (products - keys) * share)


def attention_bytes(shape: AttentionShape, dtype: str) -> float:
    """Queries, keys, values and output once."""
    per_token = (shape.heads + shape.kv_heads) * (shape.head_size + shape.value_width)
    return float(ELEMENT_BYTES[dtype] * shape.batch * shape.length * per_token)


def prepare_attention(bench: Workbench, *, shape: AttentionShape, method: str, dtype: str, kind: PassName) -> Work:
    """Fill queries, keys and values; for the backward pass, run the forward one and keep what it keeps.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : AttentionShape
        Sizes.
    method : str
        A key of ``BACKENDS``, or ``default`` for what torch chooses.
    dtype : str
        Of the inputs.
    kind : str
        ``forward`` or ``backward``.
    """
    import torch

    attend = attention_function(shares_keys=shape.kv_heads != shape.heads, method=method)
    queries = bench.normal(shape.batch, shape.heads, shape.length, shape.head_size, dtype=dtype)
    keys = bench.normal(shape.batch, shape.kv_heads, shape.length, shape.head_size, dtype=dtype)
    values = bench.normal(shape.batch, shape.kv_heads, shape.length, shape.value_width, dtype=dtype)
    name = f"scaled_dot_product_attention, {method}"
    if kind == "forward":
        return Work(lambda: attend(queries, keys, values), name)
    leaves = [tensor.requires_grad_() for tensor in (queries, keys, values)]
    out = attend(*leaves)
    grad = bench.normal(*out.shape, dtype=dtype)
    return Work(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), name)


def attention_function(*, shares_keys: bool, method: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return causal attention by one library of torch's.

    Parameters
    ----------
    shares_keys : bool
        Whether several heads read the same keys; before torch 2.5 these are then repeated within the call.
    method : str
        A key of ``BACKENDS``, or ``default``.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    has_groups = "enable_gqa" in (scaled_dot_product_attention.__doc__ or "")

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if not shares_keys:
            return scaled_dot_product_attention(queries, keys, values, is_causal=True)
        if has_groups:
            return scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        repeats = queries.shape[1] // keys.shape[1]
        keys, values = (torch.repeat_interleave(tensor, repeats, dim=1) for tensor in (keys, values))
        return scaled_dot_product_attention(queries, keys, values, is_causal=True)

    if method == "default":
        return attend
    backend = getattr(SDPBackend, BACKENDS[method])

    def attend_by_backend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return attend(queries, keys, values)

    return attend_by_backend
