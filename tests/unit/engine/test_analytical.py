from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from typing import Any

import pytest
from random_scenarios import loaded, random_document, shipped_library, with_fields

from moesim.describe.hardware import Cluster, Device, Stack
from moesim.describe.quantities import (
    BandwidthFigure,
    Description,
    DurationFigure,
    Figure,
    FlopRateFigure,
    FrequencyFigure,
)
from moesim.engine.analytical import System, evaluate
from moesim.engine.breakdowns import breakdown
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario, build_system
from moesim.estimation.step_estimate import StepEstimate
from moesim.structure.step_graph import CATEGORIES

NUM_SCENARIOS = 1000
ROUNDING = 1e-9
TRAINING_SEEDS = [seed for seed in range(60) if random_document(seed)["workload"]["kind"] == "training"]


@lru_cache(maxsize=1)
def random_answers() -> list[tuple[LoadedScenario, StepEstimate]]:
    scenarios = [loaded(random_document(seed)) for seed in range(NUM_SCENARIOS)]
    return [(scenario, estimate_loaded(scenario)) for scenario in scenarios]


def names_of(broken: list[tuple[LoadedScenario, StepEstimate]]) -> str:
    return f"{len(broken)} of {NUM_SCENARIOS}: " + ", ".join(answer.scenario for _, answer in broken[:8])


def broken_by(law: Any, *, kinds: tuple[str, ...] = ("training", "prefill", "decode")) -> str:
    """Scenarios that break a law, in words; empty if none does."""
    broken = [pair for pair in random_answers() if pair[1].kind in kinds and not law(*pair)]
    return names_of(broken) if broken else ""


