from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_scenarios import shipped_library

from moesim.cost.collectives import collective_time, fabric_rates, required_tiers
from moesim.cost.communication_libraries import FabricRates, LevelRates, Protocol
from moesim.structure.placement import ProcessGroup
from moesim.structure.step_graph import Collective, RoutedCopies

KINDS = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter", "point_to_point")
ALPHA, BASE = 2e-6, 5e-6
IDEAL = Protocol(0.0, 0.0, 0.0, 0.0, fraction=1.0, pipelining=0.0)


def switched(
    size: int,
    bandwidth: float,
    *,
    base_s: float = 0.0,
    round_s: float = 0.0,
    peer_s: float = 0.0,
    **fields: object,
) -> LevelRates:
    plain = LevelRates(
        name="switch",
        size=size,
        bandwidth=bandwidth,
        is_ring=False,
        wraps=False,
        all_to_all_wraps=False,
        hop_latency_s=0.0,
        reduction=dataclasses.replace(IDEAL, base_s=base_s, round_s=round_s),
        exchange=dataclasses.replace(IDEAL, base_s=base_s, peer_s=peer_s),
        message=dataclasses.replace(IDEAL, base_s=round_s),
    )
    return dataclasses.replace(plain, **fields)


def torus(sizes: list[int], *, wraps: bool, bandwidth: float = 1e9) -> FabricRates:
    axes = tuple(switched(n, bandwidth, is_ring=True, wraps=wraps, all_to_all_wraps=wraps) for n in sizes)
    return FabricRates(axes, 1)


def seconds(kind, num_bytes, ranks, fabric, *, stride=1, copies=None) -> float:
    group = ProcessGroup(np.array([float(ranks)]), np.array([float(stride)]))
    work = Collective(kind, np.array([float(num_bytes)]), group, copies)
    return float(collective_time(work, fabric).modelled_s[0])


TWO_LEVELS = FabricRates((switched(8, 100e9, peer_s=1e-6), switched(64, 10e9, peer_s=3e-6)), 1)


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
@pytest.mark.parametrize("num_bytes", [8.0, 1e6, 1e9])
def test_all_reduce_on_a_switch_is_the_ring_formula(ranks, num_bytes):
    fabric = FabricRates((switched(64, 50e9, round_s=ALPHA, base_s=BASE),), 1)
    expected = 2 * (ranks - 1) * (ALPHA + num_bytes / (ranks * 50e9)) + BASE
    assert seconds("all_reduce", num_bytes, ranks, fabric) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
def test_all_gather_and_reduce_scatter_are_half_an_all_reduce(kind):
    fabric = FabricRates((switched(16, 50e9, round_s=ALPHA),), 1)
    assert 2 * seconds(kind, 1e8, 16, fabric) == pytest.approx(seconds("all_reduce", 1e8, 16, fabric), rel=1e-12)


def test_all_reduce_on_two_levels_takes_the_ring_where_a_tree_sends_more():
    """64 ranks, 8 per node: a ring sends 2 * 63/64 n/8 by each NIC, a tree 2 n/8."""
    assert seconds("all_reduce", 8e8, 64, TWO_LEVELS) == pytest.approx(2 * 63 / 64 * 1e8 / 10e9, rel=1e-12)


def test_all_reduce_on_two_nodes_takes_the_tree_which_sends_half():
    assert seconds("all_reduce", 8e8, 16, TWO_LEVELS) == pytest.approx(2 * 7 / 8 * 8e8 / 100e9, rel=1e-12)
    slow = FabricRates((switched(8, 1e15), switched(64, 10e9)), 1)
    assert seconds("all_reduce", 8e8, 16, slow) == pytest.approx(1e8 / 10e9, rel=1e-12)


def test_all_to_all_on_two_levels_by_hand():
    """64 ranks, 640 MB each: 56/64 of it leave the node at 10 GB/s: 56 ms. 7 near peers, 56 far ones."""
    expected = 560e6 / 10e9 + 7 * 1e-6 + 56 * 3e-6
    assert seconds("all_to_all", 640e6, 64, TWO_LEVELS) == pytest.approx(expected, rel=1e-12)


def test_all_to_all_with_a_stride_of_a_node_uses_the_network_only():
    """8 ranks in 8 nodes: 7/8 of the buffer at 10 GB/s."""
    expected = 80e6 * 7 / 8 / 10e9 + 7 * 3e-6
    assert seconds("all_to_all", 80e6, 8, TWO_LEVELS, stride=8) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("chips", [4, 8, 16])
def test_torus_all_to_all_loads_a_link_with_an_eighth_of_n_buffers(chips):
    """Half of N * V bytes cross the middle of a ring: 4 links in both directions carry N V / 8 each."""
    fabric = torus([chips], wraps=True)
    assert seconds("all_to_all", 1e9, chips, fabric) == pytest.approx(chips / 8, rel=1e-12)


@pytest.mark.parametrize(("chips", "load"), [(4, 1.0), (5, 6 / 5), (8, 2.0), (9, 20 / 9)])
def test_mesh_all_to_all_loads_the_middle_link_with_a_quarter_of_n_buffers(chips, load):
    """floor(N/2) chips send ceil(N/2)/N of their buffer over the middle link: N/4 for even N."""
    fabric = torus([chips], wraps=False)
    assert seconds("all_to_all", 1e9, chips, fabric) == pytest.approx(load, rel=1e-12)


def test_a_part_of_a_torus_axis_has_no_wraparound():
    fabric = torus([16], wraps=True)
    assert seconds("all_to_all", 1e9, 8, fabric) == pytest.approx(8 / 4, rel=1e-12)
    assert seconds("all_to_all", 1e9, 16, fabric) == pytest.approx(16 / 8, rel=1e-12)


