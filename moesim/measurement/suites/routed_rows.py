"""Differentiable steps: rows to their experts and back, products whose weight gradients add up in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from moesim.measurement.suites.gemms import weight_gradient
from moesim.measurement.suites.grouped_gemms import GroupedProducts, Groups, precision_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.autograd.function import FunctionCtx


@dataclass(frozen=True, slots=True)
class RowOrder:
    """Which row of the sorted order belongs to which token.

    Parameters
    ----------
    token_of_row : tensor of shape (n_rows,)
        Token of each row, rows sorted by expert.
    choice_of_row : tensor of shape (n_rows,)
        Index of the row among all choices, counted token by token.
    row_of_choice : tensor of shape (n_tokens, experts_per_token)
        The inverse.
    """

    token_of_row: Tensor
    choice_of_row: Tensor
    row_of_choice: Tensor


def sort_rows(experts: Tensor) -> RowOrder:
    """Sort the choices by expert; within an expert the tokens keep their order.

    Parameters
    ----------
    experts : tensor of shape (n_tokens, experts_per_token)
        Expert of each choice.
    """
    import torch

    choice_of_row = torch.argsort(experts.flatten(), stable=True)
    rows = torch.arange(experts.numel(), device=experts.device)
    row_of_choice = torch.empty_like(rows).scatter_(0, choice_of_row, rows).view_as(experts)
    return RowOrder(choice_of_row // experts.shape[1], choice_of_row, row_of_choice)


def gather_rows(tokens: Tensor, order: RowOrder) -> Tensor:
    """Copy each token to its rows: the forward pass of `permute`."""
    return tokens.index_select(0, order.token_of_row)


def sum_rows(rows: Tensor, order: RowOrder) -> Tensor:
    """Add up the rows of each token: the backward pass of `permute`."""
    gathered = rows.index_select(0, order.row_of_choice.flatten())
    return gathered.unflatten(0, order.row_of_choice.shape).sum(dim=1)


def weigh_rows(rows: Tensor, gates: Tensor, order: RowOrder) -> Tensor:
    """Add up the rows of each token, weighted: the forward pass of `unpermute`."""
    gathered = rows.index_select(0, order.row_of_choice.flatten()).unflatten(0, order.row_of_choice.shape)
    return (gathered * gates.unsqueeze(-1)).sum(dim=1)


def weigh_rows_gradient(grads: Tensor, rows: Tensor, gates: Tensor, order: RowOrder) -> tuple[Tensor, Tensor]:
    """Return gradients of rows and gates: the backward pass of `unpermute`."""
    of_rows = grads.index_select(0, order.token_of_row)
    weighted = of_rows * gates.flatten().index_select(0, order.choice_of_row).unsqueeze(-1)
    of_choices = (of_rows * rows).sum(dim=-1).index_select(0, order.row_of_choice.flatten())
    return weighted, of_choices.view_as(gates)


@dataclass(frozen=True, slots=True)
class Differentiable:
    """Steps with backward passes of their own; weights' gradients go into the fp32 sums beside them.

    ``linear(x, w, w_sum)``, ``experts(x, w, w_sum, groups, products)``, ``permute(tokens, order)``,
    ``unpermute(rows, gates, order)``.
    """

    linear: Callable[[Tensor, Tensor, Tensor], Tensor]
    experts: Callable[[Tensor, Tensor, Tensor, Groups, GroupedProducts], Tensor]
    permute: Callable[[Tensor, RowOrder], Tensor]
    unpermute: Callable[[Tensor, Tensor, RowOrder], Tensor]


@cache
def differentiable() -> Differentiable:
    """Return the steps; their classes can only be made once torch is there."""
    import torch

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, inputs: Tensor, weight: Tensor, total: Tensor) -> Tensor:
            ctx.save_for_backward(inputs, weight)
            ctx.total = total
            return inputs @ weight.t()

        @staticmethod
        def backward(ctx: FunctionCtx, grads: Tensor) -> tuple[Tensor | None, ...]:
            inputs, weight = ctx.saved_tensors
            weight_gradient(grads.device.type, precision_name(inputs)).add(ctx.total, grads, inputs)
            return grads @ weight, None, None

    class Experts(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: FunctionCtx, inputs: Tensor, weight: Tensor, total: Tensor, groups: Groups, products: GroupedProducts
        ) -> Tensor:
            ctx.save_for_backward(inputs, weight)
            ctx.rest = (total, groups, products)
            return products.forward(inputs, weight, groups)

        @staticmethod
        def backward(ctx: FunctionCtx, grads: Tensor) -> tuple[Tensor | None, ...]:
            inputs, weight = ctx.saved_tensors
            total, groups, products = ctx.rest
            products.add_weight_gradient(total, grads, inputs, groups)
            return products.input_gradient(grads, weight, groups), None, None, None, None

    class Permute(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, tokens: Tensor, order: RowOrder) -> Tensor:
            ctx.order = order
            return gather_rows(tokens, order)

        @staticmethod
        def backward(ctx: FunctionCtx, grads: Tensor) -> tuple[Tensor | None, ...]:
            return sum_rows(grads, ctx.order), None

    class Unpermute(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, rows: Tensor, gates: Tensor, order: RowOrder) -> Tensor:
            ctx.save_for_backward(rows, gates)
            ctx.order = order
            return weigh_rows(rows, gates, order)

        @staticmethod
        def backward(ctx: FunctionCtx, grads: Tensor) -> tuple[Tensor | None, ...]:
            rows, gates = ctx.saved_tensors
            return *weigh_rows_gradient(grads, rows, gates, ctx.order), None

    return Differentiable(Linear.apply, Experts.apply, Permute.apply, Unpermute.apply)
