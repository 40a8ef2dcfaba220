"""Rows between ranks: who gets how many, the uneven all-to-all and its backward pass, rows in the order of experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from moesim.measurement.suites.grouped_gemms import Groups

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.autograd.function import FunctionCtx

    from moesim.measurement.distributed.ranks import Ranks


@dataclass(frozen=True, slots=True)
class RowExchange:
    """How rows, sorted by expert, reach the ranks of their experts.

    Parameters
    ----------
    sent, received : tuple of int
        Rows to each rank and from each rank.
    groups : Groups
        Rows of each expert of this rank.
    order, inverse : tensors of shape (n_received,), optional
        From the order of senders to the order of experts, and back; None where both are the same.
    group : process group, optional
        Those who exchange; None for a rank alone.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    groups: Groups
    order: Tensor | None = None
    inverse: Tensor | None = None
    group: object = None

    def to_experts(self, rows: Tensor) -> Tensor:
        """Send rows[n_sent, h] to their experts; they arrive sorted by expert."""
        if self.group is None:
            return rows
        arrived = exchange_functions().all_to_all(rows, self.sent, self.received, self.group)
        return arrived if self.order is None else exchange_functions().reorder(arrived, self.order, self.inverse)

    def from_experts(self, rows: Tensor) -> Tensor:
        """Send rows[n_received, h] back to where they came from."""
        if self.group is None:
            return rows
        if self.order is not None:
            rows = exchange_functions().reorder(rows, self.inverse, self.order)
        return exchange_functions().all_to_all(rows, self.received, self.sent, self.group)


def alone(loads: tuple[int, ...], ends: Tensor) -> RowExchange:
    """Return the exchange of a rank that has all experts: rows stay where they are.

    Parameters
    ----------
    loads : tuple of int
        Rows of each expert.
    ends : tensor of shape (n_experts,)
        Their running sum.
    """
    return RowExchange((sum(loads),), (sum(loads),), Groups(loads, ends))


def exchanged(counts: Tensor, ranks: Ranks) -> RowExchange:
    """Tell every rank how many rows come, and plan the exchange.

    Parameters
    ----------
    counts : tensor of shape (n_experts,)
        Rows of this rank for each expert of the group.
    ranks : Ranks
        The group.

    Notes
    -----
    The host reads the counts once; the buffers of the exchange cannot be made without them.
    """
    import torch
    import torch.distributed as dist

    num_ranks = ranks.expert_parallel
    if num_ranks == 1:
        return alone(tuple(counts.tolist()), counts.cumsum(0).to(torch.int32))
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=ranks.expert_group)
    by_rank = arriving.view(num_ranks, -1)
    on_host = torch.cat([counts.view(num_ranks, -1).sum(dim=1), by_rank.sum(dim=1), by_rank.sum(dim=0)]).tolist()
    sent, received, loads = on_host[:num_ranks], on_host[num_ranks : 2 * num_ranks], on_host[2 * num_ranks :]
    groups = Groups(tuple(loads), by_rank.sum(dim=0).cumsum(0).to(torch.int32))
    order, inverse = _expert_order(by_rank, sum(received)) if len(loads) > 1 else (None, None)
    return RowExchange(tuple(sent), tuple(received), groups, order, inverse, ranks.expert_group)


def _expert_order(by_rank: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Sort rows that come rank by rank, and within a rank expert by expert."""
    import torch

    num_ranks, num_local = by_rank.shape
    experts = torch.arange(num_local, device=by_rank.device).repeat(num_ranks)
    of_rows = torch.repeat_interleave(experts, by_rank.flatten(), output_size=num_rows)
    order = torch.argsort(of_rows, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(num_rows, device=order.device))
    return order, inverse


@dataclass(frozen=True, slots=True)
class ExchangeFunctions:
    """``all_to_all(rows, sent, received, group)`` and ``reorder(rows, order, inverse)``, with backward passes."""

    all_to_all: Callable[[Tensor, tuple[int, ...], tuple[int, ...], object], Tensor]
    reorder: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


@cache
def exchange_functions() -> ExchangeFunctions:
    """Return the functions; their classes can only be made once torch is there."""
    import torch

    class AllToAll(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: FunctionCtx, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: object
        ) -> Tensor:
            ctx.plan = (sent, received, group)
            return all_to_all_rows(rows, sent, received, group)

        @staticmethod
        def backward(ctx: FunctionCtx, grads: Tensor) -> tuple[Tensor | None, ...]:
            sent, received, group = ctx.plan
            return all_to_all_rows(grads, received, sent, group), None, None, None

    class Reorder(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
            ctx.inverse = inverse
            return rows.index_select(0, order)

        @staticmethod
        def backward(ctx: FunctionCtx, grads: Tensor) -> tuple[Tensor | None, ...]:
            return grads.index_select(0, ctx.inverse), None, None

    return ExchangeFunctions(AllToAll.apply, Reorder.apply)


def all_to_all_rows(rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: object) -> Tensor:
    """Exchange rows[n_sent, h] by an uneven all-to-all.

    Parameters
    ----------
    rows : tensor of shape (n_sent, ...)
        Sorted by the rank they go to.
    sent, received : tuple of int
        Rows to each rank and from each rank.
    group : process group
        Those who exchange.
    """
    import torch.distributed as dist

    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out
