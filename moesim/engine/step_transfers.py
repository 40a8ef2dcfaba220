"""What the collectives of a step do to the links: profiles per operation, and the ports of the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moesim.cost.communication_libraries import FabricRates
from moesim.cost.link_occupancy import LinkOccupancy, link_occupancy
from moesim.cost.state_costs import hop_message, state_collectives
from moesim.describe.hardware import Cluster, HierarchicalFabric
from moesim.describe.quantities import PRECISION_BYTES
from moesim.engine.shared_links import LinkTransfer
from moesim.engine.step_passes import PreparedStep
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.lowering import LoweringContext
from moesim.structure.memory_footprint import stage_parameters
from moesim.structure.pipeline_orders import FORWARD
from moesim.structure.rank_programs import StageRanks, StreamOperation
from moesim.structure.step_graph import Collective, CollectiveKind

SEND, RECEIVE = 0, 1


@dataclass(frozen=True)
class Profile:
    """A collective per second of its time on idle links: the part that is wire, and of that what each level takes."""

    wire: float = 0.0
    levels: tuple[float, ...] = ()

    @staticmethod
    def of(occupancies: Sequence[LinkOccupancy], case: int = 0) -> Profile:
        """Profile of collectives one after the other."""
        time_s = sum(float(one.time_s[case]) for one in occupancies)
        wire_s = sum(float(one.wire_s[case]) for one in occupancies)
        if wire_s <= 0.0:
            return Profile()
        busy_s = np.sum([one.level_s[:, case] for one in occupancies], axis=0)
        return Profile(wire_s / time_s, tuple((busy_s / wire_s).tolist()))


@dataclass(frozen=True)
class Ports:
    """Ports of the stages: what one rank of each has of every level, sending and receiving apart.

    Attributes
    ----------
    number : ndarray of int, shape (stages, n_levels, 2)
        Resource of a stage's level and direction; stages whose ranks share a NIC share it.
    capacity : ndarray of shape (n_resources,)
        In shares of one rank.
    """

    number: IntArray
    capacity: FloatArray

    def of(self, stage: int, level: int) -> IntArray:
        """Both directions of a stage's level, shape (2,); raises ``ValueError`` where there is no such link."""
        stages, levels = self.number.shape[:2]
        if not (0 <= stage < stages and 0 <= level < levels):
            raise ValueError(f"no level {level} of stage {stage}: there are {levels} levels and {stages} stages")
        return np.asarray(self.number[stage, level])

    def busy_s(self, carried: FloatArray) -> FloatArray:
        """Time each level's share was full with what was sent, (stages, n_levels), from what resources carried."""
        return np.asarray((carried / self.capacity)[self.number[:, :, SEND]])


