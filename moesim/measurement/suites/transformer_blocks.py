"""A whole block on one device, forward and backward: norm, attention, residual, norm, layer of experts, residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, PassName, Target, Work
from moesim.measurement.routed_loads import RoutedLoads, layer_loads
from moesim.measurement.suites.attentions import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    AttentionShape,
    attention_bytes,
    attention_function,
    causal_product_flops,
)
from moesim.measurement.suites.gemms import MASTER_BYTES
from moesim.measurement.suites.memory_bound import rms_norm
from moesim.measurement.suites.moe_layers import (
    INPUT_SETS_HELD,
    MoeRouting,
    MoeShape,
    MoeWeights,
    differentiable_work,
    layer_bytes,
    layer_flops,
    layer_memory_bytes,
    make_layer,
    run_layer,
)
from moesim.measurement.suites.routed_rows import differentiable

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench

PRESETS = ("W0", "W1", "W3")


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Attention and a layer of experts of the same tokens."""

    attention: AttentionShape
    moe: MoeShape


SHAPES = (
    BlockShape(AttentionShape(1, 4096, 32, 8, 128), MoeShape(4096, 4096, 14336, 8, 2)),
    BlockShape(AttentionShape(1, 4096, 32, 4, 128), MoeShape(4096, 2048, 768, 128, 8)),
    BlockShape(AttentionShape(8, 1024, 16, 16, 64), MoeShape(8192, 1024, 4096, 16, 1)),
    BlockShape(AttentionShape(8, 2048, 16, 16, 128), MoeShape(16384, 2048, 1408, 64, 6)),
)
CPU_SHAPES = (BlockShape(AttentionShape(2, 32, 4, 2, 16), MoeShape(64, 64, 96, 8, 2)),)


def cases(target: Target) -> list[Case]:
    """Return the cases of blocks."""
    shapes = CPU_SHAPES if target.device == "cpu" else SHAPES
    kinds: tuple[PassName, ...] = ("forward", "backward")
    return [
        _case(shape, preset, dtype, kind, target.seed)
        for preset in PRESETS
        for shape in shapes
        for dtype in target.dtypes
        for kind in kinds
    ]


def _case(shape: BlockShape, preset: str, dtype: str, kind: PassName, seed: int) -> Case:
    moe, attention = shape.moe, shape.attention
    routed = layer_loads(preset, moe.tokens, moe.num_experts, moe.experts_per_token, seed=seed)
    weights = float(moe.hidden * _projected(attention))
    products = FORWARD_PRODUCTS if kind == "forward" else BACKWARD_PRODUCTS
    factor = 1 if kind == "forward" else 2
    flops = layer_flops(moe, routed, kind) + products * causal_product_flops(attention)
    size, tokens = ELEMENT_BYTES[dtype], attention.batch * attention.length
    width = tokens * moe.hidden
    projections = tokens * _projected(attention) + 2 * width
    norms_and_residuals = (4 + 6) * width if kind == "forward" else (6 + 4) * width
    moved = layer_bytes(moe, routed, dtype, kind) + factor * attention_bytes(attention, dtype)
    moved += size * (factor * projections + norms_and_residuals)
    moved += weights * (size if kind == "forward" else size + 2 * MASTER_BYTES)
    held = layer_memory_bytes(moe, routed, dtype) + weights * (2 * size + MASTER_BYTES)
    held += INPUT_SETS_HELD * (3 * attention_bytes(attention, dtype) + 12 * size * width)
    heads = {
        "batch": attention.batch,
        "length": attention.length,
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_size": attention.head_size,
    }
    return Case(
        suite="transformer_block",
        operation="transformer_block",
        pass_name=kind,
        dtype=dtype,
        shape={"preset": preset, "step": routed.step, **heads, **moe.names()},
        flops=flops + factor * 2.0 * tokens * weights,
        traffic_bytes=moved,
        working_set_bytes=held,
        prepare=partial(prepare_block, shape=shape, routed=routed, dtype=dtype, kind=kind, seed=seed),
        loads=routed.loads,
    )


