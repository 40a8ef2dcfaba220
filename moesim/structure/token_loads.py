"""Token loads of expert-parallel groups, drawn per step, layer and group: rows sent and received, drops.

A draw is the token matrix of ``token_routing.draw``: assignments from each source rank to each expert. Matrices are
drawn one after the other and only their sums are kept, so that 2,048 ranks and experts need no more than one block of
rows at a time. NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.structure.placement import expert_mesh
from moesim.structure.token_routing import (
    EVEN_PRESETS,
    drawn_preset,
    drawn_shares,
    expert_shares,
    preset_shares,
    routed_rows,
    source_tokens,
)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

BLOCK_CELLS = 4_000_000
"""Cells of a token matrix that are drawn at a time: 32 MB."""
DROPS_STREAM = 1
"""Last word of the seed of what splits a rank's tokens into routing groups."""
DRAWN = "drawn"
"""Stands for a preset where rows are multinomial."""


@dataclass(frozen=True)
class LoadLaw:
    """How the loads of a layer are drawn: a kind of imbalance and its numbers, as ``expert_shares`` takes them.

    ``uniform`` is no draw: every expert gets the same, to within one token where it is counted in whole ones.
    """

    kind: str
    preset: str = "W0"
    exponent: float = 0.0
    concentration: float = 1.0
    loads: Sequence[float] = ()
    max_over_mean: float = 1.0

    @property
    def is_even(self) -> bool:
        """Whether all ranks have the mean load, exactly."""
        return self.kind == "uniform"

    def preset_of(self, step: int, seed: int) -> str:
        """Preset a step's rows are spread by: W0 where even, W7's burst or calm, ``DRAWN`` for what is no preset."""
        if self.kind == "preset":
            return drawn_preset(self.preset, step, seed)
        return "W0" if self.is_even else DRAWN

    def expected_shares(self, num_experts: int, num_ranks: int) -> FloatArray:
        """Shares to average over, shape (n_draws, num_experts), see ``expert_shares``."""
        return expert_shares(
            self.kind,
            num_experts,
            num_ranks,
            exponent=self.exponent,
            concentration=self.concentration,
            loads=self.loads,
            preset=self.preset,
            max_over_mean=self.max_over_mean,
        )

    def shares(self, sizes: GroupSizes, preset: str, step: int, generator: np.random.Generator) -> FloatArray:
        """Shares of the experts, shape (num_experts,)."""
        if preset != DRAWN:
            return preset_shares(preset, sizes.num_experts, sizes.num_ranks, step, generator)
        return drawn_shares(
            self.kind,
            sizes.num_experts,
            sizes.num_ranks,
            generator,
            exponent=self.exponent,
            concentration=self.concentration,
            loads=self.loads,
            max_over_mean=self.max_over_mean,
        )


@dataclass(frozen=True)
class GroupSizes:
    """The expert-parallel groups of one pipeline stage that run one layer.

    Attributes
    ----------
    tokens_per_rank : int
        Tokens a rank routes per micro-batch (mean, for ragged sources).
    num_experts, experts_per_token : int
        Experts of the layer, choices per token.
    num_ranks : int
        Ranks of a group, over which the experts divide.
    expert_data, expert_tensor : int
        Replicas of the experts, and ranks an expert is split over: as many groups, numbered replica * expert_tensor +
        shard.
    """

    tokens_per_rank: int
    num_experts: int
    experts_per_token: int
    num_ranks: int
    expert_data: int = 1
    expert_tensor: int = 1

    @property
    def num_groups(self) -> int:
        """Groups of the stage."""
        return self.expert_data * self.expert_tensor

    @property
    def mean_rows(self) -> int:
        """Assignments a rank sends, and receives where loads are even."""
        return self.tokens_per_rank * self.experts_per_token


