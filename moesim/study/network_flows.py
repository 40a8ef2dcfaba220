"""Prices of one collective by the flow engine on the cluster's real wires."""

from __future__ import annotations

import numpy as np

from moesim.cost.algorithm_choice import runnable_algorithms
from moesim.cost.collective_algorithms.exchanges import AbstractAllToAll
from moesim.errors import Problem, ScenarioError
from moesim.structure.communication_plans import CommunicationPlan
from moesim.study.network_questions import NetworkCase

MOST_FLOWS = 300_000
HARDLY_ANY_BYTES = 1e-6
MOST_PLANNED_RANKS = 256


class FlowPricer:
    """Flow engine for one question; the topology is built once."""

    def __init__(self, case: NetworkCase) -> None:
        from moesim.structure.topology_builders import build_topology

        self._case = case
        self._topology = build_topology(case.cluster, case.device)
        self._fractions: dict[str, float] = {}
        self._empty_s: dict[str, float] = {}

    def slow_links(self, fractions: dict[str, float]) -> None:
        """Let links of each tier reach a fraction of their bandwidth only."""
        self._fractions = fractions

    def empty_s(self, algorithm: str) -> float:
        """Seconds of messages of hardly any bytes: the hops alone."""
        if algorithm not in self._empty_s:
            self._empty_s[algorithm] = self.price(algorithm, HARDLY_ANY_BYTES)[0]
        return self._empty_s[algorithm]

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the builder took where the profile is silent."""
        return self._topology.assumptions

    def price(self, algorithm: str, size: float) -> tuple[float, str, float]:
        """Time, busiest link and how long it sends.

        Parameters
        ----------
        algorithm : str
            Name of the algorithm.
        size : float
            Bytes as nccl-tests counts them.

        Returns
        -------
        tuple of float, str, float
            Seconds until the last byte has arrived; name of the busiest link; seconds of its bytes at its nominal
            bandwidth.

        Raises
        ------
        ScenarioError
            If the plan is too large to simulate, or reduces in switches.
        """
        from moesim.engine.flow_network_traffic import all_to_all_v, plan_flows, simulate_flows, uniform_all_to_all
        from moesim.structure.topology_symmetry import RankPattern

        case, devices = self._case, np.arange(self._case.ranks)
        if algorithm == "direct" and case.shares is not None:
            result = all_to_all_v(self._topology, devices, case.shares * size, link_fractions=self._fractions)
        elif algorithm == "direct":
            pattern = RankPattern(case.ranks, case.ranks)
            each = size / case.ranks
            result = uniform_all_to_all(self._topology, pattern, each, link_fractions=self._fractions)
        else:
            flows = plan_flows(devices, self._plan(algorithm, size))
            result = simulate_flows(self._topology, flows, link_fractions=self._fractions)
        if not len(result.links.channel):
            return result.makespan_s, "none", 0.0
        busy = result.links.num_bytes / self._topology.channels.bandwidth[result.links.channel]
        busiest = int(busy.argmax())
        return result.makespan_s, self._topology.channels.name(int(result.links.channel[busiest])), float(busy[busiest])

    def _plan(self, algorithm: str, size: float) -> CommunicationPlan:
        case = self._case
        if case.ranks > MOST_PLANNED_RANKS:
            message = f"the plan of {algorithm} over {case.ranks} ranks is too long to simulate round by round"
            raise _too_large(message, f"use at most {MOST_PLANNED_RANKS} ranks, or --engine closed")
        one = runnable_algorithms(case.kind, case.fabric)[algorithm]
        if case.shares is not None and isinstance(one, AbstractAllToAll):
            plan = one.plan_of_matrix(case.shares * size, case.layout)
        else:
            plan = one.plan(case.kind, size, case.layout)
        flows = sum(len(transfers) for chain in plan.chains for transfers in chain)
        if flows > MOST_FLOWS:
            message = f"the plan of {algorithm} over {case.ranks} ranks has {flows} transfers"
            raise _too_large(message, f"at most {MOST_FLOWS} are simulated; use fewer ranks, or --engine closed")
        return plan


def _too_large(message: str, remedy: str) -> ScenarioError:
    return ScenarioError([Problem(code="E-NET-003", message=message, remedy=remedy, field="ranks")])
