"""Small fabrics of every kind, for tests of topologies and flows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from random_scenarios import shipped_library

from moesim.describe.hardware import Cluster
from moesim.structure.topology import Topology
from moesim.structure.topology_builders import build_topology


def figure(value: str) -> dict[str, str]:
    return {"value": value, "kind": "assumed", "source": "a test"}


def node(medium: str, size: int, rate: str, **more: Any) -> dict[str, Any]:
    level = {"name": "node", "tier": "scale_up", "medium": medium, "size": size}
    return level | {"bandwidth_per_device": figure(rate), "latency": figure("0.7 us")} | more


def network(medium: str, size: int, rate: str, nics: int, **wiring: Any) -> dict[str, Any]:
    level = {"name": "network", "tier": "scale_out", "medium": medium, "size": size, "nics_per_node": nics}
    level |= {"bandwidth_per_device": figure(rate), "latency": figure("2.7 us")}
    if wiring:
        level["wiring"] = {"shape": "fat_tree", "source": "a test"} | wiring
    return level


def hierarchy(device: str, *levels: dict[str, Any], devices_per_node: int = 0) -> Topology:
    count = 1
    for level in levels:
        count *= level["size"]
    return built(device, count, devices_per_node or levels[0]["size"], {"kind": "hierarchical", "levels": list(levels)})


def torus(device: str, dimensions: list[int], wraparound: list[bool], pods: int = 1) -> Topology:
    count = shipped_library().device(device).devices_per_chip * pods
    for size in dimensions:
        count *= size
    fabric = {"kind": "torus", "dimensions": dimensions, "wraparound": wraparound}
    fabric |= {"link_bandwidth": figure("80 GB/s"), "hop_latency": figure("1 us")}
    if pods > 1:
        fabric["pods"] = {"count": pods, "bandwidth_per_device": figure("6 GB/s"), "latency": figure("20 us")}
    return built(device, count, 1, fabric | {"on_chip_bandwidth": figure("400 GB/s")})


def built(device: str, count: int, devices_per_node: int, fabric_fields: dict[str, Any]) -> Topology:
    fields = {"schema_version": 1, "id": "case", "name": "a test", "device": device, "device_count": count}
    cluster = Cluster.model_validate(fields | {"devices_per_node": devices_per_node, "fabric": fabric_fields})
    return build_topology(cluster, shipped_library().device(device))


DGX_1 = {
    "shape": "link_matrix",
    "links": [
        [0, 1, 1, 2, 2, 0, 0, 0],
        [1, 0, 2, 1, 0, 2, 0, 0],
        [1, 2, 0, 2, 0, 0, 1, 0],
        [2, 1, 2, 0, 0, 0, 0, 1],
        [2, 0, 0, 0, 0, 1, 1, 2],
        [0, 2, 0, 0, 1, 0, 2, 1],
        [0, 0, 1, 0, 1, 2, 0, 2],
        [0, 0, 0, 1, 2, 1, 2, 0],
    ],
    "link_bandwidth": figure("25 GB/s"),
    "source": "a test",
}

BUILDERS = {
    "crossbar": lambda: hierarchy("a100_sxm", node("nvswitch2", 8, "300 GB/s")),
    "two boards": lambda: hierarchy(
        "v100_sxm3_32gb",
        node("nvswitch1", 8, "150 GB/s", wiring={"shape": "crossbar", "boards": 2, "source": "a test"}),
        network("infiniband_edr", 2, "50 Gb/s", 4),
    ),
    "cube mesh": lambda: hierarchy("v100_sxm2_32gb", node("nvlink2_mesh", 8, "150 GB/s", wiring=DGX_1)),
    "cube meshes, four NICs": lambda: hierarchy(
        "v100_sxm2_32gb",
        node("nvlink2_mesh", 8, "150 GB/s", wiring=DGX_1),
        network("infiniband_edr", 3, "50 Gb/s", 4),
    ),
    "cube meshes, one NIC": lambda: hierarchy(
        "v100_sxm2_32gb",
        node("nvlink2_mesh", 8, "150 GB/s", wiring=DGX_1),
        network("efa_v1", 2, "12.5 Gb/s", 1),
    ),
    "full mesh": lambda: hierarchy("mi300x", node("xgmi_mesh", 4, "192 GB/s"), network("roce", 4, "400 Gb/s", 4)),
    "PCIe trees": lambda: hierarchy(
        "k40", node("pcie3", 8, "5 GB/s"), network("ethernet", 3, "1.25 Gb/s", 1), devices_per_node=8
    ),
    "rails": lambda: hierarchy(
        "h100_sxm",
        node("nvswitch3", 4, "450 GB/s"),
        network("infiniband_ndr_rail", 6, "400 Gb/s", 4, domains_per_leaf=2, is_rail_optimised=True),
    ),
    "rails through spines": lambda: hierarchy(
        "h100_sxm",
        node("nvswitch3", 4, "450 GB/s"),
        network(
            "infiniband_ndr_rail",
            4,
            "400 Gb/s",
            4,
            domains_per_leaf=2,
            is_rail_optimised=True,
            between_rails="spine",
            leaf_oversubscription=figure_number(2.0),
        ),
    ),
    "oversubscribed pods": lambda: hierarchy(
        "h100_sxm",
        node("nvswitch3", 2, "450 GB/s"),
        network(
            "infiniband_ndr",
            16,
            "400 Gb/s",
            2,
            domains_per_leaf=2,
            leaves_per_pod=4,
            leaf_oversubscription=figure_number(1.5),
            pod_oversubscription=figure_number(2.0),
            is_rail_optimised=False,
        ),
    ),
    "racks": lambda: hierarchy(
        "gb200",
        node("nvlink5_nvl72", 12, "900 GB/s"),
        network("infiniband_ndr_rail", 2, "400 Gb/s", 4),
        devices_per_node=4,
    ),
    "data centre": lambda: hierarchy(
        "a100_sxm",
        node("nvswitch2", 4, "300 GB/s"),
        network("infiniband_hdr_rail", 3, "200 Gb/s", 4),
        network("ethernet", 2, "20 Gb/s", 4) | {"name": "data_centre"},
    ),
    "closed torus": lambda: torus("tpu_v5e", [4, 6], [True, True]),
    "closed torus, odd": lambda: torus("tpu_v5p", [3, 5, 2], [True, True, True]),
    "mesh": lambda: torus("tpu_v5e", [4, 5], [False, False]),
    "mesh of two cores": lambda: torus("tpu_v3_core", [3, 4], [False, False]),
    "torus of two cores": lambda: torus("tpu_v3_core", [4, 4], [True, True]),
    "half closed": lambda: torus("tpu_v4", [4, 2, 3], [True, False, True]),
    "pods of tori": lambda: torus("tpu_v3_core", [2, 3], [True, False], pods=3),
    "ring": lambda: torus("tpu_v5e", [8], [True]),
}
FABRICS = tuple(BUILDERS)
LARGER = {
    "eight nodes on rails": lambda: hierarchy(
        "h100_sxm", node("nvswitch3", 8, "450 GB/s"), network("infiniband_ndr_rail", 8, "400 Gb/s", 8)
    ),
}
"""Not in every test: 64 devices and more."""


def figure_number(value: float) -> dict[str, Any]:
    return {"value": value, "kind": "assumed", "source": "a test"}


@lru_cache
def fabric(name: str) -> Topology:
    """One of the small fabrics; built once."""
    return (BUILDERS | LARGER)[name]()