@dataclass(frozen=True)
class TokenLoads:
    """Loads of several steps and layers; arrays (n_draws, n_layers, n_groups, ...).

    Attributes
    ----------
    sizes : GroupSizes
        Of the groups.
    expert_rows : ndarray of shape (n_draws, n_layers, n_groups, num_experts)
        Assignments each expert receives from the ranks of one group.
    sent_rows : ndarray of shape (n_draws, n_layers, n_groups, num_ranks)
        Assignments each rank makes.
    is_even : bool
        Whether factors are 1 whatever whole tokens make of them.
    """

    sizes: GroupSizes
    expert_rows: IntArray
    sent_rows: IntArray
    is_even: bool = False

    @property
    def received_rows(self) -> IntArray:
        """Assignments each rank receives from its group, shape (n_draws, n_layers, n_groups, num_ranks)."""
        shape = (*self.expert_rows.shape[:3], self.sizes.num_ranks, -1)
        return np.asarray(self.expert_rows.reshape(shape).sum(axis=4))

    def rows_factor(self) -> FloatArray:
        """Rows of a rank's experts over their mean, those of all shards of an expert-tensor group together."""
        received = self.received_rows
        if self.is_even:
            return np.ones(received.shape)
        replicas = (*received.shape[:2], self.sizes.expert_data, self.sizes.expert_tensor, self.sizes.num_ranks)
        summed = received.reshape(replicas).sum(axis=3, keepdims=True)
        whole = np.broadcast_to(summed, replicas).reshape(received.shape)
        return np.asarray(whole / (self.sizes.mean_rows * self.sizes.expert_tensor))

    def moved_factor(self) -> FloatArray:
        """Rows a rank sorts before it sends them and after it received them, over twice the mean."""
        if self.is_even:
            return np.ones(self.sent_rows.shape)
        return np.asarray((self.sent_rows + self.received_rows) / (2.0 * self.sizes.mean_rows))

    def exchange_factor(self) -> FloatArray:
        """Rows of a rank's all-to-all over the mean: the larger of sent and received."""
        if self.is_even:
            return np.ones(self.sent_rows.shape)
        return np.asarray(np.maximum(self.sent_rows, self.received_rows) / self.sizes.mean_rows)

    def max_over_mean(self) -> FloatArray:
        """Fullest rank over the mean in each draw and layer, shape (n_draws, n_layers)."""
        return np.asarray(self.rows_factor().max(axis=(2, 3)))


def group_generator(seed: int, step: int, layer: int, group: int) -> np.random.Generator:
    """Generator of one group: ``default_rng([seed, step, layer])`` for group 0, else with the group as fourth word."""
    words = [seed, step, layer] if group == 0 else [seed, step, layer, group]
    return np.random.default_rng(words)


def group_matrices(
    law: LoadLaw, sizes: GroupSizes, *, step: int, layer: int, seed: int, sources: int | None = None
) -> Iterator[Iterator[IntArray]]:
    """Token matrices of a layer in one step, group by group, each in blocks of source ranks.

    Parameters
    ----------
    law : LoadLaw
        What is drawn.
    sizes : GroupSizes
        Of the groups.
    step, layer, seed : int
        Of the draw; a layer counts from 0 in the model.
    sources : int, optional
        Only the first ranks of each group; all if None.

    Yields
    ------
    iterator of ndarray of shape (n_block, num_experts)
        Blocks of rows, in order; use each before the next.

    Raises
    ------
    ValueError
        If the experts do not divide over the ranks.

    Notes
    -----
    Shares belong to step and layer: all groups have the same router and see the same kind of text, so they share its
    popular experts. Tokens are each group's own: their rows come from ``group_generator``. Group 0 of a preset is
    ``token_routing.draw`` bit for bit; the choice of a burst is the step's.
    """
    if sizes.num_experts % sizes.num_ranks:
        raise ValueError(f"{sizes.num_experts} experts do not divide over {sizes.num_ranks} ranks")
    preset = law.preset_of(step, seed)
    first = group_generator(seed, step, layer, 0)
    tokens = source_tokens(preset, sizes.tokens_per_rank, sizes.num_ranks, first)
    share = law.shares(sizes, preset, step, first)
    for group in range(sizes.num_groups):
        generator = first
        if group:
            generator = group_generator(seed, step, layer, group)
            tokens = source_tokens(preset, sizes.tokens_per_rank, sizes.num_ranks, generator)
        yield _blocks(preset, share, (tokens * sizes.experts_per_token)[:sources], generator)


