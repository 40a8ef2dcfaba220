"""Every algorithm in the table: its plan places the data, and takes the time of its closed form."""

from __future__ import annotations

import importlib
import pkgutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_timing import Links, executed_time_s

from moesim.cost import collective_algorithms
from moesim.cost.collective_algorithms import ALGORITHMS, algorithms_of
from moesim.cost.collective_algorithms.algorithm import AbstractAlgorithm, passes
from moesim.cost.collective_algorithms.rings import Ring
from moesim.cost.collective_demands import Fabric, FabricLevel, GroupTraffic, ideal_time_s
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.plan_execution import execute_symbolically

CASES = [(algorithm, kind) for algorithm in ALGORITHMS for kind in algorithm.kinds]
SWITCHED_CASES = [(algorithm, kind) for algorithm, kind in CASES if "switched" in algorithm.links]
TORUS_CASES = [(algorithm, kind) for algorithm, kind in CASES if "torus" in algorithm.links]
SIZES = st.floats(8.0, 1e9)
LATENCIES = st.floats(1e-7, 1e-4)


def named(case):
    return "-".join((case[1], case[0].name))


def closed_form_s(algorithm, kind, num_bytes, links, *, devices_per_chip=1):
    layout = links.layout
    levels = tuple(
        FabricLevel(f"level_{index}", extent, bandwidth, ring, close, close, latency)
        for index, (extent, bandwidth, latency, ring, close) in enumerate(
            zip(layout.extents, links.bandwidth, links.latency_s, layout.is_ring, layout.closes, strict=True)
        )
    )
    traffic = GroupTraffic(np.array([num_bytes]), np.array(layout.extents, dtype=float)[:, None])
    fabric = Fabric(levels, devices_per_chip)
    demand = algorithm.demand(kind, traffic, fabric)
    return float(ideal_time_s(demand, fabric)[0]), demand.levels_combine


def executed_s(algorithm, kind, num_bytes, links, combine):
    plan = algorithm.plan(kind, num_bytes, links.layout)
    return executed_time_s(links, plan, combine, phases_overlap=algorithm.phases_overlap)


def test_every_algorithm_class_is_in_the_table():
    for module in pkgutil.iter_modules(collective_algorithms.__path__):
        importlib.import_module(f"{collective_algorithms.__name__}.{module.name}")
    found, waiting = set(), [AbstractAlgorithm]
    while waiting:
        below = waiting.pop().__subclasses__()
        waiting += below
        found |= {one for one in below if not one.__abstractmethods__}
    assert found == {type(algorithm) for algorithm in ALGORITHMS}
    assert len({(algorithm.name, kind) for algorithm, kind in CASES}) == len(CASES)


def required_bytes(plan, kind, num_bytes, ranks):
    """Check what the plan promises against what the collective is, from its starts and ends alone."""
    starts, ends = plan.starts, plan.ends
    if kind == "all_to_all":
        pairs = np.zeros((ranks, ranks))
        np.add.at(pairs, (starts[:, 1], ends[:, 1]), plan.block_bytes[starts[:, 0]])
        np.testing.assert_array_equal(starts[:, 0], ends[:, 0])
        np.testing.assert_allclose(pairs, num_bytes / ranks, rtol=1e-12)
        return
    if kind == "point_to_point":
        np.testing.assert_array_equal(plan.block_bytes, num_bytes)
        return
    assert plan.block_bytes.sum() == pytest.approx(num_bytes, rel=1e-12)
    holders = {"before": starts, "after": ends}
    everyone = {"all_reduce": ["before", "after"], "all_gather": ["after"], "reduce_scatter": ["before"]}
    for side in everyone.get(kind, ["after"]):
        assert len(np.unique(holders[side], axis=0)) == len(plan.block_bytes) * ranks
    shared = {"all_gather": starts, "reduce_scatter": ends}.get(kind)
    if shared is not None:
        per_rank = np.bincount(shared[:, 1], weights=plan.block_bytes[shared[:, 0]], minlength=ranks)
        np.testing.assert_allclose(per_rank, num_bytes / ranks, rtol=1e-12)
    if kind == "broadcast":
        assert set(starts[:, 1].tolist()) == {0}


LAYOUTS = st.one_of(
    st.lists(st.integers(1, 10), min_size=1, max_size=1),
    st.lists(st.integers(1, 4), min_size=2, max_size=2),
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
)


@pytest.mark.parametrize("case", SWITCHED_CASES, ids=named)
@settings(max_examples=20)
@given(extents=LAYOUTS, num_bytes=SIZES)
def test_every_rank_ends_with_what_it_must_have_on_switches(case, extents, num_bytes):
    algorithm, kind = case
    layout = GroupLayout.switched(*extents)
    plan = algorithm.plan(kind, num_bytes, layout)
    required_bytes(plan, kind, num_bytes, layout.num_ranks)
    execute_symbolically(plan)


