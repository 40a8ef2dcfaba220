"""What a stack's library makes of one collective: of its own choice, of a named algorithm, or of flows' wire time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.cost.collective_demands import CollectiveDemand, GroupTraffic, wire_time_s
from moesim.cost.communication_libraries import FabricRates, Protocol, Transfer, transfer
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import CollectiveKind


def named_algorithm_s(
    kind: CollectiveKind, demand: CollectiveDemand, traffic: GroupTraffic, rates: FabricRates
) -> FloatArray:
    """Seconds of one algorithm under the library's constants, the faster of its two protocols, (n_cases,).

    Parameters
    ----------
    kind : str
        Kind of collective.
    demand : CollectiveDemand
        What the algorithm asks of each level.
    traffic : GroupTraffic
        The cases.
    rates : FabricRates
        Levels under the stack.

    Returns
    -------
    ndarray of shape (n_cases,)
        An algorithm that the library does not have is priced as if it had it, with the latencies and fractions of its
        exchanges, reductions or messages.
    """
    return np.asarray(np.min([one.time_s for one in _transfers(kind, demand, traffic, rates)], axis=0))


def contention_of_flows(
    kind: CollectiveKind, demand: CollectiveDemand, rates: FabricRates, wire_s: FloatArray
) -> FloatArray:
    """Wire time of flows over that of the closed form, both on links of the library's fractions, (n_cases,).

    Parameters
    ----------
    kind : str
        Kind of collective.
    demand : CollectiveDemand
        What the algorithm asks of each level.
    rates : FabricRates
        Levels under the stack.
    wire_s : ndarray of shape (n_cases,)
        When the flows end, less what empty ones take, on links slowed by ``link_fractions``.

    Returns
    -------
    ndarray of shape (n_cases,)
        ``GroupTraffic.contention`` for the library's formula; 1 where nothing is sent.
    """
    protocols = _bulk_protocols(kind, demand.algorithm, rates)
    bandwidths = [
        level.bandwidth * min(float(one.fraction), 1.0) for level, one in zip(rates.levels, protocols, strict=True)
    ]
    closed_s = wire_time_s(demand, bandwidths)
    return np.divide(wire_s, closed_s, out=np.ones_like(wire_s), where=closed_s > 0)


def link_fractions(kind: CollectiveKind, tiers: Sequence[str], rates: FabricRates) -> dict[str, float]:
    """Part of the nominal bandwidth of each tier of links that long messages of a kind reach, at most 1."""
    protocols = _bulk_protocols(kind, "", rates)
    return {tier: min(float(one.fraction), 1.0) for tier, one in zip(tiers, protocols, strict=True)}


def _transfers(
    kind: CollectiveKind, demand: CollectiveDemand, traffic: GroupTraffic, rates: FabricRates
) -> list[Transfer]:
    """Bulk protocol, and the quick one where the library has it for this kind."""
    bulk = _bulk_protocols(kind, demand.algorithm, rates)
    found = [transfer(demand, bulk, traffic, rates)]
    quick: list[Protocol | None] = [None] * len(bulk)
    if kind == "all_to_all":
        quick = [level.quick_exchange for level in rates.levels]
    elif kind != "point_to_point" and demand.algorithm != IN_SWITCH:
        quick = [level.quick_reduction for level in rates.levels]
    if any(quick):
        protocols = [one or other for one, other in zip(quick, bulk, strict=True)]
        found.append(transfer(demand, protocols, traffic, rates))
    return found


IN_SWITCH = "nvls"


def _bulk_protocols(kind: CollectiveKind, algorithm: str, rates: FabricRates) -> list[Protocol]:
    if kind == "all_to_all":
        return [level.exchange for level in rates.levels]
    if kind == "point_to_point":
        return [level.message for level in rates.levels]
    protocols = [level.reduction for level in rates.levels]
    in_switch = rates.levels[0].in_switch
    if algorithm == IN_SWITCH and in_switch is not None:
        protocols[0] = in_switch
    return protocols