def _blocks(preset: str, share: FloatArray, totals: IntArray, generator: np.random.Generator) -> Iterator[IntArray]:
    """Rows of ``routed_rows``, a block at a time: even rows go on where the block before left off."""
    rows = max(1, BLOCK_CELLS // len(share))
    for start in range(0, len(totals), rows):
        block = routed_rows(preset, share, totals[start : start + rows], generator)
        before = int(totals[:start].sum()) % len(share)
        yield np.roll(block, before, axis=1) if preset in EVEN_PRESETS and before else block


def token_loads(
    law: LoadLaw, sizes: GroupSizes, *, steps: Sequence[int], layers: Sequence[int], seed: int
) -> TokenLoads:
    """Draw the loads of some layers in some steps.

    Parameters
    ----------
    law : LoadLaw
        What is drawn.
    sizes : GroupSizes
        Of the groups of a stage; the same for all layers.
    steps, layers : sequence of int
        Numbers of steps (a draw is a step) and of layers in the model.
    seed : int
        Of all draws; those of a step do not depend on which others are drawn.

    Returns
    -------
    TokenLoads
        Arrays (len(steps), len(layers), n_groups, ...).

    Examples
    --------
    >>> sizes = GroupSizes(tokens_per_rank=8, num_experts=4, experts_per_token=1, num_ranks=2)
    >>> loads = token_loads(LoadLaw("preset", preset="W2"), sizes, steps=range(2), layers=[0], seed=1)
    >>> loads.received_rows.tolist(), loads.rows_factor()[0].tolist()
    ([[[[16, 0]]], [[[16, 0]]]], [[[2.0, 0.0]]])
    """
    shape = (len(steps), len(layers), sizes.num_groups)
    received = np.zeros((*shape, sizes.num_experts), dtype=np.int64)
    sent = np.zeros((*shape, sizes.num_ranks), dtype=np.int64)
    for draw, step in enumerate(steps):
        for index, layer in enumerate(layers):
            groups = group_matrices(law, sizes, step=step, layer=layer, seed=seed)
            for group, blocks in enumerate(groups):
                _add_blocks(blocks, received[draw, index, group], sent[draw, index, group])
    return TokenLoads(sizes, received, sent, law.is_even)


def _add_blocks(blocks: Iterator[IntArray], received: IntArray, sent: IntArray) -> None:
    start = 0
    for block in blocks:
        received += block.sum(axis=0)
        sent[start : start + len(block)] = block.sum(axis=1)
        start += len(block)


@dataclass(frozen=True)
class Slots:
    """Capacity of an expert: ``slots`` for each of a rank's ``routing_groups`` equal groups of tokens."""

    slots: float
    routing_groups: int = 1


@dataclass(frozen=True)
class TokenDrops:
    """Assignments made, served and dropped; arrays (n_draws, n_layers) of whole numbers over the ranks that were drawn.

    ``kept + dropped == assigned``.
    """

    assigned: IntArray
    kept: IntArray
    dropped: IntArray

    def dropped_fraction(self) -> FloatArray:
        """Share of the assignments beyond their expert's slots, shape (n_draws, n_layers)."""
        return np.asarray(self.dropped / np.maximum(self.assigned, 1))


def token_drops(
    law: LoadLaw,
    sizes: GroupSizes,
    capacity: Slots,
    *,
    steps: Sequence[int],
    layers: Sequence[int],
    seed: int,
    sources: int | None = None,
) -> TokenDrops:
    """Count what experts with a fixed number of slots drop.

    Parameters
    ----------
    law : LoadLaw
        What is drawn.
    sizes : GroupSizes
        Of the groups of a stage.
    capacity : Slots
        Slots of an expert for each routing group of a rank, see ``lowering_moe.slots_per_expert``.
    steps, layers : sequence of int
        As for :func:`token_loads`.
    seed : int
        Of all draws.
    sources : int, optional
        Ranks of each group that are drawn; their tokens do not depend on the others'. All if None.

    Returns
    -------
    TokenDrops
        Sums over the groups and their first ``sources`` ranks.

    Notes
    -----
    An expert's slots for a routing group serve the first assignments of that group; what exceeds them is dropped. A
    rank's tokens fall into its routing groups at random: given the rank's assignments to each expert, those of a group
    are multivariate hypergeometric.

    Examples
    --------
    A hot rank takes 4 of 4 tokens of each rank; two experts with one slot each serve 2:

    >>> sizes = GroupSizes(tokens_per_rank=4, num_experts=4, experts_per_token=1, num_ranks=2)
    >>> drops = token_drops(LoadLaw("preset", preset="W2"), sizes, Slots(1), steps=[0], layers=[0], seed=3)
    >>> int(drops.assigned[0, 0]), int(drops.kept[0, 0]), int(drops.dropped[0, 0])
    (8, 4, 4)
    """
    assigned = np.zeros((len(steps), len(layers)), dtype=np.int64)
    kept = np.zeros_like(assigned)
    slots = int(capacity.slots)
    for draw, step in enumerate(steps):
        for index, layer in enumerate(layers):
            matrices = group_matrices(law, sizes, step=step, layer=layer, seed=seed, sources=sources)
            for group, blocks in enumerate(matrices):
                splitter = np.random.default_rng([seed, step, layer, group, DROPS_STREAM])
                for block in blocks:
                    assigned[draw, index] += block.sum()
                    for part in _routing_groups(block, capacity.routing_groups, splitter):
                        kept[draw, index] += np.minimum(part, slots).sum()
    return TokenDrops(assigned, kept, assigned - kept)


def _routing_groups(block: IntArray, groups: int, generator: np.random.Generator) -> Iterator[IntArray]:
    """Split every rank's assignments into routing groups of equal size, to within one; (n_block, num_experts) each."""
    left = block.copy()
    for remaining in range(groups, 1, -1):
        sizes = left.sum(axis=1) // remaining
        part = np.stack(
            [
                generator.multivariate_hypergeometric(row, int(size), method="marginals")
                for row, size in zip(left, sizes, strict=True)
            ]
        )
        left -= part
        yield part
    yield left


def expert_group_members(rank_order: Sequence[str], sizes: GroupSizes) -> IntArray:
    """Ranks of each expert-parallel group of a stage.

    Parameters
    ----------
    rank_order : sequence of str
        Mesh dimensions of the scenario, fastest first.
    sizes : GroupSizes
        Degrees of the expert mesh.

    Returns
    -------
    ndarray of shape (n_groups, num_ranks)
        Numbers within the stage: global ranks of one pipeline coordinate, in rising order.

    Examples
    --------
    >>> sizes = GroupSizes(1, 4, 1, num_ranks=2, expert_data=2)
    >>> expert_group_members(["tensor", "context", "expert", "data", "pipeline"], sizes).tolist()
    [[0, 1], [2, 3]]
    """
    degree = {"expert": sizes.num_ranks, "expert_data": sizes.expert_data, "expert_tensor": sizes.expert_tensor}
    mesh = [name for name in expert_mesh(rank_order) if name != "pipeline"]
    stride, strides = 1, {}
    for name in mesh:
        strides[name] = stride
        stride *= degree[name]
    steps = {name: np.arange(degree[name]) * strides[name] for name in mesh}
    first = steps["expert_data"][:, None] + steps["expert_tensor"][None, :]
    return np.asarray(first.reshape(-1, 1) + steps["expert"][None, :], dtype=np.int64)


@dataclass(frozen=True)
class RankLoads:
    """Loads over the mean of the ranks of a stage, arrays (n_layers, n_draws, n_ranks) or (1, 1, 1) where all are 1.

    Attributes
    ----------
    rows : ndarray
        Rows of a rank's experts.
    moved : ndarray
        Rows it sorts for sending and after receiving.
    exchanged : ndarray
        Rows of the busiest rank of its all-to-all, which ends for all of them when it ends for that one.
    """

    rows: FloatArray
    moved: FloatArray
    exchanged: FloatArray

    @staticmethod
    def even() -> RankLoads:
        """Mean load everywhere, exactly: also that of stacks that pad to full slots."""
        one = np.ones((1, 1, 1))
        return RankLoads(one, one, one)


def rank_loads(loads: TokenLoads, members: IntArray) -> RankLoads:
    """Loads of the ranks of a stage.

    Parameters
    ----------
    loads : TokenLoads
        Of the stage's groups.
    members : ndarray of shape (n_groups, num_ranks)
        Ranks of the groups within the stage, from :func:`expert_group_members`.
    """
    if loads.is_even:
        return RankLoads.even()
    busiest = loads.exchange_factor().max(axis=3, keepdims=True)
    factors = (loads.rows_factor(), loads.moved_factor(), np.broadcast_to(busiest, loads.sent_rows.shape))
    return RankLoads(*(by_stage_rank(factor, members).swapaxes(0, 1) for factor in factors))


def by_stage_rank(values: FloatArray, members: IntArray) -> FloatArray:
    """Reorder (..., n_groups, num_ranks) to (..., ranks of the stage)."""
    ordered = np.empty((*values.shape[:-2], members.size), dtype=values.dtype)
    ordered[..., members.ravel()] = values.reshape(*values.shape[:-2], -1)
    return ordered
