"""Experts with a capacity: which choices get a slot, and rows of those choices only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from moesim.measurement.suites.routed_rows import RowOrder, gather_rows, sum_rows, weigh_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.autograd.function import FunctionCtx


def kept_choices(experts: Tensor, num_experts: int, slots: int, group_tokens: int) -> Tensor:
    """Say which choices get a slot: first choices of all tokens of a group go before second ones (GShard).

    Parameters
    ----------
    experts : tensor of shape (n_tokens, experts_per_token)
        Expert of each choice.
    num_experts, slots : int
        Experts, and slots that each offers to a group.
    group_tokens : int
        Tokens of a routing group.

    Returns
    -------
    tensor of shape (n_tokens, experts_per_token)
        True where the choice is kept.
    """
    import torch

    num_tokens, choices = experts.shape
    num_groups = -(-num_tokens // group_tokens)
    group = torch.arange(num_tokens, device=experts.device) // group_tokens
    queues = (experts + num_experts * group.unsqueeze(1)).t().flatten()
    order = torch.argsort(queues, stable=True)
    lengths = counted(queues, num_groups * num_experts)
    starts = lengths.cumsum(0) - lengths
    places = torch.arange(queues.numel(), device=queues.device) - starts.gather(0, queues.gather(0, order))
    kept = torch.empty_like(order, dtype=torch.bool).scatter_(0, order, places < slots)
    return kept.view(choices, num_tokens).t()


def counted(experts: Tensor, num_experts: int) -> Tensor:
    """Count how often each expert occurs, shape (n_experts,), without the host waiting."""
    import torch

    ones = torch.ones_like(experts)
    return torch.zeros(num_experts, dtype=experts.dtype, device=experts.device).scatter_add_(0, experts, ones)


def sort_kept(keys: Tensor, num_kept: int) -> RowOrder:
    """Sort kept choices by expert.

    Parameters
    ----------
    keys : tensor of shape (n_tokens, experts_per_token)
        Expert of each choice; of a dropped one, a number beyond all experts.
    num_kept : int
        Choices that are kept.

    Returns
    -------
    RowOrder
        ``row_of_choice`` of a dropped choice is ``num_kept``: a row behind the last.
    """
    import torch

    every = torch.argsort(keys.flatten(), stable=True)
    rows = torch.arange(keys.numel(), device=keys.device)
    row_of_choice = torch.empty_like(rows).scatter_(0, every, rows).clamp_(max=num_kept).view_as(keys)
    choice_of_row = every[:num_kept]
    return RowOrder(choice_of_row // keys.shape[1], choice_of_row, row_of_choice)


@dataclass(frozen=True, slots=True)
class KeptRowFunctions:
    """``permute(tokens, order)`` and ``unpermute(rows, gates, order)``, where some choices have no row."""

    permute: Callable[[Tensor, RowOrder], Tensor]
    unpermute: Callable[[Tensor, Tensor, RowOrder], Tensor]


@cache
def kept_row_functions() -> KeptRowFunctions:
    """Return the functions; their classes can only be made once torch is there."""
    import torch

    class Permute(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, tokens: Tensor, order: RowOrder) -> Tensor:
            ctx.order = order
            return gather_rows(tokens, order)

        @staticmethod
        def backward(ctx: FunctionCtx, grads: Tensor) -> tuple[Tensor | None, ...]:
            return sum_rows(_with_zeros(grads), ctx.order), None

    class Unpermute(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, rows: Tensor, gates: Tensor, order: RowOrder) -> Tensor:
            ctx.save_for_backward(rows, gates)
            ctx.order = order
            return weigh_rows(_with_zeros(rows), gates, order)

        @staticmethod
        def backward(ctx: FunctionCtx, grads: Tensor) -> tuple[Tensor | None, ...]:
            rows, gates = ctx.saved_tensors
            order = ctx.order
            of_rows = grads.index_select(0, order.token_of_row)
            weighted = of_rows * gates.flatten().index_select(0, order.choice_of_row).unsqueeze(-1)
            of_gates = gates.new_zeros(gates.numel()).scatter_(0, order.choice_of_row, (of_rows * rows).sum(dim=-1))
            return weighted, of_gates.view_as(gates), None

    return KeptRowFunctions(Permute.apply, Unpermute.apply)


def _with_zeros(rows: Tensor) -> Tensor:
    """Append the row that dropped choices read."""
    import torch

    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
