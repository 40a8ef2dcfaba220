"""Every shipped scenario loads, is answered with the contract's keys, and its numbers hang together."""

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import moesim
from moesim.estimation.estimate import estimate
from moesim.resources import shipped_scenarios
from moesim.structure.step_graph import CATEGORIES

PATHS = shipped_scenarios()
NAMES = [path.stem for path in PATHS]

BREAKDOWN = (
    "attention",
    "dense_ffn",
    "router",
    "dispatch_combine",
    "expert_gemm",
    "embedding_head_loss",
    "memory_bound",
    "all_to_all",
    "tensor_parallel",
    "context_parallel",
    "data_parallel",
    "pipeline_p2p",
    "recompute",
    "optimizer",
    "host",
    "imbalance",
    "pipeline_bubble",
)
ANSWER_KEYS: dict[str, Any] = {
    **dict.fromkeys(
        (
            "schema_version",
            "moesim_version",
            "scenario",
            "engine",
            "kind",
            "num_devices",
            "num_chips",
            "device",
            "cluster",
            "stack",
            "step_time_s",
            "lower_s",
            "upper_s",
            "tokens_per_step",
            "tokens_per_s",
            "tokens_per_s_per_device",
            "model_flops_per_step",
            "hardware_flops_per_step",
            "model_flops_per_s_per_device",
            "mfu_fraction",
            "hfu_fraction",
            "fits",
        )
    ),
    "interval_s": dict.fromkeys(("low", "high", "level")),
    "parameters": dict.fromkeys(("total", "active", "expert", "per_device")),
    "breakdown_s": {name: dict.fromkeys(("exposed", "hidden")) for name in BREAKDOWN},
    "pipeline": dict.fromkeys(("stage_times_s", "bubble_fraction", "critical_stage")),
    "memory_bytes": dict.fromkeys(
        (
            "weights",
            "gradients",
            "optimizer",
            "activations",
            "buffers",
            "other",
            "peak",
            "capacity",
            "deficit",
            "peak_stage",
        )
    ),
    "routing": dict.fromkeys(("slots_per_expert", "dropped_fraction", "max_over_mean_load")),
    "bottleneck": dict.fromkeys(("name", "share", "relief")),
    "cost": dict.fromkeys(("usd_per_hour", "usd_per_billion_tokens")),
    "provenance": [dict.fromkeys(("figure", "value", "unit", "kind", "source", "error_fraction"))],
    "assumptions": [dict.fromkeys(("field", "why"))],
    "warnings": [dict.fromkeys(("code", "message"))],
}
MAY_BE_NULL = {"usd_per_hour", "usd_per_billion_tokens", "error_fraction"}
PROVENANCE_KINDS = {"datasheet", "fitted", "transferred", "extrapolated", "assumed"}


@cache
def answer(name: str) -> dict[str, Any]:
    found = estimate(name).to_json()
    return dict(json.loads(json.dumps(found, allow_nan=False)))


def missing_keys(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """Dotted keys of the contract that an answer lacks; more keys are allowed."""
    if isinstance(expected, dict):
        for key, below in expected.items():
            if key not in found:
                yield f"{where}{key}"
            else:
                yield from missing_keys(below, found[key], f"{where}{key}.")
    elif isinstance(expected, list):
        for index, item in enumerate(found):
            yield from missing_keys(expected[0], item, f"{where}{index}.")


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, key)
    else:
        yield key, value


def test_the_breakdown_of_the_code_is_that_of_the_contract() -> None:
    assert CATEGORIES == BREAKDOWN


def test_there_are_scenarios() -> None:
    assert len(NAMES) >= 24


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_scenario_is_named_after_its_file_and_listed(path: Path) -> None:
    scenario = moesim.load_scenario(path)
    assert scenario.name == path.stem
    assert f"`{path.stem}`" in (path.parent / "README.md").read_text(encoding="utf-8")
    assert scenario.references


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_every_assumption_names_a_field_of_its_scenario(path: Path) -> None:
    scenario = moesim.load_scenario(path)
    for dotted in scenario.assumed:
        value: Any = scenario.model_dump()
        for part in dotted.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_has_every_key_of_the_contract(name: str) -> None:
    assert list(missing_keys(ANSWER_KEYS, answer(name))) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_finite_and_none_is_negative(name: str) -> None:
    for key, value in leaves(answer(name)):
        if value is None:
            assert key in MAY_BE_NULL
        elif isinstance(value, int | float):
            assert math.isfinite(value), key
            assert value >= 0, key


