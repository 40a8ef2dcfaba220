"""Emulated networks: what stands where at which rate, the same as a cluster of moesim, and how it is built.

A host is a namespace. Every link is a veth pair with a token bucket at both ends, so each direction has its rate; below
the bucket, pairs of ranks take turns, as under fair queueing. Queues are so long, and TCP's windows so small, that
nothing is ever lost. With one first-in-first-out queue per link instead, flows share it unevenly and by chance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from validation.netlab.namespaces import Commands, namespaces

GSO_BYTES = 4096
"""Largest unit a host hands to its link; the kernel's own 64 KiB would pass a token bucket in one piece."""
BURST_BYTES = 5632
"""What a bucket holds: with less, a late timer costs rate (4 % at 3200 bytes); with more, idle links start too fast."""
QUEUE_BYTES = 8 * 1024 * 1024
WINDOW_BYTES = 128 * 1024
"""Receive buffer of a connection: what it may have on its way."""
UNBOUND = "10gbit"
"""Rate of a pair below the bucket: the classes only take turns."""
SUBNET = "10.77"
SYSCTLS = (
    "net.ipv6.conf.all.disable_ipv6=1",
    "net.ipv4.tcp_congestion_control=reno",
    "net.ipv4.tcp_slow_start_after_idle=0",
    "net.ipv4.tcp_no_metrics_save=1",
    f"net.ipv4.tcp_rmem=4096 {WINDOW_BYTES} {WINDOW_BYTES}",
    "net.ipv4.ip_forward=1",
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.default.rp_filter=0",
    "net.ipv4.conf.all.send_redirects=0",
    "net.ipv4.conf.default.send_redirects=0",
)
Kind = Literal["flat", "tree", "nodes", "ring"]


@dataclass(frozen=True)
class LabTopology:
    """One emulated network.

    Attributes
    ----------
    kind : str
        ``flat``: hosts on one switch. ``tree``: leaves of ``group`` hosts whose uplinks have ``group`` times the rate
        over ``oversubscription``. ``nodes``: ``group`` ranks at ``inside_rate``, one link of ``rate`` out of each node.
        ``ring``: hosts joined to two neighbours, who forward by static routes the shorter way round.
    ranks : int
        Hosts, one rank each.
    rate, inside_rate : float
        Bit/s of a link, one direction.
    group : int
        Hosts of a leaf, ranks of a node.
    oversubscription : float
        Of a leaf's uplink.
    """

    kind: Kind
    ranks: int
    rate: float
    group: int = 1
    inside_rate: float = 0.0
    oversubscription: float = 1.0

    @property
    def name(self) -> str:
        """Identifier, as of its cluster profile."""
        match self.kind:
            case "flat" | "ring":
                return f"{self.kind}_{self.ranks}"
            case "tree":
                return f"tree_{self.ranks // self.group}x{self.group}_{self.oversubscription:g}to1".replace(".", "p")
            case "nodes":
                return f"nodes_{self.ranks // self.group}x{self.group}"

    @property
    def host_rate(self) -> float:
        """Bit/s of a rank's own link."""
        return self.inside_rate if self.kind == "nodes" else self.rate

    @property
    def uplink_rate(self) -> float:
        """Bit/s of a leaf's or node's uplink."""
        return self.rate if self.kind == "nodes" else self.group * self.rate / self.oversubscription


@dataclass(frozen=True)
class Host:
    """Where a rank runs: its namespace, the interface gloo shall use, and its address."""

    namespace: str
    interface: str
    address: str


@contextlib.contextmanager
def emulated(topology: LabTopology) -> Iterator[list[Host]]:
    """Hosts of a network that exists as long as the context.

    Yields
    ------
    list of Host
        By rank.
    """
    parts = [f"h{rank}" for rank in range(topology.ranks)] + ["fabric"]
    with namespaces(topology.kind, parts) as names:
        build = _ring_commands if topology.kind == "ring" else _tree_commands
        Commands().run_all(build(topology, names))
        interface = "self0" if topology.kind == "ring" else "eth0"
        yield [Host(names[f"h{rank}"], interface, address(rank)) for rank in range(topology.ranks)]


