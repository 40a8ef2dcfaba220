from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_scenarios import shipped_library

from moesim.cost.collective_demands import GroupTraffic
from moesim.cost.collectives import collective_time, fabric_rates
from moesim.cost.communication_libraries import FabricRates, LevelRates, Protocol, library_times, transfer_time_s
from moesim.structure.placement import ProcessGroup
from moesim.structure.step_graph import Collective, RoutedCopies

BANDWIDTH = 100e9
BULK = Protocol(20e-6, 2e-6, 0.0, 0.0, fraction=0.9, pipelining=0.5)
QUICK = Protocol(5e-6, 1e-6, 0.0, 0.0, fraction=0.5, pipelining=0.3)
SWITCH = Protocol(30e-6, 0.0, 0.0, 0.0, fraction=0.7, pipelining=1.0)


def node(**fields: object) -> FabricRates:
    level = LevelRates("node", 8, BANDWIDTH, False, False, False, 0.0, BULK, BULK, BULK)
    return FabricRates((dataclasses.replace(level, **fields),), 1)


def times(kind, sizes, fabric, *, ranks=8.0, copies=None):
    num_bytes = np.asarray(sizes, dtype=float)
    return library_times(kind, GroupTraffic(num_bytes, np.full((1, len(num_bytes)), ranks), copies), fabric).modelled_s


def test_a_transfer_in_the_best_number_of_chunks_is_latency_wire_and_their_root():
    """Of m chunks the last is not overlapped: t + t/m + m L is least at m = sqrt(t/L), t + 2 sqrt(t L)."""
    latency, wire = 4e-6, 9e-4
    chunks = np.arange(1, 1000)
    assert transfer_time_s(0.0, wire, 0.0) == wire
    least = (wire + wire / chunks + chunks * latency).min() + latency
    assert transfer_time_s(latency, wire, 2.0) == pytest.approx(least, rel=1e-3)


def test_ring_of_the_bulk_protocol_by_hand():
    """8 ranks, 7 rounds, 7/8 of the buffer at 90 GB/s."""
    latency, wire = 20e-6 + 7 * 2e-6, 7 / 8 * 1e8 / 90e9
    expected = latency + wire + 0.5 * np.sqrt(latency * wire)
    assert times("all_gather", [1e8], node())[0] == pytest.approx(expected, rel=1e-12)


def test_own_copy_counts_on_the_innermost_links():
    fabric = dataclasses.replace(node(), own_copy=0.5)
    latency, wire = 20e-6 + 7 * 2e-6, (7 / 8 + 0.5 / 8) * 1e8 / 90e9
    expected = latency + wire + 0.5 * np.sqrt(latency * wire)
    assert times("all_gather", [1e8], fabric)[0] == pytest.approx(expected, rel=1e-12)


def test_rings_leave_the_quick_protocol_where_a_chunk_takes_the_switch_time():
    """1 us at 100 GB/s is a chunk of 100 kB, 800 kB on 8 ranks: there time rises by a jump, as measured."""
    fabric = node(quick_reduction=QUICK, switch_s=1e-6)
    before, after = times("all_gather", [800e3, 801e3], fabric)
    latency, wire = 5e-6 + 7e-6, 7 / 8 * 800e3 / 50e9
    assert before == pytest.approx(latency + wire + 0.3 * np.sqrt(latency * wire), rel=1e-12)
    assert after == pytest.approx(times("all_gather", [801e3], node())[0], rel=1e-12)
    assert after > 1.5 * before


def test_a_longer_message_never_takes_less_where_the_bulk_protocol_is_faster_at_the_switch():
    fabric = node(quick_reduction=dataclasses.replace(QUICK, fraction=0.01), switch_s=1e-6)
    sizes = np.geomspace(1e3, 1e9, 300)
    assert (np.diff(times("all_reduce", sizes, fabric)) >= -1e-15).all()


@pytest.mark.parametrize(("ranks", "reduces"), [(4.0, False), (8.0, True)])
def test_the_switch_reduces_where_its_wire_time_is_least_and_the_domain_is_large(ranks, reduces):
    """8 devices: 9/8 n at 70 GB/s against 14/8 n at 90; four gain nothing and do not try."""
    fabric = node(in_switch=SWITCH, in_switch_s=1e-6)
    ring = times("all_reduce", [1e9], node(), ranks=ranks)[0]
    assert (times("all_reduce", [1e9], fabric, ranks=ranks)[0] < ring) == reduces


def test_an_all_to_all_takes_the_faster_protocol():
    slow_start = node(quick_exchange=dataclasses.replace(QUICK, fraction=0.05))
    small, large = times("all_to_all", [1e3, 1e9], slow_start)
    assert small < times("all_to_all", [1e3], node())[0]
    assert large == pytest.approx(times("all_to_all", [1e9], node())[0], rel=1e-12)