@pytest.mark.slow
class TestThousandRandomLegalScenarios:
    def test_every_kind_of_scenario_is_among_them(self):
        documents = [scenario.scenario for scenario, _ in random_answers()]
        assert {item.workload.kind for item in documents} == {"training", "prefill", "decode"}
        assert {item.model.architecture for item in documents} == {"decoder_only", "encoder_decoder"}
        assert {item.model.attention.kind for item in documents} == {"multi_head", "grouped_query", "latent"}
        routers = [item.model.moe.router for item in documents if item.model.moe]
        assert len(routers) < NUM_SCENARIOS
        assert {router.kind for router in routers} == {"top_k", "k_top_1"}
        assert {router.imbalance.kind for router in routers} == {
            "uniform",
            "max_over_mean",
            "power_law",
            "dirichlet",
            "histogram",
            "preset",
        }
        assert {router.capacity_factor is None for router in routers} == {True, False}
        assert {router.group_tokens is None for router in routers} == {True, False}
        assert {item.parallelism.pipeline.schedule for item in documents} == {
            "gpipe",
            "one_f_one_b",
            "interleaved_one_f_one_b",
        }
        assert {item.parallelism.zero_stage for item in documents} == {0, 1, 2, 3}
        assert {item.parallelism.recompute for item in documents} == {"none", "selective", "full"}
        assert len({(item.cluster, item.stack) for item in documents}) > 10

    def test_exposed_parts_sum_to_the_step_time(self):
        def law(_: LoadedScenario, answer: StepEstimate) -> bool:
            return math.isclose(math.fsum(answer.exposed_s.values()), answer.step_time_s, rel_tol=ROUNDING)

        assert not broken_by(law)

    @pytest.mark.parametrize("kind", ["training", "prefill", "decode"])
    def test_step_time_is_at_least_the_lower_bound(self, kind):
        assert not broken_by(
            lambda _, answer: answer.lower_s <= answer.step_time_s * (1 + ROUNDING),
            kinds=(kind,),
        )

    def test_step_time_is_at_most_the_upper_bound(self):
        assert not broken_by(lambda _, answer: answer.step_time_s <= answer.upper_s)

    def test_pipeline_ends_within_as_many_rounds_of_the_slowest_chunk_as_there_are_micro_batches_and_stages(self):
        """The bound that ``upper_s`` is built on, before it is raised to the step time."""
        for scenario, _ in random_answers()[::4]:
            (part,) = evaluate(scenario.system, scenario.columns)
            times, plan = part.times, part.plan
            slowest = times.chunk.serial_forward_s.max() + times.chunk.serial_backward_s.max()
            slowest += (times.zero_exposed_s + times.zero_hidden_s).max()
            hop = 2 * float(times.hop_s[0]) * (plan.stages > 1)
            rounds = (float(scenario.columns["num_micro_batches"][0]) + plan.stages - 1) * plan.virtual_stages
            assert part.finish_s.max() <= rounds * (slowest + hop) * (1 + ROUNDING), scenario.scenario.name

    def test_no_part_is_negative_and_all_numbers_are_finite(self):
        def law(_: LoadedScenario, answer: StepEstimate) -> bool:
            parts = [*answer.exposed_s.values(), *answer.hidden_s.values(), *answer.pipeline.stage_times_s]
            rates = [answer.mfu_fraction, answer.hfu_fraction, answer.tokens_per_s, answer.model_flops_per_step]
            times = [answer.lower_s, answer.step_time_s, answer.upper_s, answer.interval_s.low, answer.interval_s.high]
            numbers = [*parts, *rates, *times, answer.pipeline.bubble_fraction, answer.routing.dropped_fraction]
            return min(numbers) >= 0 and all(math.isfinite(number) for number in numbers) and min(times) > 0

        assert not broken_by(law)

    def test_every_part_belongs_to_a_category_of_the_answer(self):
        assert not broken_by(lambda _, answer: set(answer.exposed_s) | set(answer.hidden_s) <= set(CATEGORIES))

    def test_memory_categories_sum_to_the_peak(self):
        def law(_: LoadedScenario, answer: StepEstimate) -> bool:
            memory = answer.memory
            parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.buffers)
            deficit = max(memory.peak - memory.capacity, 0)
            return min(parts) >= 0 and sum(parts) + memory.other == memory.peak and memory.deficit == deficit

        assert not broken_by(law)

    @pytest.mark.parametrize("kind", ["training", "prefill", "decode"])
    def test_statistical_interval_contains_the_step_time(self, kind):
        assert not broken_by(lambda _, a: a.interval_s.low <= a.step_time_s * (1 + ROUNDING), kinds=(kind,))
        assert not broken_by(lambda _, a: a.step_time_s <= a.interval_s.high, kinds=(kind,))

    def test_no_device_is_used_beyond_its_peak(self):
        assert not broken_by(lambda _, answer: answer.mfu_fraction <= 1 and answer.hfu_fraction <= 1)

    def test_dropless_models_execute_at_least_the_model_flops(self):
        """With slots, tokens may be dropped; a latent cache's absorbed form may need fewer than the heads' widths."""

        def law(scenario: LoadedScenario, answer: StepEstimate) -> bool:
            model = scenario.scenario.model
            has_slots = model.moe is not None and model.moe.router.capacity_factor is not None
            absorbs = model.attention.kind == "latent" and answer.kind == "decode"
            return has_slots or absorbs or answer.mfu_fraction <= answer.hfu_fraction * (1 + ROUNDING)

        assert not broken_by(law)


def rescaled(profile: Any, speed: float) -> Any:
    """A profile with every rate times ``speed`` and every duration divided by it, validated again."""

    def scale(value: Any, data: Any) -> Any:
        match value:
            case DurationFigure():
                return {**data, "value": f"{value.value / speed!r} s"}
            case BandwidthFigure():
                return {**data, "value": f"{value.value * speed!r} B/s"}
            case FlopRateFigure():
                return {**data, "value": f"{value.value * speed!r} FLOP/s"}
            case FrequencyFigure():
                return {**data, "value": f"{value.value * speed!r} Hz"}
            case Figure():
                return with_unit(value, data)
            case Description():
                return {name: scale(getattr(value, name), data[name]) for name in data}
            case dict():
                return {key: scale(item, data[key]) for key, item in value.items()}
            case list():
                return [scale(item, part) for item, part in zip(value, data, strict=True)]
        return data

    return type(profile).model_validate(scale(profile, profile.model_dump()))


