"""All-to-all-v from any matrix, and tokens that are sent once per node."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from plan_timing import Links, load_of

from moesim.cost.collective_algorithms import algorithms_of
from moesim.cost.collective_algorithms.staged_exchanges import RailAlignedAllToAll, plan_of_tokens
from moesim.cost.collective_demands import Fabric, FabricLevel, GroupTraffic
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.plan_execution import execute_symbolically
from moesim.structure.step_graph import RoutedCopies

EXCHANGES = sorted(name for name, one in algorithms_of("all_to_all").items() if "switched" in one.links)


@pytest.mark.parametrize("name", EXCHANGES)
@settings(max_examples=20)
@given(matrix=arrays(np.float64, (6, 6), elements=st.sampled_from([0.0, 1.0, 3.0, 1e6])))
def test_any_matrix_of_bytes_arrives(name, matrix):
    plan = algorithms_of("all_to_all")[name].plan_of_matrix(matrix, GroupLayout.switched(3, 2))
    execute_symbolically(plan)
    arrived = np.zeros((6, 6))
    np.add.at(arrived, (plan.starts[:, 1], plan.ends[:, 1]), plan.block_bytes[plan.starts[:, 0]])
    np.testing.assert_array_equal(arrived, matrix)


def test_a_direct_exchange_moves_each_pair_once():
    matrix = np.arange(16.0).reshape(4, 4)
    plan = algorithms_of("all_to_all")["direct"].plan_of_matrix(matrix, GroupLayout.switched(4))
    assert plan.total_bytes == matrix.sum() - np.trace(matrix)


def test_aggregation_over_nodes_keeps_the_bytes_of_the_network():
    """Tutel's two stages send as much between nodes as the direct exchange, in k - 1 messages instead of n - g."""
    layout = GroupLayout.switched(4, 3)
    links = Links(layout, (0.0, 0.0), (1.0, 1.0))
    between = {}
    for name in ("direct", "hierarchical", "rail_aligned"):
        plan = algorithms_of("all_to_all")[name].plan(("all_to_all"), 12.0, layout)
        rounds = [transfers for chain in plan.chains for transfers in chain]
        loads = [load_of(links, transfers)[1] for transfers in rounds]
        sent = sum(value for load in loads for (link, level), value in load.items() if level == 1 and link[0] == "out")
        messages = sum(
            layout.coordinates[source, 1] != layout.coordinates[target, 1]
            for transfers in rounds
            for source, target in zip(transfers.source, transfers.target, strict=True)
        )
        between[name] = sent, messages
    assert between["direct"] == (pytest.approx(12 * 8), 12 * 8)
    assert between["hierarchical"] == between["rail_aligned"] == (pytest.approx(12 * 8), 12 * 2)


@pytest.mark.parametrize("extents", [(2, 2), (2, 3), (3, 2), (1, 4)])
@pytest.mark.parametrize("choices", [1, 2, 3])
@pytest.mark.parametrize("most_nodes", [1, 2, 9])
def test_mean_copies_over_all_choices_are_the_closed_form(extents, choices, most_nodes):
    """Every rank sends one token for each possible choice; nothing is drawn, so the mean is exact."""
    layout = GroupLayout.switched(*extents)
    size, nodes = extents
    ranks, sources, chosen = layout.num_ranks, [], []
    for source in range(ranks):
        for visited in combinations(range(nodes), min(most_nodes, nodes)):
            reachable = [node * size + device for node in visited for device in range(size)]
            for picks in product(reachable, repeat=choices):
                sources.append(source)
                chosen.append(picks)
    plan = plan_of_tokens(sources, chosen, 1.0, layout)
    execute_symbolically(plan)
    links = Links(layout, (0.0, 0.0), (1.0, 1.0))
    loads = [load_of(links, transfers)[1] for transfers in plan.chains[0]]
    busiest = [
        max([sum(load[link] for load in loads) for link in set().union(*loads) if link[1] == level], default=0.0)
        for level in (0, 1)
    ]
    levels = tuple(FabricLevel("level", extent, 1.0, False, False, False, 0.0) for extent in extents)
    tokens = len(sources) / ranks
    traffic = GroupTraffic(
        np.array([tokens * choices]), np.array(extents, dtype=float)[:, None], RoutedCopies(choices, most_nodes)
    )
    demand = RailAlignedAllToAll().demand("all_to_all", traffic, Fabric(levels, 1))
    assert busiest == pytest.approx([float(level.wire_bytes[0]) for level in demand.levels], rel=1e-12)