def _projected(attention: AttentionShape) -> int:
    """Columns of queries, keys and values, and of the output's input."""
    return 2 * (attention.heads + attention.kv_heads) * attention.head_size


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """Weights of a block beside those of its experts, and the fp32 sums of their gradients."""

    first_norm: Tensor
    second_norm: Tensor
    queries_keys_values: Tensor
    output: Tensor
    queries_keys_values_sum: Tensor
    output_sum: Tensor


def make_block(bench: Workbench, shape: BlockShape, dtype: str) -> BlockWeights:
    """Fill the weights of norms and projections.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : BlockShape
        Sizes.
    dtype : str
        Of weights and activations.
    """
    attention, hidden = shape.attention, shape.moe.hidden
    joined = (attention.heads + 2 * attention.kv_heads) * attention.head_size
    inner = attention.heads * attention.head_size
    return BlockWeights(
        first_norm=bench.normal(hidden, dtype=dtype),
        second_norm=bench.normal(hidden, dtype=dtype),
        queries_keys_values=bench.weight(joined, hidden, dtype=dtype),
        output=bench.weight(hidden, inner, dtype=dtype),
        queries_keys_values_sum=bench.normal(joined, hidden, dtype="fp32"),
        output_sum=bench.normal(hidden, inner, dtype="fp32"),
    )


def run_block(
    tokens: Tensor, shape: AttentionShape, weights: BlockWeights, experts: MoeWeights, routing: MoeRouting
) -> Tensor:
    """Run the forward pass: no rotary positions, no dropout, the norms' weights are not trained.

    Parameters
    ----------
    tokens : tensor of shape (n_tokens, hidden)
        Inputs, sequence after sequence.
    shape : AttentionShape
        Sizes of the attention.
    weights : BlockWeights
        Of norms and projections.
    experts : MoeWeights
        Of the layer of experts.
    routing : MoeRouting
        Who goes where.

    Returns
    -------
    tensor of shape (n_tokens, hidden)
        Outputs.
    """
    return run_block_around(lambda rows: run_layer(rows, experts, routing), tokens, shape, weights)


def run_block_around(
    layer: Callable[[Tensor], Tensor], tokens: Tensor, shape: AttentionShape, weights: BlockWeights
) -> Tensor:
    """Run norm, attention, residual, norm, a layer of experts, residual.

    Parameters
    ----------
    layer : callable
        The layer of experts, without its residual.
    tokens : tensor of shape (n_tokens, hidden)
        Inputs, sequence after sequence.
    shape : AttentionShape
        Sizes of the attention.
    weights : BlockWeights
        Of norms and projections.

    Returns
    -------
    tensor of shape (n_tokens, hidden)
        Outputs.
    """
    steps = differentiable()
    attend = attention_function(shares_keys=shape.kv_heads != shape.heads, method="default")
    normed = rms_norm(tokens, weights.first_norm)
    joined = steps.linear(normed, weights.queries_keys_values, weights.queries_keys_values_sum)
    heads = joined.view(shape.batch, shape.length, -1, shape.head_size).transpose(1, 2)
    queries, keys, values = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    mixed = attend(queries, keys, values).transpose(1, 2).reshape(tokens.shape[0], -1)
    tokens = tokens + steps.linear(mixed, weights.output, weights.output_sum)
    return tokens + layer(rms_norm(tokens, weights.second_norm))


def prepare_block(
    bench: Workbench, *, shape: BlockShape, routed: RoutedLoads, dtype: str, kind: PassName, seed: int
) -> Work:
    """Fill a block; for the backward pass, run the forward one and keep its activations.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : BlockShape
        Sizes.
    routed : RoutedLoads
        Loads of the experts.
    dtype : str
        Of weights and activations.
    kind : str
        ``forward`` (keeping what a backward pass needs) or ``backward``.
    seed : int
        Of the order of the tokens.
    """
    experts, routing = make_layer(bench, shape.moe, routed, dtype, seed)
    weights = make_block(bench, shape, dtype)
    tokens = bench.normal(shape.moe.tokens, shape.moe.hidden, dtype=dtype).requires_grad_()
    name = f"{routing.products.name}, scaled_dot_product_attention"

    def run() -> Tensor:
        return run_block(tokens, shape.attention, weights, experts, routing)

    return differentiable_work(bench, kind, run, tokens, name)
