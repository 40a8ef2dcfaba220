"""Attention of one new token per sequence over the keys and values that are cached."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, Shape, Target, Work
from moesim.measurement.suites.attentions import BACKENDS, AttentionShape, attention_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench

PACKED = "packed"
"""Heads that share keys stand as queries of one head, so that a kernel reads the keys once for all of them."""
PACKED_BACKEND = "flash"
METHODS = (PACKED, "flash", "cudnn")
# Batch, cached tokens, heads: Mixtral's, a deeper one's, one head of keys for all, and every head its own.
SHAPES = (
    AttentionShape(64, 4096, 32, 8, 128),
    AttentionShape(8, 4096, 32, 8, 128),
    AttentionShape(64, 1024, 64, 8, 128),
    AttentionShape(128, 8192, 8, 1, 128),
    AttentionShape(16, 32768, 32, 8, 128),
    AttentionShape(256, 2048, 32, 4, 128),
    AttentionShape(1, 32768, 32, 8, 128),
    AttentionShape(32, 2048, 16, 16, 128),
    AttentionShape(64, 4096, 64, 8, 64),
    AttentionShape(1, 4096, 32, 8, 128),
    AttentionShape(256, 512, 32, 8, 128),
)
CPU_SHAPES = (AttentionShape(2, 64, 4, 2, 32),)


def cases(target: Target) -> list[Case]:
    """Return the cases of decoding, each shape with each library."""
    shapes, methods = (CPU_SHAPES, (PACKED,)) if target.device == "cpu" else (SHAPES, METHODS)
    return [_case(shape, method, dtype) for shape in shapes for method in methods for dtype in target.dtypes]


def _case(shape: AttentionShape, method: str, dtype: str) -> Case:
    queries = 2 * shape.heads * shape.head_size * shape.batch
    cached = attention_bytes(AttentionShape(shape.batch, shape.length, 0, shape.kv_heads, shape.head_size), dtype)
    moved = cached + float(queries * ELEMENT_BYTES[dtype])
    named: Shape = {**shape.names(), "method": method}
    flops = 4.0 * shape.batch * shape.heads * shape.length * shape.head_size
    prepare = partial(prepare_decode, shape=shape, method=method, dtype=dtype)
    return Case("decode", "decode_attention", "forward", dtype, named, flops, moved, moved, prepare)


def prepare_decode(bench: Workbench, *, shape: AttentionShape, method: str, dtype: str) -> Work:
    """Fill a cache and one query per head and sequence.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : AttentionShape
        Sizes; its length is that of the cache.
    method : str
        One of ``METHODS``.
    dtype : str
        Of the inputs.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    groups = shape.heads // shape.kv_heads
    size = (shape.batch, shape.kv_heads, groups, shape.head_size)
    queries = bench.normal(*size, dtype=dtype)
    keys = bench.normal(shape.batch, shape.kv_heads, shape.length, shape.head_size, dtype=dtype)
    values = bench.normal(shape.batch, shape.kv_heads, shape.length, shape.head_size, dtype=dtype)
    backend = getattr(SDPBackend, BACKENDS[PACKED_BACKEND if method == PACKED else method])
    backends = [backend] if bench.is_cuda else [SDPBackend.MATH]

    def packed() -> Tensor:
        with sdpa_kernel(backends):
            return scaled_dot_product_attention(queries, keys, values)

    one_each = queries.reshape(shape.batch, shape.heads, 1, shape.head_size)

    def single() -> Tensor:
        with sdpa_kernel(backends):
            if groups == 1:
                return scaled_dot_product_attention(one_each, keys, values)
            return scaled_dot_product_attention(one_each, keys, values, enable_gqa=True)

    return Work(packed if method == PACKED else single, f"scaled_dot_product_attention, {method}")