def address(rank: int) -> str:
    """Address of a rank."""
    return f"{SUBNET}.0.{rank + 1}"


def _settings(namespace: str) -> Iterator[str]:
    yield f"ip -n {namespace} link set lo up"
    for setting in SYSCTLS:
        yield f"ip netns exec {namespace} sysctl -qw '{setting}'"


Pairs = Sequence[tuple[int, int]]
"""Ranks that send and receive."""


def _shaped(namespace: str, interface: str, rate: float, pairs: Pairs) -> Iterator[str]:
    """A token bucket that serves the pairs whose bytes leave by this interface in turn."""
    yield f"ip -n {namespace} link set {interface} gso_max_size {GSO_BYTES} up"
    device = f"tc -n {namespace}"
    bucket = f"tbf rate {rate:.0f}bit burst {BURST_BYTES} limit {QUEUE_BYTES}"
    yield f"{device} qdisc add dev {interface} root handle 1: {bucket}"
    yield f"{device} qdisc add dev {interface} parent 1:1 handle 2: htb default 1"
    yield f"{device} class add dev {interface} parent 2: classid 2:1 htb rate {UNBOUND} quantum {GSO_BYTES}"
    for number, (source, target) in enumerate(pairs, start=2):
        leaf = f"2:{number:x}"
        yield f"{device} class add dev {interface} parent 2: classid {leaf} htb rate {UNBOUND} quantum {GSO_BYTES}"
        match = f"match ip src {address(source)}/32 match ip dst {address(target)}/32"
        yield f"{device} filter add dev {interface} parent 2: protocol ip prio 1 u32 {match} flowid {leaf}"


def _link(ends: tuple[str, str], interfaces: tuple[str, str], rate: float, pairs: tuple[Pairs, Pairs]) -> Iterator[str]:
    """A veth pair between two namespaces, shaped both ways; ``pairs`` that leave by each end."""
    yield f"ip link add {interfaces[0]} netns {ends[0]} type veth peer name {interfaces[1]} netns {ends[1]}"
    for namespace, interface, leaving in zip(ends, interfaces, pairs, strict=True):
        yield from _shaped(namespace, interface, rate, leaving)


def _crossing(inside: Sequence[int], ranks: int) -> tuple[Pairs, Pairs]:
    """Pairs that leave a set of ranks, and those that enter it."""
    outside = [rank for rank in range(ranks) if rank not in inside]
    return [(a, b) for a in inside for b in outside], [(b, a) for a in inside for b in outside]


def _bridge(namespace: str, name: str) -> Iterator[str]:
    yield f"ip -n {namespace} link add {name} type bridge forward_delay 0 stp_state 0 mcast_snooping 0"
    yield f"ip -n {namespace} link set {name} up"


def _tree_commands(topology: LabTopology, names: dict[str, str]) -> Iterator[str]:
    """Hosts on leaf bridges, and these on a spine where there are several."""
    fabric = names["fabric"]
    for namespace in names.values():
        yield from _settings(namespace)
    group = topology.ranks if topology.kind == "flat" else topology.group
    leaves = topology.ranks // group
    for leaf in range(leaves):
        yield from _bridge(fabric, f"leaf{leaf}")
    for rank in range(topology.ranks):
        host, port = names[f"h{rank}"], f"port{rank}"
        yield from _link((host, fabric), ("eth0", port), topology.host_rate, _crossing([rank], topology.ranks))
        yield f"ip -n {fabric} link set {port} master leaf{rank // group}"
        yield f"ip -n {host} addr add {address(rank)}/16 dev eth0"
    if leaves == 1:
        return
    yield from _bridge(fabric, "spine")
    for leaf in range(leaves):
        up, down = f"up{leaf}", f"down{leaf}"
        below = range(leaf * group, (leaf + 1) * group)
        yield from _link((fabric, fabric), (up, down), topology.uplink_rate, _crossing(below, topology.ranks))
        yield f"ip -n {fabric} link set {up} master leaf{leaf}"
        yield f"ip -n {fabric} link set {down} master spine"


