"""The symbolic executor finds every kind of broken plan."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moesim.errors import SimulationError
from moesim.structure.communication_plans import CommunicationPlan, Transfers
from moesim.structure.plan_execution import execute_symbolically

BLOCKS = np.array([4.0, 8.0])
BOTH_HAVE_0 = np.array([[0, 0], [0, 1]])
RANK_0_HAS_0 = np.array([[0, 0]])


def plan(*rounds, starts=BOTH_HAVE_0, ends=BOTH_HAVE_0, ranks=2):
    return CommunicationPlan(ranks, (tuple(rounds),), BLOCKS, starts=starts, ends=ends)


def test_a_sum_and_its_way_back_are_fine():
    add, back = Transfers.of([(1, 0, [0])], BLOCKS, adds=True), Transfers.of([(0, 1, [0])], BLOCKS)
    assert execute_symbolically(plan(add, back)) == [{0: 0b11}, {0: 0b11}]


def test_exchanging_sums_in_one_round_reads_what_was_there_before():
    both = Transfers.of([(1, 0, [0]), (0, 1, [0])], BLOCKS, adds=True)
    assert execute_symbolically(plan(both)) == [{0: 0b11}, {0: 0b11}]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (plan(Transfers.of([(1, 0, [0])], BLOCKS), starts=RANK_0_HAS_0), "does not have it"),
        (plan(Transfers.of([(1, 0, [0])], BLOCKS, adds=True)), "rank 1 ends with 10 of block 0, not with 11"),
        (plan(*[Transfers.of([(1, 0, [0])], BLOCKS, adds=True)] * 2), "twice"),
        (plan(Transfers.of([(1, 0, [0])], BLOCKS)), "overwrites"),
        (plan(starts=RANK_0_HAS_0), "rank 1 ends with 0 of block 0, not with 1"),
        (
            plan(dataclasses.replace(Transfers.of([(0, 1, [0])], BLOCKS), num_bytes=np.array([5.0]))),
            "carries blocks of 4",
        ),
        (
            dataclasses.replace(plan(), chains=((Transfers.of([(0, 1, [0])], BLOCKS, adds=True),),) * 2),
            "both carry block 0",
        ),
    ],
    ids=["not held", "not delivered", "counted twice", "lost", "missing", "bytes", "shared by chains"],
)
def test_a_broken_plan_is_found(broken, words):
    with pytest.raises(SimulationError, match=words):
        execute_symbolically(broken)