@pytest.mark.parametrize("case", TORUS_CASES, ids=named)
@settings(max_examples=20)
@given(extents=st.lists(st.integers(1, 4), min_size=1, max_size=2), closes=st.booleans(), num_bytes=SIZES)
def test_every_rank_ends_with_what_it_must_have_on_a_torus(case, extents, closes, num_bytes):
    algorithm, kind = case
    layout = GroupLayout.torus(*extents, closes=closes)
    plan = algorithm.plan(kind, num_bytes, layout)
    required_bytes(plan, kind, num_bytes, layout.num_ranks)
    execute_symbolically(plan)


@pytest.mark.parametrize("case", SWITCHED_CASES, ids=named)
@settings(max_examples=20)
@given(ranks=st.integers(2, 16), num_bytes=SIZES, latency=LATENCIES)
def test_plan_takes_the_closed_form_on_one_uniform_level(case, ranks, num_bytes, latency):
    algorithm, kind = case
    links = Links(GroupLayout.switched(ranks), (latency,), (50e9,))
    expected, combine = closed_form_s(algorithm, kind, num_bytes, links)
    assert executed_s(algorithm, kind, num_bytes, links, combine) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", SWITCHED_CASES, ids=named)
@settings(max_examples=20)
@given(
    extents=st.one_of(
        st.tuples(st.integers(1, 4), st.integers(1, 4)),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    ),
    num_bytes=SIZES,
    inner_latency=LATENCIES,
    step=st.floats(1.0, 10.0),
    bandwidths=st.tuples(st.floats(1e9, 1e12), st.floats(1e9, 1e12), st.floats(1e9, 1e12)),
)
def test_plan_takes_the_closed_form_on_levels(case, extents, num_bytes, inner_latency, step, bandwidths):
    algorithm, kind = case
    if np.prod(extents) == 1:
        return
    latencies = tuple(inner_latency * step**level for level in range(len(extents)))
    links = Links(GroupLayout.switched(*extents), latencies, bandwidths[: len(extents)])
    expected, combine = closed_form_s(algorithm, kind, num_bytes, links)
    if isinstance(algorithm, Ring):
        expected += passes(kind) * border_more(links)
    assert executed_s(algorithm, kind, num_bytes, links, combine) == pytest.approx(expected, rel=1e-9)


def border_more(links):
    """NCCL counts k - 1 borders between k nodes; a block that starts inside a node crosses k of them."""
    spanned = [level for level, extent in enumerate(links.layout.extents) if extent > 1]
    return links.latency_s[spanned[-1]] - links.latency_s[spanned[0]]


@pytest.mark.parametrize("case", TORUS_CASES, ids=named)
@settings(max_examples=20)
@given(
    extents=st.lists(st.integers(1, 5), min_size=1, max_size=3).filter(lambda extents: np.prod(extents) > 1),
    closes=st.booleans(),
    num_bytes=SIZES,
    latency=LATENCIES,
    bandwidth=st.floats(1e9, 1e12),
)
def test_plan_takes_the_closed_form_on_a_torus(case, extents, closes, num_bytes, latency, bandwidth):
    algorithm, kind = case
    axes = len(extents)
    links = Links(GroupLayout.torus(*extents, closes=closes), (latency,) * axes, (bandwidth,) * axes)
    expected, combine = closed_form_s(algorithm, kind, num_bytes, links)
    assert executed_s(algorithm, kind, num_bytes, links, combine) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", TORUS_CASES, ids=named)
@settings(max_examples=20)
@given(extents=st.lists(st.integers(2, 4), min_size=1, max_size=2), closes=st.booleans(), num_bytes=SIZES)
def test_plan_takes_the_closed_form_with_two_cores_per_chip(case, extents, closes, num_bytes):
    algorithm, kind = case
    axes = len(extents)
    layout = GroupLayout((2, *extents), (False,) + (True,) * axes, (False,) + (closes,) * axes)
    links = Links(layout, (0.0,) + (1e-6,) * axes, (4e11,) + (1e11,) * axes)
    expected, combine = closed_form_s(algorithm, kind, num_bytes, links, devices_per_chip=2)
    assert executed_s(algorithm, kind, num_bytes, links, combine) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["ring", "hierarchical_ring"])
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
def test_latency_of_a_ring_counts_once_per_round_and_grows_with_the_ranks(name, kind):
    """Empty buffers: n - 1 latencies, twice that for an all-reduce."""
    times = [
        closed_form_s(algorithms_of(kind)[name], kind, 0.0, Links(GroupLayout.switched(ranks), (1e-6,), (1e9,)))[0]
        for ranks in range(2, 40)
    ]
    np.testing.assert_allclose(times, passes(kind) * 1e-6 * np.arange(1, 39), rtol=1e-12)


def test_latency_of_trees_and_doubling_grows_with_the_logarithm():
    for kind, name, per_step in (("all_reduce", "double_binary_tree", 2), ("all_gather", "recursive", 1)):
        for ranks in (2, 4, 16, 128):
            links = Links(GroupLayout.switched(ranks), (1e-6,), (1e9,))
            time, _ = closed_form_s(algorithms_of(kind)[name], kind, 0.0, links)
            assert time == pytest.approx(per_step * np.log2(ranks) * 1e-6, rel=1e-12)