def test_all_reduce_on_a_torus_uses_both_directions_of_a_closed_ring():
    closed, line = torus([8], wraps=True), torus([8], wraps=False)
    assert seconds("all_reduce", 1e9, 8, closed) == pytest.approx(2 * 7 / 8 / 2, rel=1e-12)
    assert seconds("all_reduce", 1e9, 8, line) == pytest.approx(2 * 7 / 8, rel=1e-12)


def test_both_cores_of_a_chip_share_its_links():
    one = FabricRates((switched(8, 1e9, is_ring=True),), 1)
    two = FabricRates((switched(2, 1e12), switched(8, 1e9, is_ring=True)), 2)
    per_chip = seconds("all_to_all", 1e9, 8, one)
    assert seconds("all_to_all", 0.5e9, 16, two) == pytest.approx(per_chip, rel=1e-12)


@pytest.mark.parametrize("nodes", [2, 4, 8, 16])
@pytest.mark.parametrize("choices", [1, 2, 8])
def test_one_copy_per_node_cuts_network_bytes_to_the_expected_number_of_nodes(nodes, choices):
    """K choices among m nodes reach D(m) = m (1 - (1 - 1/m)^K) of them."""
    fabric = FabricRates((switched(8, 1e15), switched(16, 10e9)), 1)
    ranks = 8 * nodes
    distinct = nodes * (1 - (1 - 1 / nodes) ** choices)
    every = seconds("all_to_all", 1e9, ranks, fabric)
    once = seconds("all_to_all", 1e9, ranks, fabric, copies=RoutedCopies(float(choices), np.inf))
    assert once == pytest.approx(every * distinct / choices, rel=1e-12)


def test_a_limit_of_nodes_per_token_cuts_copies_further():
    """DeepSeek-V3: 8 choices on at most 4 of 8 nodes, 4 (1 - (3/4)^8) = 3.600 copies."""
    fabric = FabricRates((switched(8, 1e15), switched(8, 10e9)), 1)
    every = seconds("all_to_all", 1e9, 64, fabric)
    limited = seconds("all_to_all", 1e9, 64, fabric, copies=RoutedCopies(8.0, 4.0))
    assert limited == pytest.approx(every * 3.59955 / 8, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_and_no_bytes_take_no_time(kind):
    fabric = FabricRates((switched(8, 1e9, base_s=BASE, round_s=ALPHA, peer_s=ALPHA),), 1)
    assert seconds(kind, 1e9, 1, fabric) == 0
    assert seconds(kind, 0, 8, fabric) == 0
    assert seconds(kind, 1, 2, fabric) > 0


def shipped_fabrics() -> list[FabricRates]:
    library = shipped_library()
    fabrics = []
    for name in library.names("clusters"):
        cluster = library.cluster(name)
        stacks = [library.stack(stack) for stack in library.names("stacks")]
        stack = next(stack for stack in stacks if required_tiers(cluster) <= set(stack.collectives))
        fabrics.append(fabric_rates(cluster, library.device(cluster.device), stack))
    return fabrics


FABRICS = shipped_fabrics()


@given(st.sampled_from(FABRICS), st.sampled_from(KINDS), st.integers(0, 8), st.integers(0, 4), st.floats(1, 1e10))
def test_time_never_falls_with_bytes_and_never_below_the_wire(fabric, kind, doublings, stride, num_bytes):
    group = ProcessGroup(np.full(2, 2.0**doublings), np.full(2, 2.0**stride))
    times = collective_time(Collective(kind, np.array([num_bytes, 1.5 * num_bytes]), group), fabric)
    assert times.modelled_s[1] >= times.modelled_s[0]
    assert (times.modelled_s >= times.ideal_s).all()


@given(
    st.sampled_from([fabric for fabric in FABRICS if not any(level.is_ring for level in fabric.levels)]),
    st.sampled_from(["all_to_all", "point_to_point"]),
    st.integers(0, 8),
    st.floats(1, 1e10),
)
def test_exchanges_on_switched_fabrics_never_get_faster_with_ranks(fabric, kind, doublings, num_bytes):
    """Shipped ones, whose networks are slower than their nodes: else more links could outweigh more traffic.

    Within the rank's own copy, which shrinks with ranks. Reductions do get faster: smaller chunks stay in the quick
    protocol for longer, as measured (8 MiB all-gather: 51 us on four B200, 45 us on eight).
    """
    few = seconds(kind, num_bytes, 2**doublings, fabric)
    assert seconds(kind, num_bytes, 2 ** (doublings + 1), fabric) >= few * 0.9


@given(
    st.sampled_from([fabric for fabric in FABRICS if not any(level.is_ring for level in fabric.levels)]),
    st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]),
    st.integers(1, 7),
)
def test_empty_reductions_on_switched_fabrics_take_longer_with_ranks(fabric, kind, doublings):
    few = seconds(kind, 1e-6, 2**doublings, fabric)
    assert seconds(kind, 1e-6, 2 ** (doublings + 1), fabric) >= few * (1 - 1e-12)


@given(st.sampled_from([4, 8, 16]), st.sampled_from(KINDS), st.integers(0, 3), st.floats(1, 1e10))
def test_time_on_meshes_never_falls_with_ranks(side, kind, doublings, num_bytes):
    """Without wraparound: a group that closes a ring gains its second direction."""
    fabric = torus([side, side], wraps=False)
    few = seconds(kind, num_bytes, 2**doublings, fabric)
    assert seconds(kind, num_bytes, 2 ** (doublings + 1), fabric) >= few * (1 - 1e-12)