@pytest.mark.parametrize("name", NAMES)
def test_exposed_parts_sum_to_the_step(name: str) -> None:
    found = answer(name)
    exposed = [part["exposed"] for part in found["breakdown_s"].values()]
    assert math.fsum(exposed) == pytest.approx(found["step_time_s"], rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_step_lies_between_its_bounds_and_in_its_interval(name: str) -> None:
    found = answer(name)
    assert 0 < found["lower_s"] <= found["step_time_s"] <= found["upper_s"]
    interval = found["interval_s"]
    assert interval["low"] <= found["step_time_s"] <= interval["high"]
    assert interval["low"] < interval["high"]
    assert interval["level"] == 0.9


@pytest.mark.parametrize("name", NAMES)
def test_memory_parts_sum_to_the_peak_and_every_shipped_scenario_fits(name: str) -> None:
    found = answer(name)
    memory = found["memory_bytes"]
    parts = ("weights", "gradients", "optimizer", "activations", "buffers", "other")
    assert sum(memory[part] for part in parts) == memory["peak"]
    assert all(isinstance(memory[part], int) for part in memory)
    assert memory["deficit"] == max(memory["peak"] - memory["capacity"], 0)
    assert found["fits"] is True
    assert memory["deficit"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_rates_and_fractions_follow_from_the_step(name: str) -> None:
    found = answer(name)
    step_s, devices = found["step_time_s"], found["num_devices"]
    assert found["tokens_per_s"] == pytest.approx(found["tokens_per_step"] / step_s, rel=1e-12)
    assert found["tokens_per_s_per_device"] == pytest.approx(found["tokens_per_s"] / devices, rel=1e-12)
    per_device = found["model_flops_per_step"] / step_s / devices
    assert found["model_flops_per_s_per_device"] == pytest.approx(per_device, rel=1e-12)
    ratio = found["hardware_flops_per_step"] / found["model_flops_per_step"]
    assert found["hfu_fraction"] / found["mfu_fraction"] == pytest.approx(ratio, rel=1e-9)
    assert 0 < found["mfu_fraction"] < 1
    assert found["mfu_fraction"] <= found["hfu_fraction"] < 1


@pytest.mark.parametrize("name", NAMES)
def test_mfu_is_over_the_rate_that_the_provenance_states(name: str) -> None:
    found = answer(name)
    compute = moesim.load_scenario(name).precision.compute
    (peak,) = [
        figure["value"] for figure in found["provenance"] if figure["figure"] == f"device.peak_flop_rate.{compute}"
    ]
    assert found["mfu_fraction"] == pytest.approx(found["model_flops_per_s_per_device"] / peak, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_a_step_are_sequences_times_counted_lengths(name: str) -> None:
    workload = moesim.load_scenario(name).workload
    lengths = {
        "source": workload.source_length or 0,
        "target": workload.target_length or 0,
        "all": (workload.source_length or 0) + (workload.target_length or 0),
    }
    length = workload.sequence_length or lengths[workload.tokens_counted]
    assert answer(name)["tokens_per_step"] == workload.sequences_per_step * length


@pytest.mark.parametrize("name", NAMES)
def test_the_bottleneck_is_the_largest_exposed_part(name: str) -> None:
    found = answer(name)
    exposed = {key: part["exposed"] for key, part in found["breakdown_s"].items()}
    bottleneck = found["bottleneck"]
    assert exposed[bottleneck["name"]] == max(exposed.values())
    assert bottleneck["share"] == pytest.approx(exposed[bottleneck["name"]] / found["step_time_s"], rel=1e-12)
    assert bottleneck["relief"]


@pytest.mark.parametrize("name", NAMES)
def test_every_assumption_and_every_figure_is_told(name: str) -> None:
    found = answer(name)
    told = {item["field"]: item["why"] for item in found["assumptions"]}
    assert told == moesim.load_scenario(name).assumed
    assert found["provenance"]
    for figure in found["provenance"]:
        assert figure["kind"] in PROVENANCE_KINDS
        assert isinstance(figure["unit"], str)  # empty for counts and fractions
        assert len(figure["source"]) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_pipeline_and_routing_are_plausible(name: str) -> None:
    found, scenario = answer(name), moesim.load_scenario(name)
    stages = scenario.parallelism.pipeline.stages
    assert len(found["pipeline"]["stage_times_s"]) == stages
    assert 0 <= found["pipeline"]["critical_stage"] < stages
    assert found["memory_bytes"]["peak_stage"] < stages
    if stages == 1:
        assert found["pipeline"]["bubble_fraction"] == pytest.approx(0, abs=1e-9)
    else:
        assert found["pipeline"]["bubble_fraction"] > 0
    assert found["routing"]["max_over_mean_load"] >= 1
    assert found["routing"]["dropped_fraction"] < 1
    assert (found["routing"]["slots_per_expert"] > 0) == (scenario.model.moe is not None)


def test_a_core_of_tpu_v3_is_half_a_chip() -> None:
    assert (answer("gshard_600b_2048e_36l")["num_devices"], answer("gshard_600b_2048e_36l")["num_chips"]) == (
        2048,
        1024,
    )
    assert answer("m6t_1t_v100x480")["num_chips"] == 480


def test_a_loaded_scenario_is_answered_like_its_file() -> None:
    name = "mixtral_8x7b"
    assert estimate(moesim.load_scenario(name)).to_json()["step_time_s"] == answer(name)["step_time_s"]
