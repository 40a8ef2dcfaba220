"""Symbolic execution of plans: does every rank end with what it must have? Data placement only, no time."""

from __future__ import annotations

import numpy as np

from moesim.errors import SimulationError
from moesim.structure.communication_plans import CommunicationPlan, Transfers

Holdings = list[dict[int, int]]
"""Per node (rank or switch): block -> set of the ranks whose contributions it holds, as bits."""


def execute_symbolically(plan: CommunicationPlan) -> Holdings:
    """Run a plan on symbols and check all that can be wrong with it.

    A sender must hold what it sends; a sum must not count a contribution twice; a stored block must not lose
    contributions that the receiver had; a transfer's bytes must be those of its blocks; chains must not share blocks;
    in the end every rank holds what the plan says it must.

    Parameters
    ----------
    plan : CommunicationPlan
        What to run.

    Returns
    -------
    list of dict
        What each rank, and then each switch, holds in the end.

    Raises
    ------
    SimulationError
        If the plan breaks one of these rules.

    Examples
    --------
    >>> blocks = np.array([8.0])
    >>> there = Transfers.of([(1, 0, [0])], blocks, adds=True)
    >>> back = Transfers.of([(0, 1, [0])], blocks)
    >>> both = np.array([[0, 0], [0, 1]])
    >>> execute_symbolically(CommunicationPlan(2, ((there, back),), blocks, starts=both, ends=both))
    [{0: 3}, {0: 3}]
    """
    holdings: Holdings = [{} for _ in range(plan.num_ranks + plan.num_switches)]
    whole: dict[int, int] = {}
    for block, rank in plan.starts.tolist():
        holdings[rank][block] = 1 << rank
        whole[block] = whole.get(block, 0) | 1 << rank
    chain_of_block: dict[int, int] = {}
    for index, chain in enumerate(plan.chains):
        for transfers in chain:
            _check_bytes(plan, transfers)
            for block in transfers.block_ids.tolist():
                if chain_of_block.setdefault(block, index) != index:
                    raise SimulationError(f"chains {chain_of_block[block]} and {index} both carry block {block}")
            _apply(holdings, transfers)
    for block, rank in plan.ends.tolist():
        if holdings[rank].get(block) != whole[block]:
            raise SimulationError(
                f"rank {rank} ends with {holdings[rank].get(block, 0):b} of block {block}, not with {whole[block]:b}"
            )
    return holdings


def _check_bytes(plan: CommunicationPlan, transfers: Transfers) -> None:
    for index in range(len(transfers)):
        expected = plan.block_bytes[transfers.blocks(index)].sum()
        if not np.isclose(transfers.num_bytes[index], expected, rtol=1e-12):
            raise SimulationError(f"a transfer of {transfers.num_bytes[index]:g} bytes carries blocks of {expected:g}")


def _apply(holdings: Holdings, transfers: Transfers) -> None:
    """One round: what is sent is what was held when the round began."""
    arriving = []
    for index in range(len(transfers)):
        source, target = int(transfers.source[index]), int(transfers.target[index])
        for block in transfers.blocks(index).tolist():
            if block not in holdings[source]:
                raise SimulationError(f"{source} sends block {block} to {target} and does not have it")
            arriving.append((target, block, holdings[source][block]))
    for target, block, sent in arriving:
        held = holdings[target].get(block, 0)
        if transfers.adds and held & sent:
            raise SimulationError(f"{target} adds contributions {held & sent:b} to block {block} twice")
        if not transfers.adds and held & ~sent:
            raise SimulationError(f"{target} overwrites contributions {held & ~sent:b} of block {block}")
        holdings[target][block] = held | sent
