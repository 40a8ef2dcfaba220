"""Loads of whole models: which layers are drawn, with what, and what takes its seconds from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from random_scenarios import loaded, random_document, shipped_library

from moesim.cost.operators import price
from moesim.engine import drawn_loads as module
from moesim.engine.drawn_loads import drawn_drops, drawn_loads, even_load, load_law, moe_layers, with_even_loads
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario, load
from moesim.structure.layers import layer_sequence
from moesim.structure.token_loads import LoadLaw
from moesim.structure.token_routing import draw


def scenario_of(name: str, *assignments: str) -> LoadedScenario:
    return load(name, assignments=assignments, library=shipped_library())


def drawn(scenario: LoadedScenario, **arguments: Any):
    sequence = layer_sequence(scenario.scenario.model)
    arguments = {"steps": range(2), "seed": 5} | arguments
    return drawn_loads(scenario.system, scenario.columns, sequence, **arguments)


DIRICHLET = "model.moe.router.imbalance={kind: preset, name: W3}"


def test_layers_and_their_modules_are_numbered_through_the_model() -> None:
    """DeepSeek-V3: three dense layers, 58 with experts, one module of token prediction after them."""
    scenario = scenario_of("deepseek_v3")
    (numbers,) = moe_layers(scenario.scenario, layer_sequence(scenario.scenario.model)).values()
    assert numbers == (*range(3, 61), 61)


def test_each_layer_has_the_contracts_matrix_of_its_number_and_step() -> None:
    scenario = scenario_of("mixtral_8x7b", DIRICHLET)
    loads = drawn(scenario, steps=[3, 8])
    for index, step in enumerate((3, 8)):
        matrix = draw("W3", 4096, 8, 2, 8, step, 17, 5)
        assert loads.rows_factor(17)[index, :8].tolist() == (matrix.sum(axis=0) / 8192).tolist()


def test_groups_of_both_directions_of_a_pipeline_are_different_groups() -> None:
    scenario = scenario_of("mixtral_8x7b", DIRICHLET)
    one, two = drawn(scenario), drawn(scenario, directions=2)
    assert np.array_equal(two.rows_factor(4, 0), one.rows_factor(4))
    assert not np.array_equal(two.rows_factor(4, 1), one.rows_factor(4))


def test_everything_that_grows_has_seconds_in_every_layer_draw_and_rank() -> None:
    scenario = scenario_of("mixtral_8x7b", DIRICHLET)
    loads, hardware = drawn(scenario), scenario.system.hardware
    seconds = loads.seconds(hardware)
    operations = loads.kinds[0].operations
    growing = [index for index, row in enumerate(operations) if row.load_factor is not None]
    assert set(seconds) == {(layer, operations[index].phase, index) for layer in range(32) for index in growing}
    times = loads.kinds[0].times(hardware)
    for key in ((0, "forward", growing[0]), (31, operations[growing[-1]].phase, growing[-1])):
        assert seconds[key].shape == (2, 16)
        assert np.array_equal(seconds[key], times.seconds(key[2], key[0]))


@pytest.mark.parametrize(
    "assignments",
    [(), (DIRICHLET, "model.moe.router.capacity_factor=1.25")],
    ids=["uniform", "slots"],
)
def test_uniform_loads_and_full_slots_leave_every_rank_its_mean(assignments: tuple[str, ...]) -> None:
    loads = drawn(scenario_of("mixtral_8x7b", *assignments))
    assert loads.kinds == ()
    assert dict(loads.seconds(scenario_of("mixtral_8x7b").system.hardware)) == {}
    assert loads.rows_factor(3).tolist() == [[1.0]]
    assert loads.max_over_mean().tolist() == [1.0]


def test_w0_where_tokens_divide_takes_what_mean_loads_take() -> None:
    scenario = scenario_of("mixtral_8x7b", "model.moe.router.imbalance={kind: preset, name: W0}")
    loads, hardware = drawn(scenario), scenario.system.hardware
    for (_, _, index), seconds in loads.seconds(hardware).items():
        operation = replace(loads.kinds[0].operations[index], load_factor=None)
        assert (seconds == price(operation, hardware).time_s[0]).all()


def test_loads_at_the_mean_are_what_estimates_assume_of_uniform_routing() -> None:
    scenario = scenario_of("mixtral_8x7b", DIRICHLET)
    even = replace(scenario, system=with_even_loads(scenario.system))
    assert estimate_loaded(even).step_time_s == estimate_loaded(scenario_of("mixtral_8x7b")).step_time_s
    assert even_load(np.array([8.0, 16.0])).tolist() == [1.0, 1.0]


def test_every_kind_of_imbalance_has_its_law() -> None:
    kinds: list[tuple[str, LoadLaw]] = [
        ("{kind: uniform}", LoadLaw("uniform")),
        ("{kind: max_over_mean, value: 2}", LoadLaw("max_over_mean", max_over_mean=2.0)),
        ("{kind: power_law, exponent: 0.7}", LoadLaw("power_law", exponent=0.7)),
        ("{kind: dirichlet, concentration: 3}", LoadLaw("dirichlet", concentration=3.0)),
        (
            "{kind: histogram, loads: [1, 2, 3, 4, 5, 6, 7, 8]}",
            LoadLaw("histogram", loads=[float(n) for n in range(1, 9)]),
        ),
        ("{kind: preset, name: W5}", LoadLaw("preset", preset="W5")),
    ]
    for text, law in kinds:
        scenario = scenario_of("mixtral_8x7b", f"model.moe.router.imbalance={text}")
        moe = scenario.scenario.model.moe
        assert moe is not None
        assert load_law(moe.router.imbalance) == law
        assert drawn(scenario).rows_factor(0).mean() == pytest.approx(1.0)


@pytest.mark.parametrize("group_tokens", ["null", "1024"])
def test_drops_are_on_average_what_the_estimate_says(group_tokens: str) -> None:
    """Hot rank at 4 times the mean with slots for 1.5: four of eight ranks' worth dropped, far from the scatter."""
    scenario = scenario_of(
        "mixtral_8x7b",
        "model.moe.router.imbalance={kind: preset, name: W2}",
        "model.moe.router.capacity_factor=1.5",
        f"model.moe.router.group_tokens={group_tokens}",
    )
    expected = estimate_loaded(scenario).routing.dropped_fraction
    sequence = layer_sequence(scenario.scenario.model)
    found = drawn_drops(scenario.system, scenario.columns, sequence, steps=range(2), seed=1)
    assert expected == pytest.approx(0.3125)
    assert found == pytest.approx(expected, abs=0.001)
    assert drawn_drops(*_dropless(), sequence, steps=range(3), seed=1).tolist() == [0.0] * 3


def _dropless():
    scenario = scenario_of("mixtral_8x7b")
    return scenario.system, scenario.columns


def test_random_scenarios_draw_without_a_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every imbalance, mesh and workload there is, with and without slots."""
    monkeypatch.setattr(module, "DROP_CELLS", 50_000)
    kinds = set()
    for seed in range(60):
        scenario = loaded(random_document(seed))
        sequence = layer_sequence(scenario.scenario.model)
        loads = drawn(scenario, steps=[0])
        drops = drawn_drops(scenario.system, scenario.columns, sequence, steps=[0], seed=0)
        assert 0 <= drops[0] < 1
        for kind in loads.kinds:
            ranks = int(scenario.columns["devices"][0] / scenario.columns["stages"][0])
            assert kind.loads[0].rows.shape == (len(kind.numbers), 1, ranks)
            assert all(len(values) == 1 for values in loads.seconds(scenario.system.hardware).values())
            kinds.add(scenario.scenario.model.moe.router.imbalance.kind)
    assert len(kinds) >= 4
