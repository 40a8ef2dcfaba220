"""Seconds at drawn loads: the price functions' own, exact at mean load, each operation with the load it grows with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from random_scenarios import shipped_library

from moesim.cost.loaded_times import load_kind, loaded_times
from moesim.cost.operators import price, price_all
from moesim.estimation.loading import LoadedScenario, load
from moesim.structure.layers import layer_sequence
from moesim.structure.lowering import LoweringContext
from moesim.structure.lowering_moe import moe_part
from moesim.structure.step_graph import Operation
from moesim.structure.token_loads import GroupSizes, LoadLaw, RankLoads, expert_group_members, rank_loads, token_loads

SCENARIOS = ("mixtral_8x7b", "deepseek_v3", "qwen3_30b_a3b")
SPLIT = ("parallelism.expert_tensor=2", "parallelism.expert=4")


def operations_of(scenario: LoadedScenario, factor: float = 1.0) -> Sequence[Operation]:
    kinds = layer_sequence(scenario.scenario.model).kinds
    context = LoweringContext(scenario.scenario, scenario.system.stack, scenario.columns)
    kind = next(kind for kind in kinds if kind.is_moe)
    return moe_part(context, kind, lambda degrees: np.full(degrees.shape, factor)).operations


def all_alike(values: Sequence[float]) -> RankLoads:
    """One layer and draw, one rank per load, whatever it is a load of."""
    array = np.array(values)[None, None, :]
    return RankLoads(array, array, array)


@pytest.fixture(scope="module", params=SCENARIOS)
def scenario(request: pytest.FixtureRequest) -> LoadedScenario:
    return load(request.param, library=shipped_library())


def test_mean_load_takes_exactly_what_an_operation_takes_at_mean_load(scenario: LoadedScenario) -> None:
    operations, hardware = operations_of(scenario), scenario.system.hardware
    mixed = loaded_times(operations, all_alike([0.3, 1.0, 2.5]), hardware)
    even = loaded_times(operations, RankLoads.even(), hardware)
    costs = price_all(operations, hardware)
    assert set(mixed.kinds) == {index for index, row in enumerate(operations) if row.load_factor is not None}
    for index in mixed.kinds:
        assert mixed.seconds(index, 0)[0, 1] == costs[index].time_s[0]
        assert even.seconds(index, 0).item() == costs[index].time_s[0]


@pytest.mark.parametrize("load_factor", [1.7, 3.0])
def test_a_load_takes_what_an_estimate_says_of_the_fullest_rank(scenario: LoadedScenario, load_factor: float) -> None:
    """``price`` gives mean time and what the fullest rank takes longer; the sum is its time where it grows."""
    operations, hardware = operations_of(scenario, load_factor), scenario.system.hardware
    times = loaded_times(operations, all_alike([load_factor]), hardware)
    for index in times.kinds:
        cost = price(operations[index], hardware)
        loaded = times.seconds(index, 0).item()
        assert max(loaded, cost.time_s[0]) == pytest.approx(cost.time_s[0] + cost.extra_s[0], rel=1e-12)


def test_no_rows_take_no_seconds_in_kernels(scenario: LoadedScenario) -> None:
    times = loaded_times(operations_of(scenario), all_alike([0.0]), scenario.system.hardware)
    assert {times.seconds(index, 0).item() for index in times.kinds} == {0.0}


def test_each_operation_grows_with_its_own_load() -> None:
    scenario = load("mixtral_8x7b", assignments=SPLIT, library=shipped_library())
    operations = operations_of(scenario)
    one, two = np.ones((1, 1, 1)), np.full((1, 1, 1), 2.0)
    grown = {
        kind: loaded_times(operations, replace(RankLoads(one, one, one), **{kind: two}), scenario.system.hardware)
        for kind in ("rows", "moved", "exchanged")
    }
    even = loaded_times(operations, RankLoads.even(), scenario.system.hardware)
    for index, row in enumerate(operations):
        if load_kind(row) is None:
            continue
        expected = "exchanged" if "all_to_all" in row.name else "moved" if "permute" in row.name else "rows"
        base = even.seconds(index, 0).item()
        assert base > 0
        for kind, times in grown.items():
            assert (times.seconds(index, 0).item() > base) == (kind == expected)


def test_every_layer_draw_and_rank_has_the_seconds_of_its_own_load() -> None:
    """Rows of each rank counted from the loads again, one operation priced for one of them at a time."""
    scenario = load("mixtral_8x7b", assignments=SPLIT, library=shipped_library())
    sizes = GroupSizes(512, 8, 2, num_ranks=4, expert_data=2, expert_tensor=2)
    loads = token_loads(LoadLaw("preset", preset="W3"), sizes, steps=range(3), layers=[4, 9], seed=1)
    members = expert_group_members(scenario.scenario.parallelism.rank_order, sizes)
    operations, hardware = operations_of(scenario), scenario.system.hardware
    times = loaded_times(operations, rank_loads(loads, members), hardware)
    index = next(index for index, row in enumerate(operations) if row.name == "expert.up")
    for group, rank, draw, layer in ((0, 0, 0, 0), (1, 3, 2, 1), (3, 2, 1, 0)):
        replica = 2 * (group // 2)
        both_shards = loads.received_rows[draw, layer, replica : replica + 2, rank].sum()
        factor = np.array([both_shards / (2 * sizes.mean_rows)])
        alone = loaded_times(operations, all_alike(factor.tolist()), hardware)
        found = times.seconds(index, layer)[draw, members[group, rank]]
        assert found == alone.seconds(index, 0).item()


def test_an_exchange_takes_as_long_for_all_ranks_of_its_group_as_for_the_busiest() -> None:
    sizes = GroupSizes(512, 8, 2, num_ranks=4, expert_data=4)
    loads = token_loads(LoadLaw("preset", preset="W4"), sizes, steps=range(3), layers=[0], seed=1)
    members = expert_group_members(["tensor", "context", "expert", "data", "pipeline"], sizes)
    exchanged = rank_loads(loads, members).exchanged[0][:, members]
    assert (exchanged == loads.exchange_factor()[:, 0].max(axis=2, keepdims=True)).all()
    assert np.ptp(exchanged) > 0.1