def stage_ports(cluster: Cluster, fabric: FabricRates, ranks: StageRanks) -> Ports:
    """Ports of the stages of a job on a cluster.

    Parameters
    ----------
    cluster : Cluster
        Which says how many NICs the devices of a node share.
    fabric : FabricRates
        Its levels.
    ranks : StageRanks
        Where the stages are.
    """
    levels = len(fabric.levels)
    number = np.arange(ranks.stages * levels * 2).reshape(ranks.stages, levels, 2)
    capacity = np.ones(number.size)
    nodes = [
        frozenset((ranks.global_ranks(stage) // cluster.devices_per_node).tolist()) for stage in range(len(number))
    ]
    for level in _levels_of_shared_nics(cluster):
        for stage, own in enumerate(nodes):
            first = next(other for other in range(stage + 1) if nodes[other] & own)
            if first < stage:
                number[stage, level] = number[first, level]
                capacity[number[first, level]] += 1.0
    return Ports(number, capacity)


def _levels_of_shared_nics(cluster: Cluster) -> list[int]:
    """Levels on which the devices of a node have fewer NICs than they are."""
    if not isinstance(cluster.fabric, HierarchicalFabric):
        return []
    nics = [level.nics_per_node for level in cluster.fabric.levels]
    return [index for index, count in enumerate(nics) if count is not None and count < cluster.devices_per_node]


@dataclass(frozen=True)
class StepTransfers:
    """Transfers of a step by what they are for; all seconds are those on idle links.

    Attributes
    ----------
    ports : Ports
        Resources.
    operations : mapping of StreamOperation to Profile
        Collectives of blocks; what is missing occupies nothing.
    reductions, gathers, forward_state, backward_state : tuple of Profile
        By stage: gradients and updated parameters of a step, ZeRO's collectives of a pass.
    message : Profile
        Activations to the next stage.
    exposed_hop_s, hidden_hop_s : float
        Part of a message that the next stage waits for, and the rest.
    uses_ports : bool
        Whether transfers meet.
    """

    ports: Ports
    operations: Mapping[StreamOperation, Profile]
    reductions: tuple[Profile, ...]
    gathers: tuple[Profile, ...]
    forward_state: tuple[Profile, ...]
    backward_state: tuple[Profile, ...]
    message: Profile
    exposed_hop_s: float
    hidden_hop_s: float
    uses_ports: bool = True
    _usage: dict[tuple[Profile, int, int], dict[int, float]] = field(default_factory=dict)

    def on_private_links(self) -> StepTransfers:
        """The same where nothing is shared."""
        return replace(self, uses_ports=False)

    def operation(self, stage: int, operation: StreamOperation, seconds: float) -> LinkTransfer:
        """A part of a block's collective."""
        return self._transfer(self.operations.get(operation, Profile()), seconds, stage, stage)

    def reduction(self, stage: int, seconds: float) -> LinkTransfer:
        """A part of the gradients' reduction."""
        return self._transfer(self.reductions[stage], seconds, stage, stage)

    def gather(self, stage: int, seconds: float) -> LinkTransfer:
        """A part of the updated parameters' gather."""
        return self._transfer(self.gathers[stage], seconds, stage, stage)

    def pass_state(self, stage: int, phase: int, seconds: float) -> LinkTransfer:
        """A part of ZeRO's collectives of a pass."""
        profiles = self.forward_state if phase == FORWARD else self.backward_state
        return self._transfer(profiles[stage], seconds, stage, stage)

    def hop(self, source: int, target: int) -> tuple[LinkTransfer, LinkTransfer | None]:
        """A message between stages: the part that is waited for, and the rest."""
        exposed = self._transfer(self.message, self.exposed_hop_s, source, target)
        hidden = self._transfer(self.message, self.hidden_hop_s, source, target) if self.hidden_hop_s else None
        return exposed, hidden

    def _transfer(self, profile: Profile, seconds: float, source: int, target: int) -> LinkTransfer:
        if not self.uses_ports:
            return LinkTransfer(seconds, 0.0)
        key = (profile, source, target)
        if key not in self._usage:
            send, receive = self.ports.number[source, :, SEND], self.ports.number[target, :, RECEIVE]
            usage: dict[int, float] = {}
            for numbers in (send, receive):
                usage |= {int(port): part for port, part in zip(numbers, profile.levels, strict=False) if part > 0.0}
            self._usage[key] = usage
        return LinkTransfer((1.0 - profile.wire) * seconds, profile.wire * seconds, self._usage[key])


def step_transfers(step: PreparedStep) -> StepTransfers:
    """Transfers of a prepared step."""
    fabric = step.system.hardware.fabric
    operations: dict[StreamOperation, Profile] = {}
    for program in step.block_programs:
        for row in program.operations:
            work = program.block.tables[row.table][0].operations[row.index][0].work
            if isinstance(work, Collective):
                operations[row] = Profile.of([link_occupancy(work, fabric)])
    reductions, gathers = _state_profiles(step)
    context = LoweringContext(step.system.scenario, step.system.stack, step.columns)
    message = Profile.of([link_occupancy(hop_message(step.columns, context), fabric)])
    return StepTransfers(
        ports=stage_ports(step.system.cluster, fabric, step.ranks),
        operations=operations,
        reductions=reductions,
        gathers=gathers,
        forward_state=gathers,
        backward_state=reductions,
        message=message,
        exposed_hop_s=step.exposed_hop_s,
        hidden_hop_s=step.hop_s - step.exposed_hop_s,
    )


def _state_profiles(step: PreparedStep) -> tuple[tuple[Profile, ...], tuple[Profile, ...]]:
    """Profiles of the gradients' reduction and of the parameters' gather, by stage."""
    scenario, plan = step.system.scenario, step.evaluation.plan
    context = LoweringContext(scenario, step.system.stack, step.columns)
    parameters = stage_parameters(scenario, step.sequence, plan)
    reduced = PRECISION_BYTES[scenario.precision.reduction]
    stored = PRECISION_BYTES[scenario.precision.parameters]
    reduction: CollectiveKind = "all_reduce" if float(step.columns["zero_stage"][0]) == 0 else "reduce_scatter"
    kinds: tuple[tuple[CollectiveKind, float], ...] = ((reduction, reduced), ("all_gather", stored))
    found = []
    for kind, width in kinds:
        by_stage = []
        for stage in range(plan.stages):
            works = [
                Collective(kind, elements[stage] * width, group)
                for elements, group in state_collectives(context, parameters)
            ]
            by_stage.append(Profile.of([link_occupancy(work, step.system.hardware.fabric) for work in works]))
        found.append(tuple(by_stage))
    return found[0], found[1]