def _ring_commands(topology: LabTopology, names: dict[str, str]) -> Iterator[str]:
    """Hosts with a link to each neighbour; addresses on an interface of their own, routes the shorter way round."""
    size = topology.ranks
    hosts = [names[f"h{rank}"] for rank in range(size)]
    for rank, host in enumerate(hosts):
        yield from _settings(host)
        yield from _bridge(host, "self0")
        yield f"ip -n {host} addr add {address(rank)}/32 dev self0"
    for rank, host in enumerate(hosts):
        ends, leaving = (host, hosts[(rank + 1) % size]), _round_the_ring(rank, size)
        yield from _link(ends, ("next", "prev"), topology.rate, leaving)
    for rank, host in enumerate(hosts):
        ahead, behind = f"{SUBNET}.{100 + rank}", f"{SUBNET}.{100 + (rank - 1) % size}"
        yield f"ip -n {host} addr add {ahead}.1/30 dev next"
        yield f"ip -n {host} addr add {behind}.2/30 dev prev"
        for hops in range(1, size):
            via = f"via {ahead}.2 dev next" if 2 * hops <= size else f"via {behind}.1 dev prev"
            yield f"ip -n {host} route add {address((rank + hops) % size)}/32 {via} src {address(rank)}"


def _round_the_ring(rank: int, size: int) -> tuple[Pairs, Pairs]:
    """Pairs that use the link from a rank to the next, and the link back."""
    ahead = [
        ((rank - before) % size, (rank - before + hops) % size)
        for hops in range(1, size // 2 + 1)
        for before in range(hops)
    ]
    return ahead, [(b, a) for a, b in ahead]


def cluster_document(topology: LabTopology) -> dict[str, Any]:
    """The same network as a cluster profile of moesim.

    Parameters
    ----------
    topology : LabTopology
        What is emulated.

    Returns
    -------
    dict
        Document for ``hardware_profiles/clusters``.
    """
    source = "token buckets of the network lab"
    rate = _figure(f"{topology.rate / 1e6:g} Mb/s", source)
    hop = _figure("0 us", "veth pairs and bridges; what a message costs is in the stack")
    node = topology.group if topology.kind == "nodes" else 1
    if topology.kind == "ring":
        fabric: dict[str, Any] = {
            "kind": "torus",
            "dimensions": [topology.ranks],
            "wraparound": [True],
            "link_bandwidth": rate,
            "hop_latency": hop,
        }
    else:
        fabric = {"kind": "hierarchical", "levels": _levels(topology, rate, hop, source)}
    return {
        "schema_version": 1,
        "id": topology.name,
        "name": f"network lab: {topology.kind}, {topology.ranks} ranks",
        "device": "netlab_host",
        "device_count": topology.ranks,
        "devices_per_node": node,
        "fabric": fabric,
    }


def _levels(topology: LabTopology, rate: dict[str, Any], hop: dict[str, Any], source: str) -> list[dict[str, Any]]:
    is_nodes = topology.kind == "nodes"
    node = topology.group if is_nodes else 1
    inside = _figure(f"{topology.host_rate / 1e6:g} Mb/s", source)
    shared = _figure(f"{topology.rate / node / 1e6:g} Mb/s", source) if is_nodes else rate
    wiring: dict[str, Any] = {"shape": "fat_tree", "is_rail_optimised": False, "source": source}
    wiring["domains_per_leaf"] = topology.group if topology.kind == "tree" else topology.ranks // node
    if topology.kind == "tree":
        wiring["leaf_oversubscription"] = _figure(topology.oversubscription, source)
    crossbar = {"shape": "crossbar", "source": source}
    return [
        {
            "name": "node",
            "tier": "scale_up",
            "medium": "ethernet",
            "size": node,
            "bandwidth_per_device": inside,
            "latency": hop,
            "wiring": crossbar,
        },
        {
            "name": "network",
            "tier": "scale_out",
            "medium": "ethernet",
            "size": topology.ranks // node,
            "bandwidth_per_device": shared,
            "latency": hop,
            "nics_per_node": 1,
            "wiring": wiring,
        },
    ]


def _figure(value: str | float, source: str) -> dict[str, Any]:
    return {"value": value, "kind": "assumed", "error_fraction": 0.0, "source": source}
