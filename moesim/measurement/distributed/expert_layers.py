"""A layer of experts over the ranks of a group: router, dispatch, exchange, experts, exchange, combine, backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from moesim.measurement.cases import ELEMENT_BYTES, UnmeasurableError
from moesim.measurement.distributed.kept_rows import counted, kept_choices, kept_row_functions, sort_kept
from moesim.measurement.distributed.layer_shapes import Draw, ExpertLayerShape, rank_choices
from moesim.measurement.distributed.optional_back_ends import (
    TORCH,
    BackEnds,
    grouped_gemm_products,
    open_deep_buffer,
    through_deep_buffer,
)
from moesim.measurement.distributed.ranks import Ranks, check_experts
from moesim.measurement.distributed.row_exchanges import RowExchange, alone, exchange_functions, exchanged
from moesim.measurement.suites.dispatches import OneHotShape, one_hot_masks, to_slots, to_tokens
from moesim.measurement.suites.grouped_gemms import LOOP, GroupedProducts, Groups, grouped_products
from moesim.measurement.suites.memory_bound import gated_activation
from moesim.measurement.suites.moe_layers import MoeWeights
from moesim.measurement.suites.routed_rows import differentiable, sort_rows
from moesim.measurement.suites.routers import choose

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """What a rank knows of a layer before it sees tokens.

    Parameters
    ----------
    shape : ExpertLayerShape
        Sizes.
    ranks : Ranks
        The expert-parallel group.
    products : GroupedProducts
        How experts multiply.
    experts : tensor of shape (n_tokens, experts_per_token), optional
        Choices of the draw; None follows the router's own.
    exchange : RowExchange, optional
        Where nothing has to be told or waited for: a rank alone, whose rows are those of the draw.
    deep_buffer : deep_ep.Buffer, optional
        Where DeepEP exchanges.
    """

    shape: ExpertLayerShape
    ranks: Ranks
    products: GroupedProducts
    experts: Tensor | None = None
    exchange: RowExchange | None = None
    deep_buffer: Any = None

    @property
    def name(self) -> str:
        """The routines of the layer, for records."""
        exchange = "all_to_all_single" if self.ranks.expert_parallel > 1 else "no exchange"
        exchange = exchange if self.deep_buffer is None else "deep_ep"
        return f"{self.shape.dispatch}, {exchange}, {self.products.name}"


def make_layer(
    bench: Workbench,
    shape: ExpertLayerShape,
    ranks: Ranks,
    *,
    dtype: str,
    routed: Draw | None = None,
    layer: int = 0,
    seed: int = 0,
    back_ends: BackEnds = TORCH,
) -> ExpertLayer:
    """Prepare a layer of this rank.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : ExpertLayerShape
        Sizes.
    ranks : Ranks
        The expert-parallel group.
    dtype : str
        Of the experts' weights.
    routed : Draw, optional
        Rows of all ranks; None follows the router's own choice.
    layer, seed : int
        Of the order of the tokens.
    back_ends : BackEnds
        Libraries that replace torch's own.

    Raises
    ------
    ScenarioError
        If the experts do not divide over the ranks.
    ValueError
        If a draw gives this rank tokens that do not fill its routing groups.
    """
    check_experts(shape.num_experts, ranks.expert_parallel)
    products = _products(bench, shape, dtype, back_ends)
    deep = None
    if back_ends.exchange == "deepep" and ranks.expert_parallel > 1:
        deep = _deep_buffer(shape, ranks, dtype)
    if routed is None:
        return ExpertLayer(shape, ranks, products, deep_buffer=deep)
    num_tokens = routed.tokens_of(ranks.expert_rank, shape.experts_per_token)
    if shape.group_tokens is not None and num_tokens % shape.group_tokens:
        raise ValueError(f"{num_tokens} tokens of the draw do not fill groups of {shape.group_tokens}")
    choices = rank_choices(routed, shape, rank=ranks.expert_rank, layer=layer, seed=seed)
    made = ExpertLayer(shape, ranks, products, bench.integers(choices), deep_buffer=deep)
    if ranks.expert_parallel > 1 or shape.dispatch != "permute":
        return made
    assert made.experts is not None
    counts = _keys_and_counts(made.experts, made)[1]
    known = Groups.of(bench, tuple(counts.tolist()))
    return replace(made, exchange=alone(known.loads, known.ends))


def _products(bench: Workbench, shape: ExpertLayerShape, dtype: str, back_ends: BackEnds) -> GroupedProducts:
    """Choose how experts multiply."""
    if shape.dispatch == "one_hot_einsum":
        return BATCHED
    return grouped_gemm_products() if back_ends.experts == "grouped_gemm" else grouped_products(bench.device, dtype)


def _deep_buffer(shape: ExpertLayerShape, ranks: Ranks, dtype: str) -> Any:
    """Open DeepEP's buffer for a layer; it knows neither slots nor masks."""
    if shape.capacity_factor is not None:
        raise UnmeasurableError("DeepEP sends every choice: it has no capacity")
    return open_deep_buffer(ranks.expert_group, shape.hidden, ELEMENT_BYTES[dtype])


