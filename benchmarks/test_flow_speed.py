"""How long the flow engine takes, and what its answers are: ``python -m pytest benchmarks/test_flow_speed.py``.

``--benchmark-enable`` measures and prints beside what was asked for: wall time, and time of the processor on a busy
machine. SimGrid is compared where it is installed. Nothing here fails for being slow.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from network_cases import hierarchy, network, node, torus
from simgrid_oracle import missing_reason, simgrid_run

from moesim.engine.flow_network_traffic import FlowResult, Flows, all_to_all_v, simulate_flows, uniform_all_to_all
from moesim.structure.topology import Topology
from moesim.structure.topology_symmetry import RankPattern

MERGE_WITHIN = 0.005
"""Ends within half a per cent of the ideal time are one event."""
MEMORY_LIMIT = 4 * 2**30


def rails(num_devices: int) -> Topology:
    """HGX H100 nodes on a rail-optimised fat-tree: 32 nodes per group of leaves, 3 stages from 4,096 devices on."""
    groups = num_devices // 256
    pods = {"leaves_per_pod": 8} if groups > 8 else {}
    wiring = {"domains_per_leaf": min(32, num_devices // 8), "is_rail_optimised": True} | pods
    fabric = network("infiniband_ndr_rail", num_devices // 8, "400 Gb/s", 8, **wiring)
    return hierarchy("h100_sxm", node("nvswitch3", 8, "450 GB/s"), fabric)


class Meter:
    """Runs a case once, measured if enabled; memory in a second run, since watching it costs time."""

    def __init__(self, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
        self.benchmark, self.capsys = benchmark, capsys

    def run(self, text: str, function: Callable[[], FlowResult], asked_s: float) -> FlowResult:
        small = torus("tpu_v5e", [4], [True])  # imports are not what is measured
        uniform_all_to_all(small, RankPattern(len(small.graph), 4), 1.0)
        begin = time.process_time()
        result: FlowResult = self.benchmark.pedantic(function, rounds=1)
        processor_s = time.process_time() - begin
        if self.benchmark.enabled:
            tracemalloc.start()
            function()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < MEMORY_LIMIT
            wall_s = self.benchmark.stats.stats.median
            bound = f", error bound {result.error_bound:.2%}" if result.error_bound else ""
            self.benchmark.extra_info |= {"peak_bytes": peak, "processor_s": processor_s, "asked_s": asked_s}
            with self.capsys.disabled():
                sys.stdout.write(
                    f"\n{text}: {wall_s:.2f} s ({processor_s:.2f} s of processor; asked for: {asked_s:g} s), "
                    f"{result.num_flow_classes:,} classes of flows, {result.num_events:,} events, "
                    f"{peak / 2**20:,.0f} MiB{bound}\n"
                )
        return result


@pytest.fixture
def meter(benchmark, capsys):
    return Meter(benchmark, capsys)


@pytest.mark.benchmark(group="uniform all-to-all, exact")
def test_two_thousand_chips_of_a_closed_torus(meter):
    def run() -> FlowResult:
        topology = torus("tpu_v5e", [32, 64], [True, True])
        assert len(topology.graph) == 2048
        return uniform_all_to_all(topology, RankPattern(2048, 2048), 1e5)

    result = meter.run("uniform all-to-all, 2,048-node torus, exact, graph included", run, asked_s=1.0)
    # The longer axis sets the time: 64 / 8 of a chip's 2,048 messages cross each of its links; 16 + 32 hops of 1 us.
    assert result.makespan_s == pytest.approx(2048 * 1e5 * 64 / 8 / 80e9 + 48e-6, rel=1e-9)


@pytest.mark.benchmark(group="uniform all-to-all, exact")
def test_sixteen_thousand_gpus_on_rails(meter):
    def run() -> FlowResult:
        topology = rails(16384)
        assert len(topology.graph) > 16384
        return uniform_all_to_all(topology, RankPattern(16384, 16384), 1e4)

    text = "uniform all-to-all, 16,384 GPUs on a rail-optimised fat-tree, exact, graph included"
    result = meter.run(text, run, asked_s=5.0)
    # A NIC sends what leaves its node; forwarding to the rail (0.7 us) and the network (2.7 us) are on the longest way.
    assert result.makespan_s == pytest.approx((16384 - 8) * 1e4 / 50e9 + 3.4e-6, rel=1e-9)


def same_for_all(number: int) -> np.ndarray:
    """Every rank sends the same uneven distribution."""
    return np.tile(np.random.default_rng(0).dirichlet(np.ones(number)) * number * 1e6, (number, 1))


def drawn_for_each(number: int) -> np.ndarray:
    """Every rank draws its own uneven distribution: 65,280 pairs of different bytes at 256 ranks."""
    return np.random.default_rng(1).dirichlet(np.ones(number), size=number) * number * 1e6


@pytest.mark.benchmark(group="all-to-all-v")
def test_every_rank_sends_the_same_uneven_distribution(meter):
    number = 256 if meter.benchmark.enabled else 48
    topology, matrix = rails(256), same_for_all(number)
    text = f"all-to-all-v of {number} GPUs, the same distribution for all sources, exact"
    result = meter.run(text, lambda: all_to_all_v(topology, np.arange(number), matrix), asked_s=10.0)
    assert result.error_bound == 0.0


@pytest.mark.benchmark(group="all-to-all-v")
def test_every_rank_draws_its_own_distribution(meter):
    number = 256 if meter.benchmark.enabled else 48
    topology, matrix = rails(256), drawn_for_each(number)

    def run() -> FlowResult:
        return all_to_all_v(topology, np.arange(number), matrix, merge_within=MERGE_WITHIN)

    text = f"all-to-all-v of {number} GPUs, a draw per source, ends within {MERGE_WITHIN:.1%} merged"
    assert meter.run(text, run, asked_s=10.0).error_bound < 0.005


def simgrid_case(number: int) -> tuple[Topology, Flows]:
    """Uniform all-to-all of all hosts of a mesh-free fat-tree: the case that others are slow at."""
    source, target = np.nonzero(1 - np.eye(number, dtype=np.int64))
    return rails(number), Flows.of(source, target, 1e8)


@pytest.mark.benchmark(group="against SimGrid")
@pytest.mark.skipif(bool(missing_reason()), reason=missing_reason() or "SimGrid is there")
@pytest.mark.parametrize("number", [64, 256])
def test_the_same_all_to_all_in_simgrid(benchmark, capsys, number):
    if number > 64 and not benchmark.enabled:
        pytest.skip("SimGrid needs a minute or more for 256 hosts; with --benchmark-enable only")
    topology, flows = simgrid_case(number)
    begin = time.perf_counter()
    theirs = simgrid_run(topology, flows)
    whole = time.perf_counter() - begin
    pattern = RankPattern(number, number)
    ours = benchmark.pedantic(uniform_all_to_all, args=(topology, pattern, 1e8), rounds=3 if benchmark.enabled else 1)
    begin = time.perf_counter()
    listed = simulate_flows(topology, flows)
    explicit = time.perf_counter() - begin
    assert ours.makespan_s == pytest.approx(theirs.finish_s.max(), rel=0.01)
    assert listed.makespan_s == pytest.approx(ours.makespan_s, rel=1e-9)
    if benchmark.enabled:
        median = benchmark.stats.stats.median
        benchmark.extra_info |= {"simgrid_s": theirs.seconds, "ratio": theirs.seconds / median}
        with capsys.disabled():
            sys.stdout.write(
                f"\nuniform all-to-all of {number} GPUs: SimGrid {theirs.seconds:.2f} s ({whole:.2f} s with its "
                f"platform), by symmetry {median * 1e3:.2f} ms, ratio {theirs.seconds / median:,.0f}; flow by flow "
                f"{explicit:.2f} s, ratio {theirs.seconds / explicit:,.0f}\n"
            )
