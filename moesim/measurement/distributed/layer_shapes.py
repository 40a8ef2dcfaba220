"""Sizes of a layer of experts over several ranks, and the rows that the simulator's draws send through it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from moesim.measurement.routed_loads import bursting_step, expert_choices
from moesim.structure.token_routing import draw

if TYPE_CHECKING:
    import numpy.typing as npt

CEILING_SLACK = 1e-9
SEEDS_PER_LAYER = 100_003


@dataclass(frozen=True, slots=True)
class ExpertLayerShape:
    """A layer of experts spread over the ranks of an expert-parallel group.

    Parameters
    ----------
    tokens : int
        Tokens of each rank; preset W4 scatters around it.
    hidden, inner : int
        Width of the tokens and of an expert; a gated up-projection has twice the columns.
    num_experts : int
        Of all ranks together.
    experts_per_token : int
        k; for ``k_top_1`` the number of prototypes.
    is_gated : bool
        silu(gate) * up, or gelu(up).
    router : str
        ``top_k`` takes the best k of all experts, ``k_top_1`` the best of each of k prototypes.
    capacity_factor : float, optional
        None drops nothing.
    capacity_per : str
        ``token``: cf T / E slots of an expert; ``assignment``: k cf T / E.
    dispatch : str
        ``permute`` sorts and copies rows and sends as many as there are; ``one_hot_einsum`` multiplies by masks and
        sends all slots, which needs a capacity.
    group_tokens : int, optional
        Tokens among which slots are counted; None for all of a rank.
    """

    tokens: int
    hidden: int
    inner: int
    num_experts: int
    experts_per_token: int
    is_gated: bool = True
    router: Literal["top_k", "k_top_1"] = "top_k"
    capacity_factor: float | None = None
    capacity_per: Literal["token", "assignment"] = "token"
    dispatch: Literal["permute", "one_hot_einsum"] = "permute"
    group_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that contradict each other."""
        if self.router == "k_top_1" and self.num_experts % self.experts_per_token:
            raise ValueError(f"{self.num_experts} experts do not divide into {self.experts_per_token} prototypes")
        if self.dispatch == "one_hot_einsum" and self.capacity_factor is None:
            raise ValueError("one-hot dispatch fills slots: it needs a capacity factor")
        if self.group_tokens is not None and self.tokens % self.group_tokens:
            raise ValueError(f"{self.tokens} tokens do not divide into groups of {self.group_tokens}")

    @property
    def num_prototypes(self) -> int:
        """Softmaxes of the router."""
        return self.experts_per_token if self.router == "k_top_1" else 1

    @property
    def up_columns(self) -> int:
        """Outputs of an expert's first product."""
        return 2 * self.inner if self.is_gated else self.inner

    @property
    def num_groups(self) -> int:
        """Routing groups of a rank."""
        return 1 if self.group_tokens is None else self.tokens // self.group_tokens

    @property
    def slots(self) -> int:
        """Slots an expert offers to a routing group, as the simulator counts them.

        Raises
        ------
        ValueError
            If the layer drops nothing: then there are no slots.

        Examples
        --------
        >>> ExpertLayerShape(1024, 8, 8, 64, 2, capacity_factor=1.25).slots
        20
        >>> ExpertLayerShape(1024, 8, 8, 64, 2, capacity_factor=1.25, capacity_per="assignment").slots
        40
        """
        if self.capacity_factor is None:
            raise ValueError("a layer without a capacity has no slots")
        tokens = self.tokens if self.group_tokens is None else self.group_tokens
        choices = self.experts_per_token if self.capacity_per == "assignment" else 1
        return max(1, math.ceil(self.capacity_factor * choices * tokens / self.num_experts - CEILING_SLACK))

    def names(self) -> dict[str, int | str]:
        """Return what identifies the layer in a record."""
        named: dict[str, int | str] = {
            "tokens": self.tokens,
            "hidden": self.hidden,
            "inner": self.inner,
            "experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            "gated": int(self.is_gated),
            "router": self.router,
            "dispatch": self.dispatch,
        }
        if self.capacity_factor is not None:
            named |= {"capacity_factor": f"{self.capacity_factor:g}", "capacity_per": self.capacity_per}
        if self.group_tokens is not None:
            named["group_tokens"] = self.group_tokens
        return named


@dataclass(frozen=True, slots=True)
class Draw:
    """The rows of one layer in one step, the same in a measured and in a simulated run.

    Parameters
    ----------
    matrix : ndarray of shape (n_ranks, n_experts)
        Assignments from each rank to each expert.
    step : int
        Of the draw; preset W7 takes the first step that bursts.
    """

    matrix: npt.NDArray[np.int64]
    step: int

    def tokens_of(self, rank: int, experts_per_token: int) -> int:
        """Tokens of a rank."""
        return int(self.matrix[rank].sum()) // experts_per_token

    def received_rows(self) -> npt.NDArray[np.int64]:
        """Rows of each rank's experts, shape (n_ranks,), before any is dropped."""
        return np.asarray(self.matrix.sum(axis=0).reshape(len(self.matrix), -1).sum(axis=1), dtype=np.int64)


def drawn(preset: str, shape: ExpertLayerShape, *, num_ranks: int, layer: int, seed: int) -> Draw:
    """Draw the rows of one layer.

    Parameters
    ----------
    preset : str
        W0 to W7.
    shape : ExpertLayerShape
        Sizes.
    num_ranks : int
        Of the expert-parallel group.
    layer, seed : int
        Of the draw.

    Examples
    --------
    >>> drawn("W0", ExpertLayerShape(8, 4, 4, 4, 1), num_ranks=2, layer=0, seed=0).matrix.tolist()
    [[2, 2, 2, 2], [2, 2, 2, 2]]
    """
    step = bursting_step(seed) if preset == "W7" else 0
    matrix = draw(preset, shape.tokens, shape.num_experts, shape.experts_per_token, num_ranks, step, layer, seed)
    return Draw(matrix, step)


def rank_choices(routed: Draw, shape: ExpertLayerShape, *, rank: int, layer: int, seed: int) -> npt.NDArray[np.int64]:
    """Choices of the tokens of one rank, shape (n_tokens, experts_per_token), with the loads of its row of the draw.

    Parameters
    ----------
    routed : Draw
        Rows of all ranks.
    shape : ExpertLayerShape
        Sizes.
    rank : int
        Whose tokens.
    layer, seed : int
        Of the order of the tokens.
    """
    loads = routed.matrix[rank].tolist()
    return expert_choices(loads, shape.experts_per_token, seed=seed + SEEDS_PER_LAYER * layer + rank)
