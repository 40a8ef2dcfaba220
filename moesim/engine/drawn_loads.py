"""Drawn loads of a whole model: each MoE layer's tokens on the ranks of a stage, seconds of what grows with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.cost.loaded_times import LoadedTimes, loaded_times
from moesim.cost.operators import Hardware
from moesim.describe.model import Imbalance
from moesim.describe.scenario import Scenario
from moesim.engine.analytical import System
from moesim.structure.columns import DROPLESS, Columns, FloatArray
from moesim.structure.layers import LayerKind, LayerSequence
from moesim.structure.lowering import LoweringContext
from moesim.structure.lowering_moe import RoutedTokens, moe_part, routed_tokens
from moesim.structure.parameters import mtp_layer_kind
from moesim.structure.step_graph import Operation
from moesim.structure.token_loads import (
    GroupSizes,
    LoadLaw,
    RankLoads,
    Slots,
    expert_group_members,
    rank_loads,
    token_drops,
    token_loads,
)

DROP_CELLS = 5_000_000
"""Cells of token matrices that are drawn to count drops."""
LoadKey = tuple[int, str, int]
"""(layer number, phase, position in the table of the layer's MoE block)."""


def load_law(imbalance: Imbalance) -> LoadLaw:
    """Law of a scenario's imbalance."""
    fields = imbalance.model_dump()
    names = {"value": "max_over_mean", "name": "preset"}
    return LoadLaw(**{names.get(key, key): value for key, value in fields.items()})


def even_load(degrees: FloatArray) -> FloatArray:
    """Load factor of ranks with mean load: 1."""
    return np.ones(degrees.shape)


def with_even_loads(system: System) -> System:
    """Return the system at mean load everywhere."""
    return replace(system, load_factor=even_load)


@dataclass(frozen=True)
class KindLoads:
    """Loads of the MoE layers of one kind, one set per direction in which micro-batches pass the pipeline.

    ``numbers`` are the layers', in the order of the first axis of ``loads``; ``operations`` those of the kind's MoE
    table.
    """

    numbers: tuple[int, ...]
    operations: tuple[Operation, ...]
    loads: tuple[RankLoads, ...]

    def times(self, hardware: Hardware, direction: int = 0) -> LoadedTimes:
        """Seconds of the growing operations."""
        return loaded_times(self.operations, self.loads[direction], hardware)


@dataclass(frozen=True)
class DrawnLoads:
    """Loads of all MoE layers in some draws; ``kinds`` is empty where every rank has its mean load, exactly."""

    kinds: tuple[KindLoads, ...]

    def rows_factor(self, number: int, direction: int = 0) -> FloatArray:
        """Rows of a layer's experts over their mean, shape (n_draws, n_ranks); (1, 1) where even."""
        for kind in self.kinds:
            if number in kind.numbers:
                return np.asarray(kind.loads[direction].rows[kind.numbers.index(number)])
        return np.ones((1, 1))

    def seconds(self, hardware: Hardware, direction: int = 0) -> Mapping[LoadKey, FloatArray]:
        """Seconds of what grows with load, arrays (n_draws, n_ranks), gathered when asked for."""
        parts: dict[LoadKey, tuple[LoadedTimes, int, int]] = {}
        for kind in self.kinds:
            times = kind.times(hardware, direction)
            for layer, number in enumerate(kind.numbers):
                for index in times.kinds:
                    parts[number, kind.operations[index].phase, index] = (times, index, layer)
        return _GatheredSeconds(parts)

    def max_over_mean(self) -> FloatArray:
        """Fullest rank over the mean, averaged over layers, shape (n_draws,)."""
        if not self.kinds:
            return np.ones(1)
        fullest = [loads.rows.max(axis=2) for kind in self.kinds for loads in kind.loads]
        return np.asarray(np.concatenate(fullest).mean(axis=0))


@dataclass(frozen=True)
class _GatheredSeconds(Mapping[LoadKey, FloatArray]):
    parts: Mapping[LoadKey, tuple[LoadedTimes, int, int]]

    def __getitem__(self, key: LoadKey) -> FloatArray:
        times, index, layer = self.parts[key]
        return times.seconds(index, layer)

    def __iter__(self) -> Iterator[LoadKey]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def moe_layers(scenario: Scenario, sequence: LayerSequence) -> dict[LayerKind, tuple[int, ...]]:
    """Numbers of the MoE layers that a step runs, by kind; modules of token prediction come after the last layer."""
    kinds = [sequence.kinds[index] for index in sequence.order]
    if scenario.workload.kind == "training":
        kinds += [mtp_layer_kind(sequence)] * sequence.mtp_layers
    found: dict[LayerKind, tuple[int, ...]] = {}
    for number, kind in enumerate(kinds):
        if kind.is_moe and not (kind.side == "encoder" and scenario.workload.kind == "decode"):
            found[kind] = (*found.get(kind, ()), number)
    return found


def group_sizes(system: System, columns: Columns, kind: LayerKind, directions: int = 1) -> GroupSizes:
    """Expert-parallel groups that run the layers of a kind: those of a stage, once per direction of a pipeline."""
    moe = system.scenario.model.moe
    assert moe is not None
    tokens = routed_tokens(LoweringContext(system.scenario, system.stack, columns), kind.side).tokens
    return GroupSizes(
        tokens_per_rank=max(round(float(tokens[0])), 1),
        num_experts=moe.num_experts,
        experts_per_token=moe.router.experts_per_token,
        num_ranks=round(float(columns["expert"][0])),
        expert_data=round(float(columns["expert_data"][0])) * directions,
        expert_tensor=round(float(columns["expert_tensor"][0])),
    )


def drawn_loads(
    system: System,
    columns: Columns,
    sequence: LayerSequence,
    *,
    steps: Sequence[int],
    seed: int,
    directions: int = 1,
) -> DrawnLoads:
    """Draw the loads of every MoE layer.

    Parameters
    ----------
    system : System
        Scenario and stack.
    columns : Columns
        Resolved and legal, one row.
    sequence : LayerSequence
        Layers of the model.
    steps : sequence of int
        Numbers of the draws.
    seed : int
        Of all draws.
    directions : int
        Copies of the model in a pipeline that is entered from both ends; each has expert-parallel groups of its own.

    Returns
    -------
    DrawnLoads
        Even where the scenario's loads are uniform, or where experts have slots that are computed whether filled or
        not.
    """
    moe = system.scenario.model.moe
    if moe is None or moe.router.imbalance.kind == "uniform" or float(columns["capacity_factor"][0]) != DROPLESS:
        return DrawnLoads(())
    law, context = load_law(moe.router.imbalance), LoweringContext(system.scenario, system.stack, columns)
    kinds = []
    for kind, numbers in moe_layers(system.scenario, sequence).items():
        both = group_sizes(system, columns, kind, directions)
        loads = token_loads(law, both, steps=steps, layers=numbers, seed=seed)
        sizes = replace(both, expert_data=both.expert_data // directions)
        members = expert_group_members(system.scenario.parallelism.rank_order, sizes)
        parts = [
            replace(
                loads,
                sizes=sizes,
                expert_rows=loads.expert_rows[:, :, first : first + sizes.num_groups],
                sent_rows=loads.sent_rows[:, :, first : first + sizes.num_groups],
            )
            for first in range(0, both.num_groups, sizes.num_groups)
        ]
        operations = tuple(moe_part(context, kind, even_load).operations)
        kinds.append(KindLoads(numbers, operations, tuple(rank_loads(part, members) for part in parts)))
    return DrawnLoads(tuple(kinds))


def drawn_drops(
    system: System, columns: Columns, sequence: LayerSequence, *, steps: Sequence[int], seed: int
) -> FloatArray:
    """Share of the assignments that experts' slots drop, averaged over MoE layers.

    Parameters
    ----------
    system : System
        Scenario and stack.
    columns : Columns
        Resolved and legal, one row.
    sequence : LayerSequence
        Layers of the model.
    steps : sequence of int
        Numbers of the draws.
    seed : int
        Of all draws.

    Returns
    -------
    ndarray of shape (n_draws,)
        Zero where routing is dropless. At most ``DROP_CELLS`` cells of token matrices are drawn: of large groups, the
        tokens of some ranks stand for those of all.
    """
    moe = system.scenario.model.moe
    if moe is None or float(columns["capacity_factor"][0]) == DROPLESS:
        return np.zeros(len(steps))
    context, law = LoweringContext(system.scenario, system.stack, columns), load_law(moe.router.imbalance)
    layers = moe_layers(system.scenario, sequence)
    cells = len(steps) * sum(len(numbers) for numbers in layers.values()) * moe.num_experts
    dropped, count = np.zeros(len(steps)), 0
    for kind, numbers in layers.items():
        sizes = group_sizes(system, columns, kind)
        capacity = _slots(routed_tokens(context, kind.side))
        sources = DROP_CELLS // max(cells * sizes.num_groups * capacity.routing_groups, 1)
        drops = token_drops(
            law, sizes, capacity, steps=steps, layers=numbers, seed=seed, sources=min(max(sources, 1), sizes.num_ranks)
        )
        dropped += drops.dropped_fraction().sum(axis=1)
        count += len(numbers)
    return dropped / max(count, 1)


def _slots(routed: RoutedTokens) -> Slots:
    return Slots(float(routed.slots[0]), max(round(float(routed.groups[0])), 1))
