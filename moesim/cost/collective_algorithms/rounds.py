"""Parts of plans: rounds of moves, their duals, and plans built from them.

Only spreading is written out. The dual of a spread (rounds reversed, sources and targets exchanged, adding instead of
storing) reduces along the same paths, so reduce-scatter is the dual of all-gather and reduce that of broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.communication_plans import Chain, CommunicationPlan, Move, Transfers
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.step_graph import CollectiveKind

Rounds = list[list[Move]]
BlocksOf = Callable[[int, int], Sequence[int]]
"""Blocks that the k-th member of a line contributes: (first rank of the line, k) -> blocks."""


def spread_chain(rounds: Rounds, block_bytes: FloatArray) -> Chain:
    """Chain that stores: all-gather or broadcast."""
    return tuple(Transfers.of(moves, block_bytes) for moves in rounds if moves)


def reduce_chain(rounds: Rounds, block_bytes: FloatArray) -> Chain:
    """Chain that adds along the reversed paths of a spread."""
    reversed_rounds = [[(target, source, blocks) for source, target, blocks in moves] for moves in reversed(rounds)]
    return tuple(Transfers.of(moves, block_bytes, adds=True) for moves in reversed_rounds if moves)


def chain_of(kind: CollectiveKind, rounds: Rounds, block_bytes: FloatArray) -> Chain:
    """Chain of a collective whose spreading rounds are given: all_reduce reduces, then spreads."""
    reduce = reduce_chain(rounds, block_bytes) if kind in ("all_reduce", "reduce_scatter") else ()
    spread = spread_chain(rounds, block_bytes) if kind != "reduce_scatter" else ()
    return reduce + spread


def plan_of(
    kind: CollectiveKind, num_ranks: int, chains: Iterable[Rounds], block_bytes: FloatArray, *, owners: IntArray
) -> CommunicationPlan:
    """Build the plan of a reduction, gather or broadcast; ``owners`` (n_blocks,) gather from or scatter to."""
    blocks = np.arange(len(block_bytes))
    owned = np.stack([blocks, owners], axis=1)
    everywhere = np.stack([np.repeat(blocks, num_ranks), np.tile(np.arange(num_ranks), len(blocks))], axis=1)
    starts = owned if kind in ("all_gather", "broadcast") else everywhere
    ends = owned if kind == "reduce_scatter" else everywhere
    built = tuple(chain_of(kind, rounds, block_bytes) for rounds in chains)
    chosen = tuple(chain for chain in built if chain)
    return CommunicationPlan(num_ranks, chosen, block_bytes, starts=starts, ends=ends)


def side_by_side(parts: Iterable[Rounds]) -> Rounds:
    """Rounds of independent parts at the same time."""
    merged: Rounds = []
    for rounds in parts:
        while len(merged) < len(rounds):
            merged.append([])
        for index, moves in enumerate(rounds):
            merged[index] += moves
    return merged


def shards_of(layout: GroupLayout, level: int, inner: Sequence[int]) -> BlocksOf:
    """Shards that a member of a line has before an all-gather along ``level``, ``inner`` levels still to come.

    Shard b belongs to rank b. The k-th member has those whose position is k along the level, the line's own on the
    levels to come, and any on those gathered already.
    """
    coordinates = layout.coordinates

    def blocks(first: int, member: int) -> Sequence[int]:
        same = (coordinates[:, inner] == coordinates[first, inner]).all(axis=1)
        found: list[int] = np.flatnonzero(same & (coordinates[:, level] == member)).tolist()
        return found

    return blocks


def ring_gather(line: IntArray, blocks: BlocksOf, step: int = 1) -> Rounds:
    """All-gather on a ring: e - 1 rounds, in each of which everyone passes on what came last."""
    size, first = len(line), int(line[0])
    return [
        [
            (int(line[k]), int(line[(k + step) % size]), list(blocks(first, (k - step * turn) % size)))
            for k in range(size)
        ]
        for turn in range(size - 1)
    ]


def line_gather(line: IntArray, blocks: BlocksOf) -> Rounds:
    """All-gather on a line without its closing link: everything flows to both ends, e - 1 rounds."""
    size, first = len(line), int(line[0])
    rounds: Rounds = []
    for turn in range(size - 1):
        up: list[Move] = [
            (int(line[k]), int(line[k + 1]), list(blocks(first, k - turn))) for k in range(turn, size - 1)
        ]
        down: list[Move] = [
            (int(line[k]), int(line[k - 1]), list(blocks(first, k + turn))) for k in range(1, size - turn)
        ]
        rounds.append(up + down)
    return rounds


def level_gather(layout: GroupLayout, level: int, first_half: BlocksOf, second_half: BlocksOf) -> Rounds:
    """All-gather along one level, all lines at once; a closed axis of a torus sends a half of the blocks each way."""

    def both(first: int, member: int) -> Sequence[int]:
        return [*first_half(first, member), *second_half(first, member)]

    parts: list[Rounds] = []
    for line in layout.lines(level):
        if layout.is_ring[level] and not layout.closes[level]:
            parts.append(line_gather(line, both))
        elif layout.is_ring[level]:
            parts += [ring_gather(line, first_half), ring_gather(line, second_half, step=-1)]
        else:
            parts.append(ring_gather(line, both))
    return side_by_side(parts)


def numbered_from(offset: int, blocks: BlocksOf) -> BlocksOf:
    """The same blocks, numbered from ``offset`` on."""
    return lambda first, member: [offset + block for block in blocks(first, member)]


def staged_gather(layout: GroupLayout, inner_to_outer: Sequence[int], offset: int) -> Rounds:
    """All-gather level by level, outermost first; shard b has the halves ``offset + b`` and ``offset + n + b``."""
    rounds: Rounds = []
    for place in reversed(range(len(inner_to_outer))):
        level = inner_to_outer[place]
        shards = shards_of(layout, level, list(inner_to_outer[:place]))
        halves = numbered_from(offset, shards), numbered_from(offset + layout.num_ranks, shards)
        rounds += level_gather(layout, level, *halves)
    return rounds
