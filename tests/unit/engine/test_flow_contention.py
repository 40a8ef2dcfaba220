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
from moesim.estimation.estimate import estimate
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


def test_an_estimate_by_closed_form_loads_neither_networkx_nor_scipy():
    code = (
        "import sys, moesim; moesim.estimate('mixtral_8x7b'); "
        "sys.exit(sum(name in sys.modules for name in ('networkx', 'scipy', 'moesim.engine.flow_contention')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
