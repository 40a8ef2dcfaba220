"""Wire and latency of collectives: together the library's time, the wire that of its algorithm."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from moesim.cost.collective_algorithms import algorithms_of
from moesim.cost.collective_demands import GroupTraffic
from moesim.cost.collectives import collective_time, fabric_rates, required_tiers
from moesim.cost.communication_libraries import FabricRates, transfer
from moesim.cost.link_occupancy import link_occupancy
from moesim.describe.hardware_library import HardwareLibrary
from moesim.structure.placement import ProcessGroup, group_extents
from moesim.structure.step_graph import Collective

KINDS = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter", "broadcast", "point_to_point")
SIZES = np.array([2.0, 4.0, 8.0, 16.0, 64.0, 8.0, 4.0])
STRIDES = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 8.0, 4.0])


@lru_cache
def fabrics() -> dict[str, FabricRates]:
    """Every stack on the first shipped cluster of 64 devices or more that it has constants for."""
    library, found = HardwareLibrary(), {}
    for cluster_name in library.names("clusters"):
        cluster = library.cluster(cluster_name)
        for stack_name in library.names("stacks"):
            stack = library.stack(stack_name)
            if cluster.device_count >= 64 and required_tiers(cluster) <= set(stack.collectives):
                found.setdefault(stack_name, fabric_rates(cluster, library.device(cluster.device), stack))
    assert len(found) > 10
    return found


def collectives(kind: str) -> Collective:
    num_bytes = np.geomspace(1e2, 1e9, 36)[:, None]
    groups = ProcessGroup(*(np.broadcast_to(one, (36, len(SIZES))).ravel() for one in (SIZES, STRIDES)))
    return Collective(kind, np.broadcast_to(num_bytes, (36, len(SIZES))).ravel(), groups)


@pytest.mark.parametrize("kind", KINDS)
def test_latency_and_wire_make_the_librarys_time(kind):
    for fabric in fabrics().values():
        occupancy = link_occupancy(collectives(kind), fabric)
        modelled_s = collective_time(collectives(kind), fabric).modelled_s
        np.testing.assert_array_equal(occupancy.time_s, modelled_s)
        np.testing.assert_allclose(occupancy.latency_s + occupancy.wire_s, modelled_s, rtol=1e-12)
        assert (occupancy.latency_s >= 0.0).all()
        assert (occupancy.level_s <= occupancy.wire_s).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_message_is_wire_and_a_short_one_latency(kind):
    for fabric in fabrics().values():
        occupancy = link_occupancy(collectives(kind), fabric)
        share = (occupancy.wire_s / occupancy.time_s).reshape(36, -1)
        assert (share[0] < 0.25).all()
        assert (share[-1] > 0.6).all()


def test_an_exchange_within_a_node_leaves_the_network_alone():
    occupancy = link_occupancy(collectives("all_to_all"), fabrics()["megatron_core_nccl"])
    level_s = occupancy.level_s.reshape(-1, 36, len(SIZES))
    assert (level_s[1:, :, :3] == 0.0).all()
    assert (level_s[1, :, 3:] > 0.0).all()


def test_flows_are_the_peers_of_the_busiest_level():
    occupancy = link_occupancy(collectives("all_to_all"), fabrics()["megatron_core_nccl"])
    assert occupancy.flows.reshape(36, -1)[-1].tolist() == [1.0, 3.0, 7.0, 8.0, 56.0, 7.0, 2.0]
    assert (link_occupancy(collectives("all_gather"), fabrics()["megatron_core_nccl"]).flows == 1.0).all()


def test_the_wire_is_that_of_the_algorithm_which_takes_the_time():
    """Where the library's time is the ring's or the tree's, so are wire and levels."""
    fabric = fabrics()["megatron_core_nccl"]
    work = collectives("all_reduce")
    occupancy = link_occupancy(work, fabric)
    traffic = GroupTraffic(work.num_bytes, group_extents(work.group, fabric.sizes))
    protocols = [level.reduction for level in fabric.levels]
    seen = {}
    for name in ("ring", "tree"):
        demand = algorithms_of("all_reduce")[name].demand("all_reduce", traffic, fabric)
        taken = transfer(demand, protocols, traffic, fabric)
        is_taken = np.abs(taken.time_s - occupancy.time_s) <= 1e-12 * occupancy.time_s
        np.testing.assert_allclose(occupancy.wire_s[is_taken], taken.wire_s[is_taken], rtol=1e-9)
        seen[name] = int(is_taken.sum())
    assert min(seen.values()) > 5
