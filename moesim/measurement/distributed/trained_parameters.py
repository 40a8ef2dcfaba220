"""Weights with fp32 master copies, moments and gradients: summed over ranks, then stepped by Adam."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesim.measurement.suites.optimizer_steps import adam_step

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.distributed.ranks import Ranks
    from moesim.measurement.workbenches import Workbench

ALIGNMENT = 128
"""Elements: every gradient begins at a multiple of 512 bytes."""
BUCKET_ELEMENTS = 2**26
MOMENT_SCALE = 1e-3


@dataclass(frozen=True, slots=True)
class ParameterShape:
    """One weight: its name and sizes, whether each rank has its own, and whether it is kept in fp32 throughout."""

    name: str
    sizes: tuple[int, ...]
    is_expert: bool = False
    is_full_precision: bool = False

    @property
    def padded(self) -> int:
        """Elements with the gap behind them in a buffer of gradients."""
        return -(-math.prod(self.sizes) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class TrainedParameters:
    """All weights of a rank and what training keeps beside them.

    Parameters
    ----------
    weights, sums : dict
        By name: what the passes read, and fp32 gradients, which are views of the buffers.
    shared, experts : tensor of shape (n,)
        Gradients of weights that all ranks hold, and of this rank's experts.
    masters, first, second, counts : list of tensors
        Of Adam, in the order of the names; where a weight is fp32, it is its own master.
    """

    weights: dict[str, Tensor]
    sums: dict[str, Tensor]
    shared: Tensor
    experts: Tensor
    masters: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    counts: list[Tensor]

    def clear_gradients(self) -> None:
        """Begin new sums."""
        self.shared.zero_()
        self.experts.zero_()

    def reduce_gradients(self, ranks: Ranks) -> None:
        """Average gradients over the tokens of all ranks.

        Parameters
        ----------
        ranks : Ranks
            Shared weights add up over all of them; an expert's gradient holds the tokens of its group already and adds
            up over the groups.
        """
        if ranks.size == 1:
            return
        import torch.distributed as dist

        for bucket in self.shared.split(BUCKET_ELEMENTS):
            dist.all_reduce(bucket)
        if ranks.num_replicas > 1:
            for bucket in self.experts.split(BUCKET_ELEMENTS):
                dist.all_reduce(bucket, group=ranks.replica_group)
        self.shared.mul_(1 / ranks.size)
        self.experts.mul_(1 / ranks.size)

    def step(self) -> None:
        """Take one step of Adam, and copy masters to the weights of lower precision."""
        import torch

        with torch.no_grad():
            torch._foreach_add_(self.counts, 1)
            adam_step(self.masters, list(self.sums.values()), self.first, self.second, self.counts)
            lower = [
                (weight, master)
                for weight, master in zip(self.weights.values(), self.masters, strict=True)
                if weight is not master
            ]
            if lower:
                torch._foreach_copy_([weight for weight, _ in lower], [master for _, master in lower])


def make_parameters(
    bench: Workbench, shapes: Sequence[ParameterShape], ranks: Ranks, dtype: str, *, is_trained: bool = True
) -> TrainedParameters:
    """Fill weights, gradients, masters and moments; ranks that share a weight hold the same values.

    Parameters
    ----------
    bench : Workbench
        The device.
    shapes : sequence of ParameterShape
        Every weight of this rank.
    ranks : Ranks
        Who shares.
    dtype : str
        Of the weights that the passes read.
    is_trained : bool
        Whether there is an optimizer: without it, masters and moments are left out.
    """
    weights = {shape.name: _filled(bench, shape, dtype) for shape in shapes}
    _share(list(weights.values()), shapes, ranks)
    sums: dict[str, Tensor] = {}
    shared = _with_views(bench, [shape for shape in shapes if not shape.is_expert], sums)
    experts = _with_views(bench, [shape for shape in shapes if shape.is_expert], sums)
    sums = {shape.name: sums[shape.name] for shape in shapes}
    if not is_trained:
        return TrainedParameters(weights, sums, shared, experts, [], [], [], [])
    import torch

    masters = [weight if weight.dtype == torch.float32 else weight.float() for weight in weights.values()]
    first = [bench.normal(*master.shape, dtype="fp32", scale=MOMENT_SCALE) for master in masters]
    second = [bench.normal(*master.shape, dtype="fp32", scale=MOMENT_SCALE).square_() for master in masters]
    _share(first, shapes, ranks)
    _share(second, shapes, ranks)
    counts = [torch.ones((), device=bench.device) for _ in masters]
    return TrainedParameters(weights, sums, shared, experts, masters, first, second, counts)


def _share(tensors: Sequence[Tensor], shapes: Sequence[ParameterShape], ranks: Ranks) -> None:
    """Make tensors equal on the ranks that share their weights."""
    for is_expert in (False, True):
        group = [tensor for tensor, shape in zip(tensors, shapes, strict=True) if shape.is_expert == is_expert]
        ranks.copy_from_first(group, among_replicas=is_expert)


def _filled(bench: Workbench, shape: ParameterShape, dtype: str) -> Tensor:
    precision = "fp32" if shape.is_full_precision else dtype
    if len(shape.sizes) == 1:
        return bench.normal(*shape.sizes, dtype=precision, scale=0.1).add_(1.0)
    return bench.weight(*shape.sizes, dtype=precision)


def _with_views(bench: Workbench, shapes: Sequence[ParameterShape], sums: dict[str, Tensor]) -> Tensor:
    """Return one buffer of gradients, and enter a view of it for every weight."""
    buffer = bench.normal(sum(shape.padded for shape in shapes), dtype="fp32")
    begin = 0
    for shape in shapes:
        sums[shape.name] = buffer[begin : begin + math.prod(shape.sizes)].view(shape.sizes)
        begin += shape.padded
    return buffer
