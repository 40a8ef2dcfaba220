from __future__ import annotations

import numpy as np
import pytest
from random_scenarios import shipped_library

from moesim.cost.collectives import collective_time, fabric_rates
from moesim.describe.hardware import Cluster
from moesim.describe.quantities import BandwidthFigure, DurationFigure
from moesim.errors import ScenarioError
from moesim.structure.placement import ProcessGroup
from moesim.structure.step_graph import Collective

STACK = "megatron_core_nccl"
SOURCE = {"kind": "fitted", "source": "own nccl-tests"}


def measured(index: int, **figures: object) -> Cluster:
    cluster = shipped_library().cluster("h100_sxm_hgx_nodes")
    levels = list(cluster.fabric.levels)
    levels[index] = levels[index].model_copy(update=figures)
    return cluster.model_copy(update={"fabric": cluster.fabric.model_copy(update={"levels": levels})})


def seconds(cluster: Cluster, kind: str, num_bytes: float, ranks: int) -> float:
    library = shipped_library()
    fabric = fabric_rates(cluster, library.device(cluster.device), library.stack(STACK))
    work = Collective(kind, np.array([num_bytes]), ProcessGroup(np.array([float(ranks)]), np.ones(1)))
    return float(collective_time(work, fabric).modelled_s[0])


def latency(text: str) -> DurationFigure:
    return DurationFigure(value=text, **SOURCE)


def bandwidth(text: str) -> BandwidthFigure:
    return BandwidthFigure(value=text, **SOURCE)


@pytest.mark.parametrize(("index", "ranks", "text"), [(0, 8, "40 us"), (1, 16, "150 us")])
def test_a_measured_latency_is_what_a_small_all_reduce_takes(index, ranks, text):
    cluster = measured(index, measured_latency=latency(text), measured_domains=8 if index == 0 else 2)
    assert seconds(cluster, "all_reduce", 1024.0, ranks) == pytest.approx(float(text.split()[0]) * 1e-6, rel=1e-6)


@pytest.mark.parametrize(("index", "ranks", "gigabytes"), [(0, 8, 400.0), (1, 16, 150.0)])
def test_a_measured_bus_bandwidth_is_what_a_large_all_reduce_reaches(index, ranks, gigabytes):
    figures = {"measured_bus_bandwidth": bandwidth(f"{gigabytes:g} GB/s"), "measured_domains": 8 if index == 0 else 2}
    size = 16 * 2.0**30
    found = 2 * (ranks - 1) / ranks * size / seconds(measured(index, **figures), "all_reduce", size, ranks)
    assert found == pytest.approx(gigabytes * 1e9, rel=1e-6)


def test_measurements_of_the_network_leave_the_node_as_it_is_and_carry_over_to_other_collectives():
    plain = shipped_library().cluster("h100_sxm_hgx_nodes")
    slow = measured(
        1, measured_latency=latency("150 us"), measured_bus_bandwidth=bandwidth("150 GB/s"), measured_domains=2
    )
    assert seconds(slow, "all_reduce", 1e6, 8) == seconds(plain, "all_reduce", 1e6, 8)
    for num_bytes in (1e3, 1e9):
        assert seconds(slow, "all_to_all", num_bytes, 64) > 1.5 * seconds(plain, "all_to_all", num_bytes, 64)


def test_a_latency_below_what_the_node_takes_alone_is_an_error():
    with pytest.raises(ScenarioError, match="measured_latency 2 us is out of reach"):
        seconds(measured(1, measured_latency=latency("2 us"), measured_domains=2), "all_reduce", 1.0, 16)


def test_a_bandwidth_above_the_nominal_one_is_an_error():
    with pytest.raises(ScenarioError, match="more than the links' 450 GB/s"):
        seconds(measured(0, measured_bus_bandwidth=bandwidth("2 TB/s")), "all_reduce", 1.0, 8)
