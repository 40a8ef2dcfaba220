"""A second, independent way to time a plan on idle links: walk its rounds. Shares nothing with the closed forms."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from moesim.structure.communication_plans import CommunicationPlan, Transfers
from moesim.structure.group_layouts import GroupLayout


@dataclass(frozen=True)
class Links:
    """Latency and bandwidth of each level; every device (or chip of a torus) has links of its own."""

    layout: GroupLayout
    latency_s: tuple[float, ...]
    bandwidth: tuple[float, ...]
    _known: dict[tuple[int, int], tuple[float, list[tuple[object, int, float]]]] = field(default_factory=dict)

    def crossings(self, source: int, target: int) -> tuple[float, list[tuple[object, int, float]]]:
        """As ``_crossings``, remembered."""
        found = self._known.get((source, target))
        if found is None:
            found = self._known[source, target] = self._crossings(source, target)
        return found

    def _crossings(self, source: int, target: int) -> tuple[float, list[tuple[object, int, float]]]:
        """Latency of a transfer, and its (link, level, share of the bytes) on the way.

        Switched levels: the outermost on which the two differ, out of the source and into the target; what a switch
        sends counts at the receiver, its latency was that of the way up. Torus: along one axis after the other, the
        shorter way round, both ways where they are equally long.
        """
        layout, ranks = self.layout, self.layout.num_ranks
        if source >= ranks:
            return 0.0, [(("in", target, 0), 0, 1.0)]
        if target >= ranks:
            return self.latency_s[0], [(("out", source, 0), 0, 1.0)]
        here, there = layout.coordinates[source].tolist(), layout.coordinates[target].tolist()
        differing = [level for level in range(layout.num_levels) if here[level] != there[level]]
        outermost = differing[-1]
        if not layout.is_ring[outermost]:
            links = [(("out", source, outermost), outermost, 1.0), (("in", target, outermost), outermost, 1.0)]
            return self.latency_s[outermost], links
        latency, links = 0.0, []
        at = [digit for digit, ring in zip(here, layout.is_ring, strict=True) if ring]
        first_axis = layout.is_ring.index(True)
        for level in differing:
            if not layout.is_ring[level]:
                continue
            size, begin, end = layout.extents[level], here[level], there[level]
            ways = [((end - begin) % size, 1), ((begin - end) % size, -1)] if layout.closes[level] else []
            ways = ways or [(abs(end - begin), 1 if end > begin else -1)]
            hops = min(length for length, _ in ways)
            taken = [(length, step) for length, step in ways if length == hops]
            for length, step in taken:
                for hop in range(length):
                    chip = list(at)
                    chip[level - first_axis] = (begin + step * hop) % size
                    links.append((("axis", tuple(chip), level, step), level, 1.0 / len(taken)))
            at[level - first_axis] = end
            latency += hops * self.latency_s[level]
        return latency, links


def load_of(links: Links, transfers: Transfers) -> tuple[float, Counter[tuple[object, int]]]:
    """Longest latency of a round, and the bytes on each link."""
    latency, load = 0.0, Counter()
    for index in range(len(transfers)):
        way_s, ways = links.crossings(int(transfers.source[index]), int(transfers.target[index]))
        latency = max(latency, way_s)
        for link, level, share in ways:
            load[(link, level)] += share * float(transfers.num_bytes[index])
    return latency, load


def busiest_s(links: Links, load: Counter[tuple[object, int]]) -> float:
    return max((num_bytes / links.bandwidth[level] for (_, level), num_bytes in load.items()), default=0.0)


def serial_time_s(links: Links, plan: CommunicationPlan) -> float:
    """Rounds one after another: latency of the slowest transfer and the bytes of the busiest link, round by round."""
    assert len(plan.chains) <= 1
    rounds = [load_of(links, transfers) for chain in plan.chains for transfers in chain]
    return sum(latency + busiest_s(links, load) for latency, load in rounds)


def slowest_time_s(links: Links, plan: CommunicationPlan) -> float:
    """One round of messages that do not wait for each other: the slowest of latency + its busiest link."""
    (chain,) = plan.chains
    (transfers,) = chain
    _, load = load_of(links, transfers)
    times = []
    for index in range(len(transfers)):
        latency, ways = links.crossings(int(transfers.source[index]), int(transfers.target[index]))
        times += [latency + load[link, level] / links.bandwidth[level] for link, level, _ in ways]
    return max(times)


def pipelined_time_s(links: Links, plan: CommunicationPlan, *, phases_overlap: bool) -> float:
    """Cut into very many chunks: the longest way of any block, and the busiest link's bytes.

    Bytes of all rounds, or those of the reduction and then of the spread where these two do not overlap.
    """
    ready: dict[tuple[int, int], float] = {(rank, block): 0.0 for block, rank in plan.starts.tolist()}
    loads = {False: Counter(), True: Counter()}
    for chain in plan.chains:
        for transfers in chain:
            loads[transfers.adds and not phases_overlap].update(load_of(links, transfers)[1])
            arrivals = []
            for index in range(len(transfers)):
                source, target = int(transfers.source[index]), int(transfers.target[index])
                way_s, _ = links.crossings(source, target)
                for block in transfers.blocks(index).tolist():
                    arrivals.append(((target, block), ready[source, block] + way_s))
            for place, time in arrivals:
                ready[place] = max(ready.get(place, 0.0), time) if transfers.adds else time
    longest = max((ready[rank, block] for block, rank in plan.ends.tolist()), default=0.0)
    return longest + busiest_s(links, loads[False]) + busiest_s(links, loads[True])


def executed_time_s(links: Links, plan: CommunicationPlan, combine: str, *, phases_overlap: bool) -> float:
    """Time of a plan on idle links under one of the three ways that levels combine."""
    if combine == "overlapped":
        return pipelined_time_s(links, plan, phases_overlap=phases_overlap)
    return {"serial": serial_time_s, "slowest": slowest_time_s}[combine](links, plan)
