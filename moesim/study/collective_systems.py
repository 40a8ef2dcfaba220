"""What the rows of a collective table were measured on: link generation, network, domains, flags, told by its columns.

Rules read the printed device, topology, NIC and library, so that a table nobody has seen is mapped as the known ones
are. What cannot be told is reported with its reason, never guessed in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch

GIGABYTE = 1e9
BITS_PER_BYTE = 8.0
NVL72_DEVICES = 72
NCCL_WITH_PROTOCOLS = (2, 5)
"""The first NCCL whose tuner chooses among LL, LL128 and Simple as it does now."""

DEVICE_RULES: tuple[tuple[str, str, float], ...] = (
    (r"PCI|L40|RTX|L4\b|T4|A10\b|A40|A6000|NVL\b", "pcie_host", 32.0),
    (r"V100", "nccl_volta_mesh", 150.0),
    (r"A800", "nccl_ampere", 200.0),
    (r"A100", "nccl_ampere", 300.0),
    (r"H800", "nccl_hopper", 200.0),
    (r"H100|H200|H20|GH200", "nccl_hopper", 450.0),
    (r"G?B200|G?B300", "nccl_blackwell", 900.0),
    (r"MI250", "rccl_mi250x", 100.0),
    (r"MI355|MI350", "rccl_mi300", 535.0),
    (r"MI300|MI325", "rccl_mi300", 448.0),
)
"""Device pattern, node library, nominal GB/s per device and direction (hardware.csv); the first that matches."""
NETWORK_RULES: tuple[tuple[str, str], ...] = (
    (r"TCPXO|FasTrak", "tcpxo"),
    (r"TCPX", "tcpx"),
    (r"Slingshot", "slingshot"),
    (r"EFA v1|p4d|p3dn", "efa_v1"),
    (r"EFA|p5|p6-", "efa_v2"),
    (r"gIB|GKE|A3 Ultra|A4\b", "gib"),
    (r"Tencent", "tencent"),
    (
        r"ConnectX|CX-?\d|mlx5|InfiniBand|\bIB\b|RoCE|HDR|NDR|EDR|RDMA|Pollara|AINIC|Thor|Gb/s per GPU|\d+x \d+ ?Gb",
        "ib_gdr",
    ),
)
"""Pattern in NIC, system and library, network library; the first that matches. p3dn's EFA is the first generation."""
NIC_DEFAULTS_GBPS: tuple[tuple[str, float], ...] = (
    (r"CX-?7|ConnectX-7|Pollara|AINIC|NDR|Thor", 400.0),
    (r"CX-?6|ConnectX-6|HDR", 200.0),
    (r"CX-?8|ConnectX-8|XDR", 800.0),
    (r"EDR", 100.0),
)
"""Gb/s of one NIC per device where a table names the model and no rate."""
NVLS_LIBRARIES = ("nccl_hopper", "nccl_blackwell")
"""Generations whose switches reduce (NVLink SHARP)."""

APART: tuple[tuple[str, str], ...] = (
    ("a4_b200_ag16", "untuned or not a steady state"),
    ("a3high_*", "GPUDirect-TCPX, untuned"),
    ("a3mega_ag16", "GPUDirect-TCPXO, untuned"),
    ("v100_64_*_bad", "reported as mistuned"),
    ("dgx_roce_k8s_ar16", "out of the box, noisy below 16 MB"),
    ("b200vultr_a2a16", "first run; b200vultr_a2av2_16 is the tuned one"),
    ("b200vultr_sr16", "first run, untuned"),
    ("gb300oci_a2a128", "two racks, NICs per device not known"),
    ("mi250x_*", "Slingshot and GCD pairs: no second system"),
    ("p3dn_ar16", "NCCL 2.4 with trees forced"),
    ("aws_p5_ar16_eks", "older stack of a system that is in good order"),
    ("mleng_p5en_ar32_nvlstree", "forced algorithm"),
    ("rtx6000d_*", "PCIe devices"),
    ("aic_l40s_*", "PCIe without peer access"),
    ("nvslide_*PCIe*", "PCIe slide rows"),
    ("tencent_*", "device and NIC unknown"),
    ("aws_batch_ar8", "device unknown"),
    ("nvslide_a2a_any_32", "device unknown"),
    ("h20_3e_a2a8", "flat floor of 59 us: not a steady state"),
    ("pplx_IBGDA_16_*", "out of line with 32 to 128 ranks"),
    ("mori_ll_MI300X_32", "marked stale by its source"),
    ("aic_deepep_norm_64", "8 nodes: stragglers in the notify phase"),
    ("deepep_norm_64", "8 nodes: stragglers"),
)
"""Tables in disorder by name, with the reason; shell patterns over a table's id."""


APART_KINDS: tuple[tuple[str, str, str], ...] = (
    ("uccl_norm_*", "ep_combine", "UCCL's normal combine: rates fall and rise again with nodes"),
    ("*_nvshmem_*", "alltoall", "NVSHMEM's all-to-all: not a collective library"),
)
"""Collectives of tables in disorder: pattern of the table, beginning of the collective, reason."""


