from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from typing import Any

import pytest
from random_scenarios import loaded, random_document, shipped_library, with_fields

import moesim
from moesim.describe.documents import read_document
from moesim.errors import ScenarioError
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario, build_system, load
from moesim.estimation.step_estimate import StepEstimate
from moesim.resources import shipped_scenarios
from moesim.structure.step_graph import CATEGORIES

SHIPPED = [path.stem for path in shipped_scenarios()]
MOE = [name for name in SHIPPED if read_document(moesim.resources.find_scenario(name)).data["model"].get("moe")]
PIPELINES = [
    name
    for name in SHIPPED
    if read_document(moesim.resources.find_scenario(name)).data["parallelism"].get("pipeline", {}).get("stages", 1) > 1
]


@lru_cache(maxsize=256)
def answer_with(name: str, *assignments: str) -> StepEstimate:
    return estimate_loaded(load(name, assignments=assignments, library=shipped_library()))


def with_all_to_all_bandwidth(scenario: LoadedScenario, factor: float) -> StepEstimate:
    """The answer where the library's all-to-all reaches another share of the links."""
    system = scenario.system
    tiers = {
        name: tier.model_copy(
            update={
                "all_to_all_fraction": tier.all_to_all_fraction.model_copy(
                    update={"value": tier.all_to_all_fraction.value * factor}
                )
            }
        )
        for name, tier in system.stack.collectives.items()
    }
    stack = system.stack.model_copy(update={"collectives": tiers})
    surfaces = system.hardware.device.surfaces
    changed = build_system(scenario.scenario, system.device, system.cluster, stack, surfaces=surfaces)
    return estimate_loaded(LoadedScenario(scenario.scenario, changed, scenario.columns, scenario.document))


@pytest.mark.parametrize("name", SHIPPED)
class TestShippedScenarios:
    def test_laws_of_an_answer_hold(self, name):
        answer = answer_with(name)
        assert sum(answer.exposed_s.values()) == pytest.approx(answer.step_time_s, rel=1e-9)
        assert answer.lower_s <= answer.step_time_s <= answer.upper_s
        assert answer.interval_s.low <= answer.step_time_s <= answer.interval_s.high
        assert 0 < answer.mfu_fraction <= 1

    def test_answer_can_be_written_as_json_with_every_category(self, name):
        written = json.loads(json.dumps(answer_with(name).to_json(), allow_nan=False))
        assert set(written["breakdown_s"]) == set(CATEGORIES)
        assert written["fits"] == (written["memory_bytes"]["deficit"] == 0)

    def test_recompute_costs_time_and_saves_memory(self, name):
        none = answer_with(name, "parallelism.recompute=none")
        full = answer_with(name, "parallelism.recompute=full")
        assert full.step_time_s > none.step_time_s
        layers = sum(run.count for run in load(name, library=shipped_library()).scenario.model.layers)
        if layers > 1:  # a lone layer is rebuilt whole
            assert full.memory.activations < none.memory.activations
        assert full.hardware_flops_per_step > none.hardware_flops_per_step
        assert full.model_flops_per_step == none.model_flops_per_step

    def test_sharded_optimizer_takes_less_memory(self, name):
        adam = "optimizer.kind=adam"  # Adafactor's sums of rows and columns are small and not sharded
        whole = answer_with(name, adam, "parallelism.zero_stage=0")
        cut = answer_with(name, adam, "parallelism.zero_stage=1")
        if load(name, library=shipped_library()).columns["data"][0] == 1:
            assert cut.memory.optimizer == whole.memory.optimizer
        else:
            assert cut.memory.optimizer < whole.memory.optimizer
            assert cut.memory.peak < whole.memory.peak


@pytest.mark.parametrize("name", MOE)
def test_a_faster_all_to_all_is_never_slower(name):
    scenario = load(name, library=shipped_library())
    slow, plain, fast = (with_all_to_all_bandwidth(scenario, factor).step_time_s for factor in (0.5, 1.0, 1.2))
    assert fast <= plain <= slow
    if answer_with(name).exposed_s["all_to_all"] > 0:
        assert fast < slow


