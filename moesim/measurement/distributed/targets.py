"""What the lists of distributed cases depend on, and the cases that several suites make alike."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.measurement.cases import DeviceKind
from moesim.measurement.distributed.layer_shapes import Draw, ExpertLayerShape, drawn
from moesim.measurement.distributed.optional_back_ends import TORCH, BackEnds
from moesim.measurement.distributed.ranks import Ranks


@dataclass(frozen=True, slots=True)
class DistributedTarget:
    """A device, its precisions, the seed, the processes, who decides where tokens go, and the libraries."""

    device: DeviceKind
    dtypes: tuple[str, ...]
    seed: int
    ranks: Ranks
    is_learned: bool = False
    back_ends: BackEnds = TORCH

    def presets(self, several: tuple[str, ...], alone: tuple[str, ...]) -> tuple[str, ...]:
        """Return the routing presets to measure; with learned routing there is only the number of tokens to take.

        Parameters
        ----------
        several, alone : tuple of str
            For several expert-parallel ranks, and for one.
        """
        if self.is_learned:
            return ("W0",)
        return several if self.ranks.expert_parallel > 1 else alone

    def draws(self, preset: str, shape: ExpertLayerShape, num_layers: int) -> tuple[Draw, ...]:
        """Draw the rows of several layers.

        Parameters
        ----------
        preset : str
            W0 to W7.
        shape : ExpertLayerShape
            Sizes.
        num_layers : int
            Each has a draw of its own.
        """
        return tuple(
            drawn(preset, shape, num_ranks=self.ranks.expert_parallel, layer=layer, seed=self.seed)
            for layer in range(num_layers)
        )

    def group_names(self) -> dict[str, int | str]:
        """Return what identifies the processes in a record."""
        named: dict[str, int | str] = {"ranks": self.ranks.expert_parallel, "replicas": self.ranks.num_replicas}
        if self.is_learned:
            named["routing"] = "learned"
        return named | self.back_ends.names()
