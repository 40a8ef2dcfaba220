"""Rows per expert and the choices of each token, drawn by the routing presets that simulated runs use too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.structure.token_routing import BURST_PROBABILITY, draw

if TYPE_CHECKING:
    import numpy.typing as npt

PRESETS = ("W0", "W1", "W3", "W2", "W5", "W4", "W7", "W6")
"""In the order of what they teach: equal loads, a hot set, a spread, and the rest."""
ROUTED_AS_RANKS = 8
"""A layer with all its experts on one device is routed as if they stood on this many ranks."""


@dataclass(frozen=True, slots=True)
class RoutedLoads:
    """Rows of each expert on the device."""

    loads: tuple[int, ...]
    step: int

    @property
    def rows(self) -> int:
        """Rows of all experts."""
        return sum(self.loads)

    @property
    def num_hit(self) -> int:
        """Experts with at least one row."""
        return sum(load > 0 for load in self.loads)


def bursting_step(seed: int) -> int:
    """Return the first step in which preset W7 bursts; in the others it is W0.

    Parameters
    ----------
    seed : int
        Of the draws.
    """
    step = 0
    while np.random.default_rng([seed, step]).random() >= BURST_PROBABILITY:
        step += 1
    return step


def rank_loads(
    preset: str, tokens: int, num_experts: int, experts_per_token: int, *, num_ranks: int, seed: int
) -> RoutedLoads:
    """Loads of the local experts on the most loaded of several expert-parallel ranks.

    Parameters
    ----------
    preset : str
        W0 to W7.
    tokens : int
        Mean tokens of each rank.
    num_experts, experts_per_token : int
        Of the layer.
    num_ranks : int
        Expert-parallel ranks; each sends to all.
    seed : int
        Of the draw.

    Examples
    --------
    >>> rank_loads("W0", 8, 4, 1, num_ranks=2, seed=0).loads
    (4, 4)
    """
    step = bursting_step(seed) if preset == "W7" else 0
    matrix = draw(preset, tokens, num_experts, experts_per_token, num_ranks, step, 0, seed)
    of_rank = matrix.sum(axis=0).reshape(num_ranks, -1)
    fullest = of_rank[int(of_rank.sum(axis=1).argmax())]
    return RoutedLoads(tuple(int(load) for load in fullest), step)


def layer_loads(preset: str, tokens: int, num_experts: int, experts_per_token: int, *, seed: int) -> RoutedLoads:
    """Loads of all experts of a layer, drawn as if they stood on ``ROUTED_AS_RANKS`` ranks.

    Parameters
    ----------
    preset : str
        W0 to W7.
    tokens : int
        Of the layer, a multiple of the ranks; preset W4 scatters around it.
    num_experts, experts_per_token : int
        Of the layer.
    seed : int
        Of the draw.

    Examples
    --------
    >>> layer_loads("W0", 16, 4, 2, seed=0).loads
    (8, 8, 8, 8)
    """
    num_ranks = min(ROUTED_AS_RANKS, num_experts)
    step = bursting_step(seed) if preset == "W7" else 0
    matrix = draw(preset, tokens // num_ranks, num_experts, experts_per_token, num_ranks, step, 0, seed)
    return RoutedLoads(tuple(int(load) for load in matrix.sum(axis=0)), step)


def expert_choices(loads: Sequence[int], experts_per_token: int, *, seed: int) -> npt.NDArray[np.int64]:
    """Spread loads over tokens so that a token's experts differ wherever the loads allow it.

    Parameters
    ----------
    loads : sequence of int
        Rows of each expert; they sum to a multiple of ``experts_per_token``.
    experts_per_token : int
        Choices of each token.
    seed : int
        Of the order of the tokens.

    Returns
    -------
    ndarray of shape (n_tokens, experts_per_token)
        Experts, every one as often as its load says.

    Notes
    -----
    The sorted list of experts is cut into ``experts_per_token`` columns: a token takes entries that lie n_tokens apart,
    which are the same expert only if its load exceeds n_tokens.

    Examples
    --------
    >>> choices = expert_choices([2, 1, 1], 2, seed=0)
    >>> np.bincount(choices.ravel()).tolist(), bool((choices[:, 0] != choices[:, 1]).all())
    ([2, 1, 1], True)
    """
    every = np.repeat(np.arange(len(loads)), loads)
    columns = every.reshape(experts_per_token, -1)
    return np.asarray(np.random.default_rng(seed).permutation(columns.T), dtype=np.int64)
