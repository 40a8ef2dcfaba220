"""Closed forms stand for transfers and flows within 1 %, on every shipped scenario and 200 random ones.

Three networks price the collectives of a step: closed forms, transfers on the ports of a stage, and flows on the wires
of the cluster. Where each group has links of its own they must agree; where groups share links the difference is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import pytest
from random_scenarios import loaded, random_document, shipped_library, with_fields

from moesim.cost.collectives import collective_time
from moesim.cost.communication_libraries import FabricRates
from moesim.cost.link_occupancy import link_occupancy
from moesim.cost.state_costs import hop_message, state_collectives
from moesim.describe.quantities import PRECISION_BYTES
from moesim.engine.contended_steps import contended_step
from moesim.engine.event_kernel import EventKernel
from moesim.engine.flow_contention import FlowContention
from moesim.engine.shared_links import LinkTransfer, SharedLinks
from moesim.engine.step_passes import PreparedStep, prepare_step
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario, load
from moesim.resources import shipped_scenarios
from moesim.structure.lowering import LoweringContext
from moesim.structure.memory_footprint import stage_parameters
from moesim.structure.step_graph import Collective

WITHIN = 0.01
RANDOM = 200
FEW_PASSES = 24
pytestmark = pytest.mark.slow


@lru_cache
def scenarios() -> list[LoadedScenario]:
    """Shipped ones, and random ones."""
    shipped = [load(path.stem, library=shipped_library()) for path in shipped_scenarios()]
    return shipped + [loaded(random_document(seed)) for seed in range(RANDOM)]


@lru_cache
def steps() -> list[PreparedStep]:
    return [prepare_step(scenario.system, scenario.columns) for scenario in scenarios()]


def collectives(step: PreparedStep) -> Iterator[Collective]:
    """Every collective and message of a step, with its bytes."""
    for program in step.block_programs:
        for row in program.operations:
            work = program.block.tables[row.table][0].operations[row.index][0].work
            if isinstance(work, Collective):
                yield work
    scenario = step.system.scenario
    context = LoweringContext(scenario, step.system.stack, step.columns)
    reduction = "all_reduce" if step.columns["zero_stage"][0] == 0 else "reduce_scatter"
    parameters = stage_parameters(scenario, step.sequence, step.evaluation.plan)
    for elements, group in state_collectives(context, parameters):
        yield Collective(reduction, elements[0] * PRECISION_BYTES[scenario.precision.reduction], group)
        yield Collective("all_gather", elements[0] * PRECISION_BYTES[scenario.precision.parameters], group)
    yield hop_message(step.columns, context)


def time_on_idle_ports_s(work: Collective, fabric: FabricRates) -> float:
    """End of a transfer that is alone on one port per level."""
    occupancy = link_occupancy(work, fabric)
    wire_s, latency_s = float(occupancy.wire_s[0]), float(occupancy.latency_s[0])
    usage = {level: busy_s / wire_s for level, busy_s in enumerate(occupancy.level_s[:, 0].tolist()) if busy_s > 0}
    kernel, ends = EventKernel(), []
    links = SharedLinks(kernel, np.ones(len(fabric.levels)))
    links.start(LinkTransfer(latency_s, wire_s, usage), lambda: ends.append(kernel.now))
    kernel.run()
    return float(ends[0])


def test_each_collective_takes_its_closed_form_on_idle_ports():
    seen = 0
    for step in steps():
        fabric = step.system.hardware.fabric
        for work in collectives(step):
            expected_s = float(collective_time(work, fabric).modelled_s[0])
            assert time_on_idle_ports_s(work, fabric) == pytest.approx(expected_s, rel=WITHIN), work
            seen += expected_s > 0.0
    assert seen > 2000


class Groups(NamedTuple):
    """Groups of one kind of collective that fill a job."""

    kind: str
    size: int
    stride: int


def relation(fabric: FabricRates, groups: Groups) -> Literal["private", "interleaved", "straddling"]:
    """How groups lie: each on links of its own, interleaved on an axis of a torus, or across the ends of domains."""
    reach, inner, is_interleaved = groups.size * groups.stride, 1, False
    for level in fabric.levels:
        outer = inner * level.size
        crosses_ends = level is not fabric.levels[-1] and reach % outer and outer % reach
        if groups.stride < outer and (outer % groups.stride or crosses_ends):
            return "straddling"
        is_interleaved |= level.is_ring and inner < groups.stride < outer
        inner = outer
    return "interleaved" if is_interleaved else "private"


def test_flows_on_the_wires_take_the_closed_form_where_groups_have_links_of_their_own():
    """Interleaved groups are never faster; those across domains have other extents than the closed form's."""
    contention: dict[tuple[str, str, int], FlowContention] = {}
    ratios: dict[str, dict[object, float | None]] = {"private": {}, "interleaved": {}, "straddling": {}}
    for step in steps():
        system = step.system
        job = (system.cluster.id, system.stack.id, system.scenario.devices)
        flows = contention.setdefault(
            job, FlowContention(system.cluster, system.device, system.hardware.fabric, system.scenario.devices)
        )
        for work in collectives(step):
            groups = Groups(work.kind, int(work.group.size.ravel()[0]), int(work.group.stride.ravel()[0]))
            known = ratios[relation(flows.fabric, groups)]
            if groups.size > 1 and (job, groups) not in known:
                known[job, groups] = flows.flows_over_closed_form(*groups)
    different = {key: ratio for key, ratio in ratios["private"].items() if ratio != pytest.approx(1.0, rel=WITHIN)}
    assert not different
    assert len(ratios["private"]) > 700
    assert all(ratio >= 1.0 - WITHIN for ratio in ratios["interleaved"].values())
    assert sum(ratio > 1.0 + WITHIN for ratio in ratios["interleaved"].values()) > 50
    assert len(ratios["straddling"]) < 50


def few_passes(seed: int) -> LoadedScenario:
    """A random scenario with so few micro-batches that running them all is quick."""
    document = random_document(seed)
    scenario = loaded(document)
    columns = scenario.columns
    chunks = columns["stages"][0] * columns["virtual_stages"][0]
    if columns["num_micro_batches"][0] * chunks <= FEW_PASSES:
        return scenario
    sequences = columns["step_sequences"][0] * columns["stages"][0] / columns["num_micro_batches"][0]
    return loaded(with_fields(document, {"workload.sequences_per_step": int(sequences)}))


def test_steps_on_private_links_take_the_closed_time_and_shared_ones_report_the_difference():
    """Shipped scenarios are compared in ``test_contended_steps``."""
    longer = 0
    for seed in range(RANDOM):
        scenario = few_passes(seed)
        found = contended_step(scenario.system, scenario.columns)
        expected_s = estimate_loaded(scenario).step_time_s
        assert found.closed_step_time_s == pytest.approx(expected_s, rel=1e-9), seed
        added_s = sum(found.added_s.values())
        np.testing.assert_allclose(added_s, found.contention_s, atol=1e-9 * expected_s, rtol=0)
        longer += found.contention_s > 1e-9 * expected_s
    assert longer > 40
