"""NCCL's choice of algorithm and protocol against what NCCL is known to choose."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.collective_demands import FabricLevel, GroupTraffic
from moesim.cost.nccl_tuner import TREE_CORRECTION, nccl_choice

NODE = FabricLevel("node", 8, 450e9, False, False, False, 1e-6)
NETWORK = FabricLevel("network", 64, 50e9, False, False, False, 3e-6)


def chosen(kind, sizes, nodes, generation="hopper", devices=8.0):
    cases = np.array(sizes, dtype=float)
    extents = np.stack([np.full(len(cases), devices), np.full(len(cases), float(nodes))])
    return nccl_choice(kind, GroupTraffic(cases, extents), (NODE, NETWORK), generation)


def test_a_hopper_node_takes_ring_with_ll_to_1_mib_and_the_switch_from_2_mib():
    """As NCCL 2.27.7 reported on 8 H200 (ml-engineering, network benchmarks)."""
    choice = chosen("all_reduce", 2.0 ** np.arange(10, 31), 1)
    below = [
        way
        for way, size in zip(zip(choice.algorithm, choice.protocol, strict=True), range(10, 31), strict=True)
        if size <= 20
    ]
    assert set(below) == {("ring", "LL")}
    assert set(choice.algorithm[11:]) == {"nvls"}


@pytest.mark.parametrize("generation", ["volta", "ampere"])
def test_there_is_no_switch_reduction_before_hopper(generation):
    assert "nvls" not in chosen("all_reduce", 2.0 ** np.arange(3, 34), 1, generation).algorithm


def test_two_devices_do_not_reduce_in_the_switch():
    assert "nvls" not in chosen("all_reduce", 2.0 ** np.arange(3, 34), 1, devices=2.0).algorithm


def test_many_nodes_take_trees_for_short_and_rings_for_long_buffers():
    choice = chosen("all_reduce", [1024.0, 2.0**33], 8)
    assert choice.algorithm == ("tree", "ring")
    assert choice.protocol == ("LL", "Simple")


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
def test_gathers_take_rings_whose_latency_grows_with_the_ranks(kind):
    few, many = (chosen(kind, [8.0], nodes) for nodes in (2, 16))
    assert few.algorithm == many.algorithm == ("ring",)
    assert few.predicted_s[0] == pytest.approx((6.6 + 14 * 1.0 + 1 * 2.7) * 1e-6, rel=1e-4)
    assert many.predicted_s[0] == pytest.approx((6.6 + 112 * 1.0 + 15 * 2.7) * 1e-6, rel=1e-4)


def test_ring_latency_by_hand():
    """Two nodes of 8, LL: 6.6 + 14 x 1 (the network overhead exceeds 0.6 of NVLink) + 1 x 2.7 us."""
    ring = nccl_choice(
        "all_gather", GroupTraffic(np.array([1e-9]), np.array([[8.0], [2.0]])), (NODE, NETWORK), "hopper"
    )
    assert ring.predicted_s[0] == pytest.approx((6.6 + 14 * 1.0 + 1 * 2.7) * 1e-6, rel=1e-9)


def test_the_tree_correction_has_a_factor_for_each_power_of_two():
    assert TREE_CORRECTION.shape == (3, 24)
