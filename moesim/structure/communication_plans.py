"""Plans of collectives: who sends which data blocks to whom, in which order. Pure data, no seconds.

Ranks are 0 .. n - 1 within the group; numbers from n on are switches that reduce or copy on the way (NVLink SHARP).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from moesim.structure.columns import FloatArray, IntArray


@dataclass(frozen=True)
class Transfers:
    """Transfers that start together: one round of a chain.

    Attributes
    ----------
    source, target : ndarray of shape (n_transfers,)
        Ranks (or switches, from ``num_ranks`` on) that send and receive.
    num_bytes : ndarray of shape (n_transfers,)
        What each transfer carries.
    block_starts : ndarray of shape (n_transfers + 1,)
        Transfer ``t`` carries the blocks ``block_ids[block_starts[t]:block_starts[t + 1]]``.
    block_ids : ndarray of shape (n_carried,)
        Data blocks, numbered by the plan.
    adds : bool
        Whether the receiver adds what arrives to what it has (a reduction) instead of storing it.
    """

    source: IntArray
    target: IntArray
    num_bytes: FloatArray
    block_starts: IntArray
    block_ids: IntArray
    adds: bool = False

    @staticmethod
    def of(moves: Iterable[Move], block_bytes: FloatArray, *, adds: bool = False) -> Transfers:
        """Build a round from (source, target, blocks); a transfer's bytes are those of its blocks.

        Examples
        --------
        >>> Transfers.of([(0, 1, [0, 2])], np.array([1.0, 2.0, 4.0])).num_bytes.tolist()
        [5.0]
        """
        listed = list(moves)
        carried = [list(blocks) for _, _, blocks in listed]
        starts = np.concatenate(([0], np.cumsum([len(blocks) for blocks in carried], dtype=np.int64)))
        return Transfers(
            np.array([source for source, _, _ in listed], dtype=np.int64),
            np.array([target for _, target, _ in listed], dtype=np.int64),
            np.array([float(block_bytes[blocks].sum()) for blocks in carried], dtype=np.float64),
            starts.astype(np.int64),
            np.array([block for blocks in carried for block in blocks], dtype=np.int64),
            adds,
        )

    def __len__(self) -> int:
        return len(self.source)

    def blocks(self, transfer: int) -> IntArray:
        """Blocks that one transfer carries."""
        return self.block_ids[self.block_starts[transfer] : self.block_starts[transfer + 1]]


Chain = tuple[Transfers, ...]
Move = tuple[int, int, Sequence[int]]
"""Source, target and the blocks that go from one to the other."""


@dataclass(frozen=True)
class CommunicationPlan:
    """What a collective sends: chains run at the same time, the rounds of a chain one after another.

    A plan says itself what it is for: a block that several ranks start with is to be summed over them; whoever ends
    with it needs all of the sum.

    Attributes
    ----------
    num_ranks : int
        Members of the group.
    chains : tuple of tuple of Transfers
        A chain's round starts when its previous round has ended; chains have no blocks in common.
    block_bytes : ndarray of shape (n_blocks,)
        Size of each data block.
    num_switches : int
        Switches that take part, numbered from ``num_ranks`` on.
    starts, ends : ndarray of shape (n, 2)
        Block and rank: who has the block, or its contribution to it, before; who must have it after.
    """

    num_ranks: int
    chains: tuple[Chain, ...]
    block_bytes: FloatArray
    num_switches: int = 0
    starts: IntArray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    ends: IntArray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))

    @property
    def num_rounds(self) -> int:
        """Rounds of the longest chain."""
        return max((len(chain) for chain in self.chains), default=0)

    @property
    def total_bytes(self) -> float:
        """Bytes of all transfers together."""
        return float(sum(transfers.num_bytes.sum() for chain in self.chains for transfers in chain))
