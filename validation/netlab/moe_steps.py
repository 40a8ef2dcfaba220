"""A training step of MoE layers in torch, expert parallel over all ranks, its communication given from outside.

The same code runs with gloo between ranks, and alone on one rank with made-up messages to time its compute.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moesim.structure.columns import FloatArray, IntArray
from validation.netlab.workers import Session


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step: layers of a dense block and an MoE block, in elements of four bytes."""

    layers: int
    hidden: int
    intermediate: int
    experts_per_token: int


class Communication(Protocol):
    """What a step asks for."""

    def exchange(self, rows: Any, sends: Sequence[int], receives: Sequence[int]) -> Any:
        """Rows to each rank, rows from each rank."""
        ...

    def all_reduce(self, values: Any) -> Any:
        """Sum over the ranks."""
        ...


class Gloo:
    """Communication between the ranks."""

    def exchange(self, rows: Any, sends: Sequence[int], receives: Sequence[int]) -> Any:
        """Rows to each rank, rows from each rank."""
        from torch import distributed

        received = rows.new_empty((sum(receives), rows.shape[1]))
        distributed.all_to_all_single(received, rows, list(receives), list(sends))
        return received

    def all_reduce(self, values: Any) -> Any:
        """Sum over the ranks."""
        from torch import distributed

        distributed.all_reduce(values)
        return values


class Alone:
    """No communication: messages of the right size are made up, and what lies between them is timed."""

    def __init__(self) -> None:
        self.left_s = time.monotonic()
        self.segments_s: list[float] = []

    def _entered(self) -> None:
        self.segments_s.append(time.monotonic() - self.left_s)

    def exchange(self, rows: Any, sends: Sequence[int], receives: Sequence[int]) -> Any:
        """Made-up rows."""
        import torch

        self._entered()
        made_up = 0.01 * torch.randn(sum(receives), rows.shape[1])
        self.left_s = time.monotonic()
        return made_up

    def all_reduce(self, values: Any) -> Any:
        """Leave the values as they are."""
        self._entered()
        self.left_s = time.monotonic()
        return values


class MoeStep:
    """Parameters and one rank's routing; calling it runs forward, backward, gradient reduction and update.

    ``tokens`` (n_ranks, n_experts) is the simulator's matrix: the router's choices follow it, its weights are learnt.
    """

    def __init__(self, rank: int, tokens: IntArray, shape: StepShape) -> None:
        import torch

        ranks, experts = tokens.shape
        self.shape, self.local_experts = shape, experts // ranks
        by_rank = tokens.reshape(ranks, ranks, self.local_experts)
        self.sends = by_rank[rank].sum(axis=1).tolist()
        self.receives = by_rank[:, rank].sum(axis=1).tolist()
        arriving = np.tile(np.arange(self.local_experts), ranks)
        expert_of_row = np.repeat(arriving, by_rank[:, rank].ravel())
        self.by_expert = torch.from_numpy(np.argsort(expert_of_row, kind="stable"))
        self.rows_of_expert = by_rank[:, rank].sum(axis=0).tolist()
        chosen = np.random.default_rng(rank).permutation(np.repeat(np.arange(experts), tokens[rank]))
        self.num_tokens = len(chosen) // shape.experts_per_token
        self.chosen = torch.from_numpy(chosen.reshape(self.num_tokens, shape.experts_per_token))
        self.to_send = torch.from_numpy(np.argsort(chosen, kind="stable"))
        torch.manual_seed(0)
        self.shared = [
            [_parameter(shape.hidden, shape.hidden), _parameter(shape.hidden, experts)] for _ in range(shape.layers)
        ]
        torch.manual_seed(rank + 1)
        self.experts = [
            [
                (_parameter(shape.hidden, shape.intermediate), _parameter(shape.intermediate, shape.hidden))
                for _ in range(self.local_experts)
            ]
            for _ in range(shape.layers)
        ]
        self.inputs = torch.randn(self.num_tokens, shape.hidden)

    def __call__(self, communication: Communication) -> float:
        """Run one step and return the loss."""
        import torch

        hidden = self.inputs
        for layer in range(self.shape.layers):
            dense, router = self.shared[layer]
            hidden = hidden + torch.nn.functional.gelu(hidden @ dense)
            hidden = hidden + self._moe(hidden, router, layer, communication)
        loss = hidden.square().mean()
        loss.backward()
        shared = [parameter for pair in self.shared for parameter in pair]
        together = communication.all_reduce(torch.cat([parameter.grad.ravel() for parameter in shared]))
        with torch.no_grad():
            for parameter, mean in zip(shared, together.split([one.numel() for one in shared]), strict=True):
                parameter.grad.copy_(mean.view_as(parameter))
            for parameter in [*shared, *(one for layer in self.experts for pair in layer for one in pair)]:
                if parameter.grad is not None:
                    parameter.sub_(1e-4 * parameter.grad)
                    parameter.grad = None
        return float(loss.detach())

    def _moe(self, hidden: Any, router: Any, layer: int, communication: Communication) -> Any:
        import torch

        weight = (hidden @ router).softmax(dim=1).gather(1, self.chosen)
        rows = hidden.repeat_interleave(self.shape.experts_per_token, dim=0)[self.to_send]
        received = _exchange(rows, communication, self.sends, self.receives)[self.by_expert]
        parts = received.split(self.rows_of_expert)
        computed = [
            torch.nn.functional.gelu(part @ up) @ down
            for part, (up, down) in zip(parts, self.experts[layer], strict=True)
        ]
        ordered = torch.cat(computed)[self.by_expert.argsort()]
        returned = _exchange(ordered, communication, self.receives, self.sends)[self.to_send.argsort()]
        return (returned.view(self.num_tokens, self.shape.experts_per_token, -1) * weight[:, :, None]).sum(dim=1)


def _parameter(rows: int, columns: int) -> Any:
    import torch

    return (torch.randn(rows, columns) / rows**0.5).requires_grad_()


def _exchange(rows: Any, communication: Communication, sends: Sequence[int], receives: Sequence[int]) -> Any:
    """All-to-all whose backward pass is the all-to-all the other way."""
    import torch

    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, rows: Any) -> Any:
            return communication.exchange(rows.contiguous(), sends, receives)

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            return communication.exchange(gradient.contiguous(), receives, sends)

    return Exchange.apply(rows)


def time_step(session: Session, tokens: IntArray, shape: StepShape, *, warms_up: bool = True) -> float:
    """Seconds of a whole step from the common start until this rank is through; one before may go uncounted."""
    step, gloo = MoeStep(session.rank, tokens, shape), Gloo()
    if warms_up:
        step(gloo)
    start = session.start_together()
    step(gloo)
    return time.monotonic() - start


def time_compute(session: Session, tokens: IntArray, shape: StepShape) -> FloatArray:
    """Seconds of the compute before, between and after the messages of a step, for the loads of each rank in turn.

    Returns
    -------
    ndarray of shape (n_ranks, n_segments)
        Of the second step of each, measured by rank 0 while all others rest; empty from these.
    """
    if session.rank:
        return np.zeros((0, 0))
    measured = []
    for rank in range(len(session.hosts)):
        step = MoeStep(rank, tokens, shape)
        step(Alone())
        alone = Alone()
        step(alone)
        measured.append([*alone.segments_s, time.monotonic() - alone.left_s])
    return np.array(measured)