def rescaled_surfaces(value: Any, speed: float, name: str = "") -> Any:
    """Surfaces with every rate times ``speed`` and every duration divided by it: names say which is which."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return type(value)(**{key: rescaled_surfaces(item, speed, key) for key, item in fields.items()})
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
        return tuple(rescaled_surfaces(item, speed) for item in value)
    if name.endswith("_per_s") or name in ("peak_flop_rate", "memory_bandwidth"):
        return value * speed
    return value / speed if name.endswith("_s") and isinstance(value, float) else value


def with_unit(figure: Figure, data: dict[str, Any]) -> dict[str, Any]:
    units = {"BytesFigure": "B", "PowerFigure": "W", "PriceFigure": "USD/h"}
    unit = units.get(type(figure).__name__)
    return data if unit is None else {**data, "value": f"{figure.value!r} {unit}"}


@lru_cache(maxsize=64)
def rescaled_profiles(cluster: str, stack: str, speed: float) -> tuple[Device, Cluster, Stack]:
    library = shipped_library()
    profile = library.cluster(cluster)
    parts = library.device(profile.device), profile, library.stack(stack)
    device, cluster_profile, stack_profile = (rescaled(part, speed) for part in parts)
    return device, cluster_profile, stack_profile


def seconds_of(system: System, scenario: LoadedScenario) -> dict[str, float]:
    (part,) = evaluate(system, scenario.columns)
    parts = breakdown(part, scenario.columns, 0)
    times = {"step": float(part.step_time_s[0]), "lower": float(part.lower_s[0]), "upper": float(part.upper_s[0])}
    return times | {f"{how}.{name}": value for how, values in parts.items() for name, value in values.items()}


@pytest.mark.parametrize("speed", [2.0**-7, 1000.0])
def test_answers_scale_with_the_unit_of_time(speed):
    """A constant in seconds, or per second, hidden in the code would not scale."""
    for seed in range(100):
        scenario = loaded(random_document(seed))
        device, cluster, stack = rescaled_profiles(scenario.scenario.cluster, scenario.scenario.stack, speed)
        before = seconds_of(scenario.system, scenario)
        surfaces = rescaled_surfaces(scenario.system.hardware.device.surfaces, speed)
        after = seconds_of(build_system(scenario.scenario, device, cluster, stack, surfaces=surfaces), scenario)
        # Bubbles are differences of long times: their rounding is that of the step.
        slack = 1e-12 * before["step"]
        for name, seconds in before.items():
            assert math.isclose(after[name] * speed, seconds, rel_tol=1e-12, abs_tol=slack), (seed, name)


def answer_to(fields: dict[str, Any], changes: dict[str, Any] | None = None) -> StepEstimate:
    return estimate_loaded(loaded(with_fields(fields, changes or {})))


SMALL_MOE: dict[str, Any] = {
    "schema_version": 1,
    "name": "small_moe",
    "model": {
        "architecture": "decoder_only",
        "hidden_size": 1024,
        "vocab_size": 32000,
        "attention": {"kind": "multi_head", "heads": 8, "head_size": 128},
        "dense_ffn": {"intermediate_size": 8192},
        "moe": {
            "num_experts": 16,
            "intermediate_size": 2048,
            "router": {"kind": "top_k", "experts_per_token": 2},
        },
        "layers": [{"count": 8, "ffn": "moe"}],
    },
    "workload": {
        "kind": "training",
        "sequence_length": 1024,
        "sequences_per_micro_batch": 1,
        "sequences_per_step": 64,
    },
    "precision": {"compute": "bf16", "parameters": "bf16"},
    "optimizer": {"kind": "adam"},
    "parallelism": {"pipeline": {"stages": 1}, "expert": 8},
    "cluster": "h100_sxm_8",
    "devices": 8,
    "stack": "megatron_core_nccl",
}


def test_lower_bound_holds_where_one_stage_computes_longest_and_another_has_the_longest_update():
    """Dense layers on the first stage, 512 experts on the second: no stage has both the work and the optimizer."""
    changes: dict[str, Any] = {
        "model.vocab_size": 1000,
        "model.tied_embeddings": False,
        "model.moe.num_experts": 512,
        "model.moe.router.experts_per_token": 1,
        "model.moe.router.precision": "bf16",
        "model.layers": [{"count": 4, "ffn": "dense"}, {"count": 1, "ffn": "moe"}],
        "workload": {"sequence_length": 512, "sequences_per_micro_batch": 64, "sequences_per_step": 64},
        "parallelism": {"pipeline": {"stages": 2, "layers_per_stage": [4, 1]}},
        "devices": 2,
        "stack": "megatron_core_hybridep_blackwell",
    }
    answer = answer_to(SMALL_MOE, changes)
    assert answer.lower_s <= answer.step_time_s


class TestInference:
    def test_inference_steps_have_no_gradients_to_scatter(self):
        """ZeRO-2 differs from ZeRO-0 only in gradients and optimizer state, which inference has not."""
        prefill = {"workload.kind": "prefill", "parallelism.zero_stage": 0}
        plain = answer_to(SMALL_MOE, prefill)
        assert answer_to(SMALL_MOE, prefill | {"parallelism.zero_stage": 2}).step_time_s == plain.step_time_s

    def test_inference_steps_gather_zero_3_parameters_once_per_pass(self):
        training = answer_to(SMALL_MOE, {"parallelism.zero_stage": 3})
        prefill = answer_to(SMALL_MOE, {"workload.kind": "prefill", "parallelism.zero_stage": 3})

        def moved(answer: StepEstimate) -> float:
            return answer.exposed_s["data_parallel"] + answer.hidden_s["data_parallel"]

        assert moved(prefill) <= 0.5 * moved(training)

    def test_prefill_pipelines_pay_no_transfers_of_gradients(self):
        """Micro-batches only go forward: the last leaves after sum f + (p - 1) c + (m - 1) max f."""
        changes = {"workload.kind": "prefill", "parallelism": {"pipeline": {"stages": 8}}, "stack": "tutel_nccl"}
        scenario = loaded(with_fields(SMALL_MOE, changes))
        (part,) = evaluate(scenario.system, scenario.columns)
        forward, hop = part.times.forward_s[:, 0], float(part.times.exposed_hop_s[0])
        micro_batches = float(scenario.columns["num_micro_batches"][0])
        assert hop > 0
        expected = forward.sum() + 7 * hop + (micro_batches - 1) * forward.max()
        assert float(part.step_time_s[0]) == pytest.approx(expected, rel=1e-9)

    def test_decode_steps_do_not_run_the_encoder(self):
        """The encoder ran once, before the first token; model FLOPs count it so."""
        pair = {
            "model.architecture": "encoder_decoder",
            "model.encoder_layers": [{"count": 1, "ffn": "moe"}],
            "workload": {
                "kind": "decode",
                "source_length": 1024,
                "target_length": 128,
                "sequences_per_micro_batch": 8,
                "sequences_per_step": 64,
            },
        }
        shallow = answer_to(SMALL_MOE, pair)
        deep = answer_to(SMALL_MOE, pair | {"model.encoder_layers": [{"count": 24, "ffn": "moe"}]})
        assert deep.model_flops_per_step == shallow.model_flops_per_step
        assert deep.hardware_flops_per_step == shallow.hardware_flops_per_step
        assert deep.step_time_s == shallow.step_time_s


def test_host_waits_for_the_counts_of_token_prediction_experts_too():
    """A multi-token-prediction module is a layer: a dropless MoE there synchronises like any other."""
    synchronising = {"model.moe.router.capacity_factor": None, "stack": "megatron_core_nccl"}
    scenario = loaded(with_fields(SMALL_MOE, synchronising))
    launch = scenario.system.stack.launch
    waiting_s = launch.host_synchronisations_per_moe_layer * launch.host_synchronisation_time.value
    assert waiting_s > 0
    large = {"workload.sequences_per_micro_batch": 8, **synchronising}  # kernels long enough to hide their launches
    plain, with_module = answer_to(SMALL_MOE, large), answer_to(SMALL_MOE, large | {"model.mtp_layers": 1})
    assert with_module.exposed_s["host"] - plain.exposed_s["host"] == pytest.approx(waiting_s)


def changed_system(scenario: LoadedScenario, *, stack: dict[str, Any]) -> System:
    """System of a scenario with other fields in its stack."""
    profile = scenario.system.stack.model_copy(update=stack)
    before = scenario.system
    surfaces = before.hardware.device.surfaces
    return build_system(scenario.scenario, before.device, before.cluster, profile, surfaces=surfaces)


def step_time(system: System, scenario: LoadedScenario) -> float:
    (part,) = evaluate(system, scenario.columns)
    return float(part.step_time_s[0])


@pytest.mark.parametrize("seed", range(40))
def test_replayed_launches_are_never_slower(seed):
    scenario = loaded(random_document(seed))
    launch = scenario.system.stack.launch
    with_graphs, without = (
        step_time(
            changed_system(scenario, stack={"launch": launch.model_copy(update={"uses_cuda_graphs": graphs})}), scenario
        )
        for graphs in (True, False)
    )
    assert with_graphs <= without * (1 + ROUNDING)


@pytest.mark.parametrize(
    "stream", ["all_to_all", "tensor_parallel", "context_parallel", "data_parallel", "pipeline_p2p"]
)
def test_full_overlap_of_a_stream_is_never_slower_than_none(stream):
    faster = 0
    for seed in range(40):
        scenario = loaded(random_document(seed))
        overlap = scenario.system.stack.overlap
        hidden, exposed = (
            step_time(changed_system(scenario, stack={"overlap": overlap.model_copy(update={stream: share})}), scenario)
            for share in (1.0, 0.0)
        )
        assert hidden <= exposed * (1 + ROUNDING), f"seed {seed}"
        faster += hidden < exposed * 0.999
    assert faster > 0


@pytest.mark.parametrize("field", ["all_to_all_fraction", "reduce_fraction", "point_to_point_fraction"])
def test_a_slower_library_is_never_faster(field):
    slower = 0
    for seed in range(40):
        scenario = loaded(random_document(seed))
        tiers = {
            name: tier.model_copy(update={field: getattr(tier, field).model_copy(update={"value": 0.05})})
            for name, tier in scenario.system.stack.collectives.items()
        }
        before = step_time(scenario.system, scenario)
        after = step_time(changed_system(scenario, stack={"collectives": tiers}), scenario)
        assert after >= before * (1 - ROUNDING), f"seed {seed}"
        slower += after > before * 1.001
    assert slower > 0


@pytest.mark.parametrize("seed", TRAINING_SEEDS[:30])
def test_recompute_never_saves_time_and_never_takes_memory(seed):
    """Memory: selective only, since full recompute of a lone layer rebuilds all of it and holds its input besides."""
    fields = random_document(seed)
    none, selective, full = (
        answer_to(fields, {"parallelism.recompute": policy}) for policy in ("none", "selective", "full")
    )
    assert none.step_time_s <= selective.step_time_s * (1 + ROUNDING)
    assert selective.step_time_s <= full.step_time_s * (1 + ROUNDING)
    assert selective.memory.activations <= none.memory.activations
    assert none.hardware_flops_per_step <= selective.hardware_flops_per_step <= full.hardware_flops_per_step
    assert none.model_flops_per_step == full.model_flops_per_step


@pytest.mark.parametrize("seed", TRAINING_SEEDS[:30])
def test_sharding_optimizer_and_gradients_never_takes_memory(seed):
    """ZeRO-3 holds gathered layers besides, which can cost more than it saves."""
    fields = random_document(seed)
    peaks = [answer_to(fields, {"parallelism.zero_stage": stage}).memory.peak for stage in range(3)]
    assert peaks == sorted(peaks, reverse=True)


def test_optimizer_states_on_eight_ranks_fall_to_an_eighth_with_zero_1():
    """Experts on one rank each are not replicated: only the dense part of the state is cut."""
    dense = {"model.layers": [{"count": 8, "ffn": "dense"}], "parallelism": {"pipeline": {"stages": 1}}}
    whole, cut = (answer_to(SMALL_MOE, dense | {"parallelism.zero_stage": stage}).memory for stage in (0, 1))
    assert cut.optimizer == pytest.approx(whole.optimizer / 8, rel=1e-9)
    assert (cut.weights, cut.gradients) == (whole.weights, whole.gradients)