def test_levels_of_an_exchange_combine_by_their_exponent():
    """3 ms inside and 4 ms between make 5 ms at exponent 2."""
    ideal = Protocol(0.0, 0.0, 0.0, 0.0, fraction=1.0, pipelining=0.0)
    inner = LevelRates("node", 2, 0.25e9 / 3e-3, False, False, False, 0.0, ideal, ideal, ideal)
    outer = dataclasses.replace(inner, name="network", bandwidth=0.5e9 / 4e-3)
    traffic = GroupTraffic(np.array([1e9]), np.array([[2.0], [2.0]]))
    assert library_times("all_to_all", traffic, FabricRates((inner, outer), 1)).modelled_s[0] == pytest.approx(4e-3)
    squares = FabricRates((inner, outer), 1, levels_exponent=2.0)
    assert library_times("all_to_all", traffic, squares).modelled_s[0] == pytest.approx(5e-3)


def test_latency_of_kernels_grows_with_every_doubling_of_the_nodes():
    ideal = Protocol(0.0, 0.0, 0.0, 0.0, fraction=1.0, pipelining=0.0)
    inner = LevelRates("node", 8, 1e30, False, False, False, 0.0, ideal, ideal, ideal)
    outer = dataclasses.replace(inner, name="network", exchange=dataclasses.replace(ideal, doubling_s=25e-6))
    extents = np.array([[8.0, 8.0, 8.0], [1.0, 2.0, 32.0]])
    traffic = GroupTraffic(np.ones(3), extents, RoutedCopies(8.0, 4.0))
    found = library_times(
        "all_to_all", traffic, FabricRates((inner, outer), 1, exchange_algorithm="rail_aligned")
    ).modelled_s
    assert found * 1e6 == pytest.approx([0.0, 25.0, 125.0], abs=1e-6)


def shipped(cluster: str, stack: str) -> FabricRates:
    library = shipped_library()
    profile = library.cluster(cluster)
    return fabric_rates(profile, library.device(profile.device), library.stack(stack))


def seconds(kind, num_bytes, ranks, fabric):
    work = Collective(kind, np.array([num_bytes]), ProcessGroup(np.array([float(ranks)]), np.ones(1)))
    return float(collective_time(work, fabric).modelled_s[0])


def test_figures_of_nccl_tests_on_eight_h100():
    """Bus bandwidth that NVIDIA prints for large messages: 320 GB/s all-to-all, 480 all-reduce with NVLS."""
    fabric = shipped("h100_sxm_8", "megatron_core_nccl")
    size = 16 * 2.0**30
    all_to_all = 7 / 8 * size / seconds("all_to_all", size, 8, fabric) / 1e9
    all_reduce = 2 * 7 / 8 * size / seconds("all_reduce", size, 8, fabric) / 1e9
    assert all_to_all == pytest.approx(340, rel=0.15)
    assert all_reduce == pytest.approx(480, rel=0.15)
    assert seconds("all_to_all", 1024.0, 8, fabric) * 1e6 == pytest.approx(8.5, rel=0.2)


STACKS = ("megatron_core_nccl", "megatron_core_nccl_efa", "megatron_core_deepep")


@given(
    st.sampled_from([shipped("h100_sxm_hgx_nodes", stack) for stack in STACKS]),
    st.sampled_from(["all_to_all", "all_reduce", "all_gather", "reduce_scatter", "point_to_point"]),
    st.integers(1, 8),
    st.floats(1, 1e10),
    st.floats(1, 4),
)
def test_scaling_the_unit_of_time_scales_the_answer(fabric, kind, doublings, num_bytes, unit):
    """No constant of the formula has a unit: thresholds are times of the library."""

    def slower(protocol):
        if protocol is None:
            return None
        names = ("base_s", "round_s", "peer_s", "doubling_s")
        return dataclasses.replace(protocol, **{name: getattr(protocol, name) * unit for name in names})

    protocols = ("reduction", "exchange", "message", "quick_reduction", "quick_exchange", "in_switch")
    levels = tuple(
        dataclasses.replace(
            level,
            bandwidth=level.bandwidth / unit,
            hop_latency_s=level.hop_latency_s * unit,
            switch_s=level.switch_s * unit,
            in_switch_s=level.in_switch_s * unit,
            **{name: slower(getattr(level, name)) for name in protocols},
        )
        for level in fabric.levels
    )
    scaled = dataclasses.replace(fabric, levels=levels)
    before = seconds(kind, num_bytes, 2**doublings, fabric)
    assert seconds(kind, num_bytes, 2**doublings, scaled) == pytest.approx(unit * before, rel=1e-9)