@pytest.mark.parametrize("name", MOE)
def test_a_rank_with_twice_the_mean_load_slows_dropless_experts(name):
    dropless = "model.moe.router.capacity_factor=null"
    even = answer_with(name, dropless, "model.moe.router.imbalance={kind: uniform}")
    uneven = answer_with(name, dropless, "model.moe.router.imbalance={kind: max_over_mean, value: 2.0}")
    degree = load(name, library=shipped_library()).columns["expert"][0]
    assert uneven.routing.max_over_mean_load == (min(2.0, degree))
    if degree > 1:
        assert uneven.step_time_s > even.step_time_s
        assert even.exposed_s["imbalance"] == 0
    else:
        assert uneven.step_time_s == even.step_time_s


@pytest.mark.parametrize("name", PIPELINES)
def test_more_micro_batches_reduce_the_bubble(name):
    sequences = load(name, library=shipped_library()).scenario.workload.sequences_per_step
    fractions = [
        answer_with(name, f"workload.sequences_per_step={sequences * factor}").pipeline.bubble_fraction
        for factor in (1, 2, 4)
    ]
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[-1] < fractions[0]


def test_slots_of_a_decode_step_are_counted_over_one_token_per_sequence():
    """64 sequences of 4096 cached tokens route 64 tokens: 2 * 64 / 8 = 16 slots for each of 8 experts."""
    fields: dict[str, Any] = read_document(moesim.resources.find_scenario("mixtral_8x7b")).data
    changes = {
        "workload": {
            "kind": "decode",
            "sequence_length": 4096,
            "sequences_per_micro_batch": 64,
            "sequences_per_step": 512,
        },
        "parallelism": {"expert": 8, "pipeline": {"stages": 1}},
        "devices": 8,
        "model.moe.router.capacity_factor": 1.0,
        "model.moe.router.capacity_per": "assignment",
        "model.moe.router.group_tokens": None,
    }
    answer = estimate_loaded(loaded(with_fields(fields, changes)))
    assert answer.routing.slots_per_expert == 16


@pytest.mark.parametrize("seed", range(12))
def test_a_scenario_object_and_its_document_give_one_answer(seed):
    scenario = loaded(random_document(seed))
    assert moesim.estimate(scenario.scenario).to_json() == estimate_loaded(scenario).to_json()


def test_an_illegal_scenario_is_refused_with_the_field_in_the_message():
    with pytest.raises(ScenarioError, match=r"parallelism\.expert"):
        answer_with("m6t_1t_v100x480", "parallelism.expert=7")


def test_a_step_that_does_not_fit_is_an_answer():
    answer = answer_with("deepseek_v3", "parallelism.zero_stage=0", "parallelism.expert=8")
    assert not answer.fits
    assert answer.memory.deficit == answer.memory.peak - answer.memory.capacity > 0
    assert answer.step_time_s > 0


def test_an_estimate_imports_nothing_slow():
    """A start-up of seconds would come from these; each has a home that imports it when needed."""
    code = (
        "import sys, moesim; moesim.estimate('m6t_1t_v100x480');"
        "print(*sorted({'scipy', 'networkx', 'plotly', 'torch', 'pandas', 'dask'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_groups_across_the_ends_of_nodes_are_warned_of_and_no_shipped_scenario_has_them() -> None:
    for name in SHIPPED:
        assert "W-NET-001" not in [warning.code for warning in answer_with(name).warnings], name
    changes = ("devices=48", "parallelism.data=12", "parallelism.expert=4", "workload.sequences_per_step=240")
    found = [one.message for one in answer_with("mixtral_8x7b", *changes).warnings if one.code == "W-NET-001"]
    assert len(found) == 2
    assert "some data groups (12 ranks, 1 apart)" in found[0]
    assert "some expert_data groups (3 ranks, 4 apart)" in found[1]
    assert all("domains of 8 devices" in message for message in found)
