"""Times of one collective over a range of sizes, as nccl-tests prints them, by closed form or by flows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.cost.algorithm_choice import Choice, choose_algorithms, runnable_algorithms
from moesim.cost.collective_demands import CollectiveDemand, GroupTraffic, ideal_time_s
from moesim.cost.collectives import fabric_rates
from moesim.cost.communication_libraries import FabricRates, library_times
from moesim.cost.exchange_matrices import matrix_demand
from moesim.cost.nccl_tuner import NVLS_EFFICIENCY
from moesim.describe.hardware import HierarchicalFabric
from moesim.errors import Problem, ScenarioError
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import CollectiveKind
from moesim.study.network_flows import FlowPricer
from moesim.study.network_pricing import contention_of_flows, link_fractions, named_algorithm_s
from moesim.study.network_questions import AUTO, NetworkCase

IN_SWITCH = "nvls"
COLUMNS = (
    "size_bytes",
    "algorithm",
    "protocol",
    "time_s",
    "algbw_bytes_per_s",
    "busbw_bytes_per_s",
    "busiest_link",
    "busiest_link_utilisation",
)


@dataclass(frozen=True)
class NetworkRow:
    """One size.

    ``busiest_link_utilisation`` is the part of the time in which the busiest link would send at its nominal bandwidth.
    """

    size_bytes: float
    algorithm: str
    protocol: str
    time_s: float
    algbw_bytes_per_s: float
    busbw_bytes_per_s: float
    busiest_link: str
    busiest_link_utilisation: float

    def to_json(self) -> dict[str, Any]:
        """Return the row under its column names."""
        return {name: getattr(self, name) for name in COLUMNS}


@dataclass(frozen=True)
class NetworkTable:
    """Answer of ``moesim network``; ``notes`` say what the times are and are not."""

    case: NetworkCase
    rows: tuple[NetworkRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the answer as one JSON object."""
        case = self.case
        return {
            "schema_version": 1,
            "cluster": case.cluster.id,
            "device": case.device.id,
            "stack": case.stack.id if case.stack is not None else None,
            "collective": case.kind,
            "ranks": case.ranks,
            "extents": {
                level.name: int(extent) for level, extent in zip(case.fabric.levels, case.extents, strict=True)
            },
            "engine": case.engine,
            "algorithm": case.algorithm,
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
        }