def make_weights(bench: Workbench, shape: ExpertLayerShape, ranks: Ranks, dtype: str) -> MoeWeights:
    """Fill router and local experts; ranks that share a weight hold the same values.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : ExpertLayerShape
        Sizes.
    ranks : Ranks
        The expert-parallel group.
    dtype : str
        Of the experts; the router is fp32.
    """
    local, up = shape.num_experts // ranks.expert_parallel, shape.up_columns
    weights = MoeWeights(
        router=bench.weight(shape.num_experts, shape.hidden, dtype="fp32"),
        up=bench.weight(local, up, shape.hidden, dtype=dtype),
        down=bench.weight(local, shape.hidden, shape.inner, dtype=dtype),
        router_sum=bench.normal(shape.num_experts, shape.hidden, dtype="fp32"),
        up_sum=bench.normal(local, up, shape.hidden, dtype="fp32"),
        down_sum=bench.normal(local, shape.hidden, shape.inner, dtype="fp32"),
    )
    ranks.copy_from_first([weights.router], among_replicas=False)
    ranks.copy_from_first([weights.up, weights.down], among_replicas=True)
    return weights


def run_layer(tokens: Tensor, weights: MoeWeights, layer: ExpertLayer) -> Tensor:
    """Run the forward pass.

    Parameters
    ----------
    tokens : tensor of shape (n_tokens, hidden)
        Inputs of this rank.
    weights : MoeWeights
        ``router`` [E, h] of all experts; ``up`` [E / ranks, columns, h], ``down`` [E / ranks, h, inner] of this rank.
    layer : ExpertLayer
        Sizes, group and routing.

    Returns
    -------
    tensor of shape (n_tokens, hidden)
        Outputs, without a residual; a token whose choices are all dropped gets zeros.

    Notes
    -----
    The router scores and chooses in any case, and is paid for. Where the layer has a draw, tokens go where the draw
    says, with the router's probabilities as gates. Gradients of weights are added to the sums beside them: those of the
    router hold this rank's tokens only, those of experts the tokens of all ranks of the group.
    """
    shape = layer.shape
    logits = differentiable().linear(tokens.float(), weights.router, weights.router_sum)
    probabilities = logits.unflatten(1, (shape.num_prototypes, -1)).softmax(dim=-1)
    gates, experts = choose(probabilities, shape.experts_per_token)
    if layer.experts is not None:
        experts = layer.experts
        gates = probabilities.flatten(1).gather(1, experts)
    gates = gates.to(tokens.dtype)
    if layer.deep_buffer is not None:
        run_experts = partial(feed_forward, weights=weights, layer=layer)
        sizes = (shape.num_experts, shape.num_experts // layer.ranks.expert_parallel)
        return through_deep_buffer(tokens, gates, experts, layer.deep_buffer, sizes, run_experts)
    follow = _by_masks if shape.dispatch == "one_hot_einsum" else _by_rows
    return follow(tokens, gates, experts, weights, layer)


def _by_rows(tokens: Tensor, gates: Tensor, experts: Tensor, weights: MoeWeights, layer: ExpertLayer) -> Tensor:
    """Sort and copy rows, and send as many as there are."""
    keys, counts = _keys_and_counts(experts, layer)
    exchange = layer.exchange or exchanged(counts, layer.ranks)
    if layer.shape.capacity_factor is None:
        order, permute, unpermute = sort_rows(keys), differentiable().permute, differentiable().unpermute
    else:
        order, kept = sort_kept(keys, sum(exchange.sent)), kept_row_functions()
        permute, unpermute = kept.permute, kept.unpermute
    rows = exchange.to_experts(permute(tokens, order))
    return unpermute(exchange.from_experts(feed_forward(rows, exchange.groups, weights, layer)), gates, order)


def _keys_and_counts(experts: Tensor, layer: ExpertLayer) -> tuple[Tensor, Tensor]:
    """Return what choices are sorted by, dropped ones behind all others, and the kept rows of each expert."""
    import torch

    shape = layer.shape
    if shape.capacity_factor is None:
        return experts, counted(experts.flatten(), shape.num_experts)
    group_tokens = shape.group_tokens or max(1, experts.shape[0])
    kept = kept_choices(experts, shape.num_experts, shape.slots, group_tokens)
    keys = torch.where(kept, experts, shape.num_experts)
    return keys, counted(keys.flatten(), shape.num_experts + 1)[: shape.num_experts]


def _by_masks(tokens: Tensor, gates: Tensor, experts: Tensor, weights: MoeWeights, layer: ExpertLayer) -> Tensor:
    """Multiply by one-hot masks, and send every slot, filled or not (GShard, algorithm 2)."""
    shape, num_ranks = layer.shape, layer.ranks.expert_parallel
    group_tokens = shape.group_tokens or tokens.shape[0]
    num_groups = tokens.shape[0] // group_tokens
    masked = OneHotShape(
        num_groups, group_tokens, shape.num_experts, shape.slots, shape.hidden, shape.experts_per_token
    )
    by_group = partial(_grouped, num_groups=num_groups, group_tokens=group_tokens)
    dispatch, combine = one_hot_masks(by_group(experts), by_group(gates), masked)
    slots = to_slots(dispatch, by_group(tokens))
    rows = _swapped(slots.reshape(-1, shape.hidden), layer)
    local, per_rank = shape.num_experts // num_ranks, num_groups * shape.slots
    by_expert = rows.view(num_ranks, local, per_rank, -1).transpose(0, 1).reshape(-1, shape.hidden)
    out = feed_forward(by_expert, _equal_groups(local, num_ranks * per_rank), weights, layer)
    by_rank = out.view(local, num_ranks, per_rank, -1).transpose(0, 1).reshape(-1, shape.hidden)
    return to_tokens(combine, _swapped(by_rank, layer).view(slots.shape)).flatten(0, 1)


def _grouped(tensor: Tensor, *, num_groups: int, group_tokens: int) -> Tensor:
    return tensor.view(num_groups, group_tokens, tensor.shape[1])


def _swapped(rows: Tensor, layer: ExpertLayer) -> Tensor:
    """Exchange equally many rows with every rank."""
    num_ranks = layer.ranks.expert_parallel
    if num_ranks == 1:
        return rows
    equal = (rows.shape[0] // num_ranks,) * num_ranks
    return exchange_functions().all_to_all(rows, equal, equal, layer.ranks.expert_group)


def _equal_groups(num_groups: int, rows: int) -> Groups:
    """Return groups that batched products know by their number alone."""
    return Groups((rows,) * num_groups, None)


def feed_forward(rows: Tensor, groups: Groups, weights: MoeWeights, layer: ExpertLayer) -> Tensor:
    """Run each expert on its rows.

    Parameters
    ----------
    rows : tensor of shape (n_rows, hidden)
        Sorted by expert.
    groups : Groups
        Rows of each expert.
    weights : MoeWeights
        Of this rank.
    layer : ExpertLayer
        How experts multiply, and whether they are gated.
    """
    import torch

    experts, products = differentiable().experts, layer.products if groups.rows else LOOP
    up = experts(rows, weights.up, weights.up_sum, groups, products)
    inner = gated_activation(*up.chunk(2, dim=-1)) if layer.shape.is_gated else torch.nn.functional.gelu(up)
    return experts(inner, weights.down, weights.down_sum, groups, products)


def _batched(rows: Tensor, groups: Groups) -> Tensor:
    return rows.view(groups.num_groups, -1, rows.shape[1])


def _batched_forward(inputs: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    return (_batched(inputs, groups) @ weight.transpose(1, 2)).flatten(0, 1)


def _batched_input_gradient(grads: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    return (_batched(grads.contiguous(), groups) @ weight).flatten(0, 1)


def _batched_weight_gradient(total: Tensor, grads: Tensor, inputs: Tensor, groups: Groups) -> object:
    return total.add_(_batched(grads.contiguous(), groups).transpose(1, 2) @ _batched(inputs, groups))


BATCHED = GroupedProducts("torch.bmm", _batched_forward, _batched_input_gradient, _batched_weight_gradient)
"""Experts with equally many slots are one batched product."""
