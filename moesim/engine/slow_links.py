"""Collectives, transfers and gradients of a step some of whose links are slow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from moesim.cost.loaded_times import LoadedTimes, loaded_times
from moesim.cost.operators import price
from moesim.engine.breakdowns import StepEnd
from moesim.engine.drawn_loads import DrawnLoads, KindLoads, LoadKey
from moesim.engine.step_passes import PreparedStep, prepare_step
from moesim.engine.uneven_world import LinkCases, degraded, group_link_cases
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.step_graph import Collective, Operation

Factors = tuple[float, ...]
"""Share of the bandwidth left on each level."""


@dataclass(frozen=True)
class SlowLinks:
    """Prices of one step's links; what distinct sets of factors make of it is worked out once.

    Attributes
    ----------
    step : PreparedStep
        The step at mean load with all its bandwidth.
    loads : DrawnLoads
        What all-to-alls and gathers of experts carry.
    factors : ndarray of shape (all ranks, n_levels)
        Share of its bandwidth left to each rank on each level.
    steps : dict
        The step at reduced bandwidth of every link, by factors; may be shared by several draws.
    """

    step: PreparedStep
    loads: DrawnLoads
    factors: FloatArray
    steps: dict[Factors, PreparedStep] = field(default_factory=dict)
    _cases: dict[tuple[int, str], LinkCases] = field(default_factory=dict)
    _loaded: dict[tuple[int, int, Factors], LoadedTimes] = field(default_factory=dict)
    _between: dict[tuple[int, int], FloatArray] = field(default_factory=dict)

    def collective_s(self, at: tuple[int, int], operation: Operation, key: LoadKey) -> FloatArray:
        """Seconds of a collective on the ranks of a (stage, direction); see ``step_passes.LinkPrices``."""
        assert isinstance(operation.work, Collective)
        stage, direction = at
        cases, seconds = self._link_cases(stage, operation.work.group.dimension), np.zeros((1, 1))
        for case, factors in enumerate(cases.factors.tolist()):
            seconds = np.where(cases.case == case, self._at(tuple(factors), direction, operation, key), seconds)
        return np.asarray(seconds)

    def _link_cases(self, stage: int, dimension: str) -> LinkCases:
        """Distinct factors of a stage's groups along a mesh dimension; ``case`` is that of each rank, (1, n_ranks)."""
        if (stage, dimension) not in self._cases:
            members = self.step.ranks.groups[dimension].members(self.step.ranks.count)
            of_groups = group_link_cases(self.factors[None], self._ranks(stage)[members])
            case = np.empty((1, self.step.ranks.count), dtype=np.int64)
            case[:, members] = of_groups.case[:, :, None]
            self._cases[stage, dimension] = LinkCases(of_groups.factors, case)
        return self._cases[stage, dimension]

    def _at(self, factors: Factors, direction: int, operation: Operation, key: LoadKey) -> FloatArray:
        """Seconds where links of all ranks have the same factors."""
        layer, _, index = key
        if operation.load_factor is not None:
            for number, kind in enumerate(self.loads.kinds):
                if layer in kind.numbers:
                    times = self._loaded_times(number, direction, factors)
                    return times.seconds(index, kind.numbers.index(layer))
        hardware = self._step_at(factors).system.hardware
        return np.full((1, 1), price(replace(operation, load_factor=None), hardware).time_s[0])

    def _loaded_times(self, number: int, direction: int, factors: Factors) -> LoadedTimes:
        key = (number, direction, factors)
        if key not in self._loaded:
            hardware = self._step_at(factors).system.hardware
            kind = self.loads.kinds[number]
            self._loaded[key] = loaded_times(_collectives(kind), kind.loads[direction], hardware)
        return self._loaded[key]

    def _ranks(self, stage: int) -> IntArray:
        return self.step.ranks.global_ranks(stage)

    def _step_at(self, factors: Factors) -> PreparedStep:
        if all(factor == 1.0 for factor in factors):
            return self.step
        if factors not in self.steps:
            system = self.step.system
            slower = replace(system, hardware=degraded(system.hardware, factors))
            self.steps[factors] = prepare_step(slower, self.step.columns)
        return self.steps[factors]

    def _step_of(self, stage: int) -> PreparedStep:
        """The step at the least bandwidth of any rank of a stage: what its gradients and parameters take.

        They are reduced by groups of ranks that hold the same shards. That of a slow rank is as slow as this; those of
        other shards are taken to be.
        """
        return self._step_at(tuple(self.factors[self._ranks(stage)].min(axis=0).tolist()))

    def zero_s(self, stage: int, chunk: int) -> Mapping[int, float]:
        """Seconds of ZeRO's collectives of a chunk's pass, by phase."""
        return self._step_of(stage).zero_s(chunk)

    def step_ends(self) -> list[StepEnd]:
        """What each stage does after its last pass."""
        return [self._step_of(stage).step_ends()[stage] for stage in range(self.step.stages)]

    def hop_s(self, node: int) -> FloatArray:
        """Seconds by which a node is later than what it needs: a transfer between the same place of two stages."""
        nodes = self.step.nodes
        pair = (int(nodes.stage[nodes.needs[node]]), int(nodes.stage[node]))
        if pair not in self._between:
            both = np.minimum(*(self.factors[self._ranks(stage)] for stage in pair))
            self._between[pair] = np.array([[self._step_at(tuple(row)).exposed_hop_s for row in both.tolist()]])
        return self._between[pair]


def _collectives(kind: KindLoads) -> list[Operation]:
    """A kind's operations, of which only collectives still grow."""
    return [row if isinstance(row.work, Collective) else replace(row, load_factor=None) for row in kind.operations]