def bus_factor(kind: CollectiveKind, ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth, by the conventions of nccl-tests.

    Examples
    --------
    >>> bus_factor("all_reduce", 8), bus_factor("all_to_all", 8), bus_factor("broadcast", 8)
    (1.75, 0.875, 1.0)
    """
    share = (ranks - 1) / ranks
    return {"all_reduce": 2 * share, "broadcast": 1.0, "point_to_point": 1.0}.get(kind, share)


def network_table(case: NetworkCase) -> NetworkTable:
    """Time every size.

    Parameters
    ----------
    case : NetworkCase
        Checked question.

    Returns
    -------
    NetworkTable
        One row per size.

    Raises
    ------
    ScenarioError
        For what the engine cannot do with an algorithm.
    """
    choices = chosen_algorithms(case)
    priced = _by_flows(case, choices) if case.engine == "flow" else _in_closed_form(case, choices)
    factor = bus_factor(case.kind, case.ranks)
    rows = []
    for size, choice, (time, link, utilisation) in zip(case.sizes, choices, priced, strict=True):
        rate = float(size / time) if time > 0 else 0.0
        rows.append(
            NetworkRow(float(size), choice.algorithm, choice.protocol, time, rate, rate * factor, link, utilisation)
        )
    return NetworkTable(case, tuple(rows), _notes(case, choices))


def traffic_of(case: NetworkCase) -> GroupTraffic:
    """Sizes as cases on the group's extents."""
    return GroupTraffic(case.sizes, np.repeat(case.extents[:, None], len(case.sizes), axis=1))


def chosen_algorithms(case: NetworkCase) -> list[Choice]:
    """Algorithm of each size: the one that was asked for, or the library's choice."""
    if case.shares is not None:
        return [Choice("direct" if case.algorithm == AUTO else case.algorithm)] * len(case.sizes)
    if case.algorithm != AUTO:
        return [Choice(case.algorithm)] * len(case.sizes)
    if case.stack is not None and case.stack.sends_one_copy_per_node and case.kind == "all_to_all":
        return [Choice("rail_aligned")] * len(case.sizes)
    return choose_algorithms(case.kind, traffic_of(case), case.fabric, cluster=case.cluster, device=case.device)


def _in_closed_form(case: NetworkCase, choices: list[Choice]) -> Iterator[tuple[float, str, float]]:
    traffic = traffic_of(case)
    demands = {name: _demand(case, name, traffic) for name in {choice.algorithm for choice in choices}}
    times = {name: _time_s(case, demand, traffic) for name, demand in demands.items()}
    bandwidths = np.array([level.bandwidth for level in case.fabric.levels])
    for index, choice in enumerate(choices):
        time = float(times[choice.algorithm][index])
        sent = [level.wire_bytes[index] for level in demands[choice.algorithm].levels]
        busy = np.array(sent, dtype=float) / bandwidths
        busiest = int(busy.argmax())
        yield time, case.fabric.levels[busiest].name, float(busy[busiest] / time) if time > 0 else 0.0


def _demand(case: NetworkCase, name: str, traffic: GroupTraffic) -> CollectiveDemand:
    algorithm = runnable_algorithms(case.kind, case.fabric)[name]
    if case.shares is None:
        return algorithm.demand(case.kind, traffic, case.fabric)
    if name != "direct" or any(level.is_ring for level in case.fabric.levels):
        message = "a token matrix has a closed form only for the direct exchange on switched levels"
        problem = Problem(code="E-SCN-011", message=message, remedy="use --engine flow", field="token_matrix")
        raise ScenarioError([problem])
    return matrix_demand(case.shares, case.layout, case.sizes)


def _time_s(case: NetworkCase, demand: CollectiveDemand, traffic: GroupTraffic) -> FloatArray:
    """Ideal time, or what the stack makes of it: of its own choice, or of the algorithm that was named."""
    if case.stack is None:
        return ideal_time_s(demand, case.fabric)
    return _library_s(case, demand, traffic, fabric_rates(case.cluster, case.device, case.stack))


def _library_s(case: NetworkCase, demand: CollectiveDemand, traffic: GroupTraffic, rates: FabricRates) -> FloatArray:
    if case.algorithm == AUTO and case.shares is None:
        return library_times(case.kind, traffic, rates).modelled_s
    return named_algorithm_s(case.kind, demand, traffic, rates)


def _by_flows(case: NetworkCase, choices: list[Choice]) -> Iterator[tuple[float, str, float]]:
    pricer, traffic = FlowPricer(case), traffic_of(case)
    rates = fabric_rates(case.cluster, case.device, case.stack) if case.stack is not None else None
    if rates is not None:
        pricer.slow_links(link_fractions(case.kind, _tiers(case), rates))
    for index, (choice, size) in enumerate(zip(choices, case.sizes, strict=True)):
        flows_s, link, busy_s = pricer.price(choice.algorithm, float(size))
        if rates is None:
            yield flows_s, link, busy_s / flows_s if flows_s > 0 else 0.0
            continue
        algorithm = runnable_algorithms(case.kind, case.fabric)[choice.algorithm]
        one = GroupTraffic(traffic.num_bytes[[index]], traffic.extents[:, [index]])
        wire_s = np.array([max(flows_s - pricer.empty_s(choice.algorithm), 0.0)])
        demand = algorithm.demand(case.kind, one, rates)
        shared = replace(one, contention=contention_of_flows(case.kind, demand, rates, wire_s))
        time_s = float(_library_s(case, demand, shared, rates)[0])
        yield time_s, link, busy_s / time_s


def _tiers(case: NetworkCase) -> list[str]:
    """Tier of each level of the fabric."""
    fabric = case.cluster.fabric
    if isinstance(fabric, HierarchicalFabric):
        return [level.tier for level in fabric.levels]
    return ["torus"] * len(case.fabric.levels)


def _notes(case: NetworkCase, choices: list[Choice]) -> tuple[str, ...]:
    notes = []
    if case.stack is None:
        notes.append(
            "ideal: nominal bandwidth, one hop latency per round; name a --stack for what a library makes of it"
        )
    if case.algorithm == AUTO and any(choice.protocol for choice in choices):
        priced = "; times are of the stack's own choice between them" if case.stack is not None else ""
        notes.append(f"algorithm and protocol as NCCL 2.30.7's tuner takes them{priced}")
    if case.algorithm == IN_SWITCH and case.device.generation not in NVLS_EFFICIENCY:
        notes.append(f"switches of {case.device.id} do not reduce; this is what they would take")
    if case.engine == "flow" and any(choice.algorithm != "direct" for choice in choices):
        notes.append("flows: rounds of a plan wait for each other; chunks are not pipelined")
    if case.shares is not None:
        notes.append("size: what the mean rank sends, shared out as the token matrix says")
    return tuple(notes)