@dataclass(frozen=True)
class SystemFacts:
    """What a table was measured on.

    ``library`` of the node, ``network`` between nodes (empty inside one), nominal bytes/s per device and direction of
    both, devices of one NVLink or xGMI domain, and flags; ``apart`` is the reason why a table is reported apart.
    """

    library: str
    network: str
    link_bandwidth: float
    nic_bandwidth: float
    ranks_per_domain: int
    domains: int
    has_nvls: bool
    is_torch_timed: bool
    is_legacy: bool
    apart: str


def system_key(row: Mapping[str, str]) -> str:
    """The system that is left out as a whole: what the table calls it, with its device."""
    return f"{row['system']} [{row['device']}]"


def facts_of_row(row: Mapping[str, str]) -> SystemFacts | str:
    """Map a row to what it was measured on, or say why that cannot be told."""
    num_ranks, per_node = int(row["n_devices"]), int(row["devices_per_node"])
    rule = next((rule for rule in DEVICE_RULES if re.search(rule[0], row["device"])), None)
    if rule is None:
        return f"device {row['device']!r} is not known"
    library, gigabytes = rule[1], rule[2]
    inside = _ranks_per_domain(row, num_ranks, per_node)
    if num_ranks % inside:
        return f"{num_ranks} ranks do not fill domains of {inside}"
    network, nic = "", 0.0
    if num_ranks > inside:
        named = _network(row, per_node)
        if isinstance(named, str):
            return named
        network, nic = named
    words = f"{row['topology']} {row['library_version']}"
    facts = SystemFacts(
        library=library,
        network=network,
        link_bandwidth=gigabytes * GIGABYTE,
        nic_bandwidth=nic,
        ranks_per_domain=inside,
        domains=num_ranks // inside,
        has_nvls=library in NVLS_LIBRARIES and not re.search(r"NVLS_ENABLE=0|algo Ring", words),
        is_torch_timed=row["id"].startswith("mleng_"),
        is_legacy=_is_legacy(row["library_version"]),
        apart="",
    )
    return replace(facts, apart=_reason_apart(row, facts))


def _ranks_per_domain(row: Mapping[str, str], num_ranks: int, per_node: int) -> int:
    """A rack of NVL72 is one domain, and so is whatever names no NIC; else a node.

    Kernels that use NICs only have none.
    """
    if "pure RDMA" in row["topology"]:
        return 1
    if re.search(r"NVL72|MNNVL", row["topology"] + row["system"]):
        racks = re.search(r"(\d+) racks", row["topology"])
        return num_ranks // int(racks.group(1)) if racks else min(num_ranks, NVL72_DEVICES)
    return num_ranks if row["nic"] in ("none", "") else min(per_node, num_ranks)


def _network(row: Mapping[str, str], per_node: int) -> tuple[str, float] | str:
    words = f"{row['nic']} {row['system']} {row['library_version']}"
    name = next((name for pattern, name in NETWORK_RULES if re.search(pattern, words)), None)
    if name is None:
        return f"network {row['nic']!r} is not known"
    rate = nic_bandwidth(row["nic"], per_node)
    return (name, rate) if rate else f"no rate of the NIC is given: {row['nic']!r}"


def nic_bandwidth(text: str, per_node: int) -> float:
    """Nominal bytes/s per device of NICs as tables print them; 0 if they do not.

    Examples
    --------
    >>> nic_bandwidth("32x 100 Gb/s EFA v2 per node", 8), nic_bandwidth("1x 400 Gb/s CX-7 per GPU", 8)
    (50000000000.0, 50000000000.0)
    """
    rate = re.search(r"(\d+(?:\.\d+)?) ?Gb|(\d+) ?GbE", text)
    count = re.search(r"(\d+)x\b|(\d+) HCAs", text)
    if rate is None:
        gigabits = next((gigabits for pattern, gigabits in NIC_DEFAULTS_GBPS if re.search(pattern, text)), 0.0)
        return gigabits * GIGABYTE / BITS_PER_BYTE
    gigabits = float(rate.group(1) or rate.group(2))
    if "per GPU" not in text:
        number = int(count.group(1) or count.group(2)) if count else 1
        gigabits *= number / per_node
    return gigabits * GIGABYTE / BITS_PER_BYTE


def _is_legacy(version: str) -> bool:
    found = re.search(r"NCCL (\d+)\.(\d+)", version)
    if found is not None:
        return (int(found.group(1)), int(found.group(2))) < NCCL_WITH_PROTOCOLS
    return bool(re.search(r"\b2019\b", version))


def _reason_apart(row: Mapping[str, str], facts: SystemFacts) -> str:
    """By name first, then by what no constants were fitted for."""
    named = next((reason for pattern, reason in APART if fnmatch(row["id"], pattern)), "")
    for pattern, collective, reason in APART_KINDS:
        if fnmatch(row["id"], pattern) and row["collective"].startswith(collective):
            named = named or reason
    if named:
        return named
    if facts.library == "pcie_host":
        return "devices joined by PCIe: not supported"
    if facts.library == "rccl_mi250x":
        return "GCD pairs: no system in good order"
    if facts.network in ("tcpx", "tcpxo", "slingshot", "tencent"):
        return f"network {facts.network} was never measured in good order"
    if "forced" in row["topology"]:
        return "forced algorithm"
    if re.search(r"SHARP", row["topology"]):
        return "reduction in the network's switches is not modelled"
    if re.search(r"NVSHMEM|raw RDMA|perftest|nvbandwidth|cuda-samples", row["library_version"]):
        return f"measured with {row['library_version']}: not a collective library"
    return ""
