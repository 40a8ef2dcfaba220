"""Prices of one collective by the flow engine on the cluster's real wires."""

from __future__ import annotations

import numpy as np

from moesim.cost.algorithm_choice import runnable_algorithms
from moesim.cost.collective_algorithms.exchanges import AbstractAllToAll
from moesim.errors import Problem, ScenarioError
from moesim.structure.communication_plans import CommunicationPlan
from moesim.study.network_questions import NetworkCase

MOST_FLOWS = 300_000
MOST_PLANNED_RANKS = 256


class FlowPricer:
    """Flow engine for one question; the topology is built once."""

    def __init__(self, case: NetworkCase) -> None:
        from moesim.structure.topology_builders import build_topology

        self._case = case
        self._topology = build_topology(case.cluster, case.device)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the builder took where the profile is silent."""
        return self._topology.assumptions

    def price(self, algorithm: str, size: float) -> tuple[float, str, float]:
        """Time, busiest link and its utilisation.

        Parameters
        ----------
        algorithm : str
            Name of the algorithm.
        size : float
            Bytes as nccl-tests counts them.

        Returns
        -------
        tuple of float, str, float
            Seconds until the last byte has arrived; name of the busiest link; part of the time it sends.

        Raises
        ------
        ScenarioError
            If the plan is too large to simulate, or reduces in switches.
        """
        from moesim.engine.flow_network_traffic import all_to_all_v, plan_flows, simulate_flows, uniform_all_to_all
        from moesim.structure.topology_symmetry import RankPattern

        case, devices = self._case, np.arange(self._case.ranks)
        if algorithm == "direct" and case.shares is not None:
            result = all_to_all_v(self._topology, devices, case.shares * size)
        elif algorithm == "direct":
            pattern = RankPattern(case.ranks, case.ranks)
            result = uniform_all_to_all(self._topology, pattern, size / case.ranks)
        else:
            result = simulate_flows(self._topology, plan_flows(devices, self._plan(algorithm, size)))
        link, utilisation = result.busiest(self._topology)
        return result.makespan_s, link, utilisation

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
