"""Contention of collectives on the real wires: 1 where devices have links of their own, more where groups meet."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from moesim.cost.collectives import fabric_rates
from moesim.describe.hardware import FatTree
from moesim.describe.hardware_library import HardwareLibrary
from moesim.engine.flow_contention import FlowContention
from moesim.estimation.estimate import estimate, estimate_loaded, with_network
from moesim.estimation.loading import load
from moesim.structure.placement import ProcessGroup

LIBRARY = HardwareLibrary()
KINDS = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter", "point_to_point")


def contention(name, stack, ranks, *, oversubscription=None):
    cluster = LIBRARY.cluster(name)
    if oversubscription is not None:
        wiring = FatTree(
            shape="fat_tree",
            domains_per_leaf=2,
            leaf_oversubscription={"value": oversubscription, "kind": "assumed", "source": "test"},
            is_rail_optimised=False,
            source="test",
        )
        inner, outer = cluster.fabric.levels
        levels = [inner, outer.model_copy(update={"wiring": wiring})]
        cluster = cluster.model_copy(update={"fabric": cluster.fabric.model_copy(update={"levels": levels})})
    device = LIBRARY.device(cluster.device)
    return FlowContention(cluster, device, fabric_rates(cluster, device, LIBRARY.stack(stack)), ranks)


def factor(of, kind, size, stride=1):
    return float(of(kind, ProcessGroup(np.array([float(size)]), np.array([float(stride)])))[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "stride"), [(8, 1), (64, 1), (8, 8), (16, 4)])
def test_a_rail_optimised_network_without_oversubscription_has_none(kind, size, stride):
    of = contention("h100_sxm_hgx_nodes", "megatron_core_nccl", 64)
    assert factor(of, kind, size, stride) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_contiguous_groups_on_a_torus_have_none(kind):
    of = contention("tpu_v4_8x8x8", "xla_gspmd_modern", 512)
    assert factor(of, kind, 64) == pytest.approx(1.0, abs=1e-6)
    assert factor(of, kind, 512) == pytest.approx(1.0, abs=1e-6)


def test_strided_groups_of_a_torus_axis_share_its_links():
    """Every second chip of an axis: a step passes two links, and two groups do so at once: twice the bytes per link."""
    of = contention("tpu_v4_8x8x8", "xla_gspmd_modern", 512)
    assert factor(of, "all_gather", 4, 2) == pytest.approx(2.0, rel=1e-6)
    assert factor(of, "point_to_point", 4, 2) == pytest.approx(2.0, rel=1e-6)


def test_oversubscribed_leaves_slow_what_crosses_them():
    """4 nodes, 2 per leaf, 4:1: of what leaves a node 2/3 leaves the leaf, over a quarter of the bandwidth: 8/3."""
    of = contention("h100_sxm_hgx_nodes", "megatron_core_nccl", 32, oversubscription=4.0)
    assert factor(of, "all_to_all", 32) == pytest.approx(8 / 3, rel=1e-3)
    assert factor(of, "all_to_all", 8) == pytest.approx(1.0, abs=1e-6)
    assert factor(of, "all_to_all", 16) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "share"), [("all_to_all", 0.8), ("all_gather", 0.5), ("all_reduce", 0.5), ("point_to_point", 1.0)]
)
def test_groups_across_the_ends_of_nodes_wait_for_those_that_cross(kind, share):
    """6 of 8, closed form: all in one node. On the wires ranks 6 and 7 send 4/6 of an exchange out, not 5/6 inside.

    Reductions run two rings, as many as the smaller part has members.
    """
    of = contention("h100_sxm_hgx_nodes", "megatron_core_nccl", 24)
    inside, outside = of._bandwidths(kind)
    assert factor(of, kind, 6) == pytest.approx(share * inside / outside, rel=1e-6)


def test_where_a_closed_form_counts_two_full_nodes_the_smaller_part_sends_more_of_it_out():
    """12 of 8 is counted as two nodes of 8, half of all bytes out; of 8 + 4 the four send 8/12 out."""
    of = contention("h100_sxm_hgx_nodes", "megatron_core_nccl", 24)
    assert factor(of, "all_to_all", 12) == pytest.approx((8 / 12) / (8 / 16), rel=1e-6)
    assert factor(of, "all_gather", 12) == pytest.approx((11 / 12 / 4) / (15 / 16 / 8), rel=1e-6)


def test_factors_have_the_shape_of_the_groups():
    of = contention("tpu_v4_8x8x8", "xla_gspmd_modern", 512)
    factors = of("all_gather", ProcessGroup(np.array([[4.0], [8.0]]), np.array([[1.0, 2.0, 1.0]])))
    assert factors.shape == (2, 3)
    assert factors[0].tolist() == pytest.approx([1.0, 2.0, 1.0], rel=1e-6)


def test_an_estimate_says_how_its_network_was_priced():
    closed, flow = estimate("switch_xxl"), estimate("switch_xxl", network="flow")
    assert (closed.to_json()["network"], flow.to_json()["network"]) == ("closed", "flow")
    assert flow.step_time_s > closed.step_time_s
    assert flow.lower_s == closed.lower_s


def test_groups_across_ends_are_warned_of_by_closed_form_and_timed_on_the_wires():
    changes = ("devices=48", "parallelism.data=12", "parallelism.expert=4", "workload.sequences_per_step=240")
    scenario = load("mixtral_8x7b", assignments=changes, library=LIBRARY)
    closed, flow = estimate_loaded(scenario), estimate_loaded(with_network(scenario, "flow"))
    assert "W-NET-001" in [warning.code for warning in closed.warnings]
    assert "W-NET-001" not in [warning.code for warning in flow.warnings]
    assert flow.step_time_s != closed.step_time_s


def test_an_estimate_by_closed_form_loads_neither_networkx_nor_scipy():
    code = (
        "import sys, moesim; moesim.estimate('mixtral_8x7b'); "
        "sys.exit(sum(name in sys.modules for name in ('networkx', 'scipy', 'moesim.engine.flow_contention')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
