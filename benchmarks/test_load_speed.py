"""Drawing token loads and pricing what grows with them. Nothing here fails for being slow."""

from __future__ import annotations

import pytest
from random_scenarios import shipped_library

from moesim.cost.loaded_times import loaded_times
from moesim.engine.uneven_steps import UnevenSteps
from moesim.estimation.loading import load
from moesim.structure.layers import layer_sequence
from moesim.structure.lowering import LoweringContext
from moesim.structure.lowering_moe import moe_part
from moesim.structure.token_loads import GroupSizes, LoadLaw, expert_group_members, rank_loads, token_loads

CASES = {
    "mixtral_8x7b": (GroupSizes(4096, 8, 2, num_ranks=8, expert_data=2), 100, 32),
    "deepseek_v3": (GroupSizes(4096, 256, 8, num_ranks=64, expert_data=2), 1, 61),
}
DIRICHLET = LoadLaw("preset", preset="W3")


@pytest.mark.benchmark(group="targeted")
@pytest.mark.parametrize("name", CASES)
def test_loads_of_all_draws_and_layers(benchmark, name):
    sizes, draws, layers = CASES[name]
    loads = benchmark(token_loads, DIRICHLET, sizes, steps=range(draws), layers=range(layers), seed=1)
    assert loads.sent_rows.shape == (draws, layers, sizes.num_groups, sizes.num_ranks)


@pytest.mark.benchmark(group="targeted")
@pytest.mark.parametrize("name", CASES)
def test_seconds_at_all_loads(benchmark, name):
    sizes, draws, layers = CASES[name]
    scenario = load(name, library=shipped_library())
    context = LoweringContext(scenario.scenario, scenario.system.stack, scenario.columns)
    kind = next(kind for kind in layer_sequence(scenario.scenario.model).kinds if kind.is_moe)
    operations = moe_part(context, kind, scenario.system.load_factor).operations
    members = expert_group_members(scenario.scenario.parallelism.rank_order, sizes)
    loads = rank_loads(token_loads(DIRICHLET, sizes, steps=range(draws), layers=range(layers), seed=1), members)
    times = benchmark(loaded_times, operations, loads, scenario.system.hardware)
    assert times.seconds(next(iter(times.kinds)), 0).shape == (draws, members.size)


@pytest.mark.benchmark(group="whole")
@pytest.mark.parametrize("name", CASES)
def test_steps_at_drawn_loads(benchmark, name):
    """A hundred steps of Mixtral on 64 ranks; one of DeepSeek-V3 on 2,048, both copies of DualPipe."""
    fields = ["model.moe.router.imbalance={kind: preset, name: W3}"]
    if name == "deepseek_v3":
        fields.append("parallelism.pipeline.schedule=dualpipe")
    scenario = load(name, assignments=fields, library=shipped_library())
    draws = CASES[name][1]
    runs = benchmark(lambda: UnevenSteps(scenario.system, scenario.columns, seed=1).run(range(draws)))
    assert runs.run.step_time_s.shape == (draws,)
