"""Steps in an uneven world: even where nothing is uneven, what theory says of one slow rank, the same draws again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from random_scenarios import loaded, random_document, shipped_library
from timeline_checks import early_passes, overlapping_events, unsorted_events

from moesim.cost.operators import price
from moesim.describe.perturbations import FlappingLink, Perturbations, SlowLink, SlowRank
from moesim.engine import uneven_steps as module
from moesim.engine.drawn_loads import drawn_loads
from moesim.engine.event_driven import run_step
from moesim.engine.layer_cases import PhaseName
from moesim.engine.max_plus import pipeline_finish_s
from moesim.engine.step_passes import prepare_step
from moesim.engine.uneven_steps import UnevenSteps
from moesim.engine.uneven_world import degraded, host_jitter_s, loss_attribution, quantiles_s
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario, load

W3 = "model.moe.router.imbalance={kind: preset, name: W3}"
W2 = "model.moe.router.imbalance={kind: preset, name: W2}"
ONE_STAGE = (
    "parallelism.pipeline={stages: 1, virtual_stages: 1, schedule: one_f_one_b}",
    "parallelism.data=16",
    "devices=16",
    "workload.sequences_per_step=64",
)
SHORT = (
    "parallelism.pipeline={stages: 4, virtual_stages: 1, schedule: one_f_one_b}",
    "model.layers=[{count: 8, ffn: moe}]",
    "workload.sequences_per_step=128",
)


def scenario_of(*assignments: str, name: str = "mixtral_8x7b") -> LoadedScenario:
    return load(name, assignments=assignments, library=shipped_library())


def steps_of(scenario: LoadedScenario, perturbations: Perturbations | None = None, seed: int = 3) -> UnevenSteps:
    return UnevenSteps(scenario.system, scenario.columns, perturbations, seed=seed)


@pytest.mark.parametrize("name", ["mixtral_8x7b", "deepseek_v3", "m6t_10b_v100", "qwen3_30b_a3b"])
def test_with_uniform_loads_a_step_is_the_estimated_one(name: str) -> None:
    scenario = scenario_of(name=name)
    expected = estimate_loaded(scenario)
    found = steps_of(scenario).run([0, 5])
    assert found.run.step_time_s == pytest.approx([expected.step_time_s] * 2, rel=1e-9)
    assert found.drawn_s.tolist() == found.run.step_time_s.tolist()
    assert found.peak_bytes == pytest.approx([expected.memory.peak] * 2, abs=8)
    assert found.max_over_mean.tolist() == [1.0, 1.0]


def test_with_w0_loads_that_divide_a_step_is_the_estimated_one_on_every_rank() -> None:
    scenario = scenario_of("model.moe.router.imbalance={kind: preset, name: W0}")
    found = steps_of(scenario).run([4])
    assert found.run.columns == 16
    assert found.run.step_time_s[0] == pytest.approx(estimate_loaded(scenario_of()).step_time_s, rel=1e-9)


COMPUTE = ("attention", "dense_ffn", "router", "dispatch_combine", "expert_gemm", "embedding_head_loss", "memory_bound")


def compute_s(steps: UnevenSteps, stage: int, phase: PhaseName) -> float:
    """Seconds that one micro-batch computes on a stage at mean load, summed from the analytical engine's layers."""
    evaluation = steps.step.evaluation
    layers, plan = evaluation.layers, evaluation.plan
    blocks = [(block, plan.stage_counts()[kind, stage]) for kind, block in enumerate(layers.layers)]
    blocks += [(layers.first, float(stage == 0)), (layers.last, float(stage == plan.stages - 1))]
    parts = [
        count * np.ravel(block.phase(phase).exposed_s.get(name, 0.0))[0] for block, count in blocks for name in COMPUTE
    ]
    return float(sum(parts))


def test_a_device_at_half_its_speed_delays_a_single_stage_by_all_it_computes() -> None:
    """Nothing overlaps here: each exchange waits for the slow device, and so does the gather for its update.

    The embedding ends before the host has issued it: what it takes longer is not missed.
    """
    steps = steps_of(scenario_of(*ONE_STAGE))
    slow = steps_of(scenario_of(*ONE_STAGE), Perturbations(slow_ranks=(SlowRank(5, 2.0),))).run([0])
    even_s = steps.even.step_time_s[0]
    micro_batches = float(steps.step.columns["num_micro_batches"][0])
    computed = micro_batches * sum(compute_s(steps, 0, phase) for phase in ("forward", "backward"))
    computed += steps.step.step_ends()[0].optimizer_s
    first = steps.step.evaluation.layers.first.forward
    embedding_s = sum(float(first.exposed_s[name][0]) for name in COMPUTE if name in first.exposed_s)
    computed -= micro_batches * min(embedding_s, float(first.waiting_s[0]))
    assert computed > 0.5 * even_s
    assert slow.run.step_time_s[0] - even_s == pytest.approx(computed, rel=1e-9)
    assert slow.drawn_s[0] == even_s


def test_a_rank_at_twice_the_load_delays_a_single_stage_by_what_its_rows_take_longer() -> None:
    """The fullest rank waits for nobody: the delay is the sum of its own seconds beyond the mean, layer by layer."""
    scenario = scenario_of(*ONE_STAGE, "model.moe.router.imbalance={kind: max_over_mean, value: 2}")
    steps = steps_of(scenario)
    loads = drawn_loads(steps.step.system, steps.step.columns, steps.step.sequence, steps=[7], seed=3)
    delay = 0.0
    for (_, _, index), seconds in loads.seconds(steps.step.system.hardware).items():
        operation = replace(loads.kinds[0].operations[index], load_factor=None)
        delay += seconds[0, 0] - price(operation, steps.step.system.hardware).time_s[0]
    micro_batches = float(steps.step.columns["num_micro_batches"][0])
    found = steps.run([7])
    assert loads.rows_factor(0).argmax() in (0, 8)  # rank 0 of one of the two groups
    assert found.max_over_mean[0] == pytest.approx(2.0, rel=0.05)
    expected = steps.even.step_time_s[0] + micro_batches * delay
    assert found.run.step_time_s[0] >= expected - 1e-12
    assert found.run.step_time_s[0] == pytest.approx(expected, rel=0.01)  # the other group's hot rank may lead a layer


def test_the_fullest_rank_of_the_only_group_delays_by_exactly_that() -> None:
    scenario = scenario_of(*ONE_STAGE[:1], "parallelism.data=8", "devices=8", *ONE_STAGE[3:], W2)
    steps = steps_of(scenario)
    loads = drawn_loads(steps.step.system, steps.step.columns, steps.step.sequence, steps=[0], seed=3)
    hardware = steps.step.system.hardware
    delay = 0.0
    for (_, _, index), seconds in loads.seconds(hardware).items():
        operation = replace(loads.kinds[0].operations[index], load_factor=None)
        delay += seconds[0, 0] - price(operation, hardware).time_s[0]
    expected = steps.even.step_time_s[0] + float(steps.step.columns["num_micro_batches"][0]) * delay
    assert steps.run([0]).run.step_time_s[0] == pytest.approx(expected, rel=1e-12)


def test_a_slow_rank_of_one_stage_is_a_pipeline_with_a_slow_stage() -> None:
    """The analytical engine's own recursion, with what the stage of the slow rank computes half as long again."""
    scenario = scenario_of(*SHORT)
    steps = steps_of(scenario)
    rank = int(steps.step.ranks.global_ranks(2)[3])
    found = steps_of(scenario, Perturbations(slow_ranks=(SlowRank(rank, 1.5),))).run([0]).run
    times = steps.step.evaluation.times
    forward, backward = times.forward_s.copy(), times.backward_s.copy()
    forward[2] += 0.5 * compute_s(steps, 2, "forward")
    backward[2] += 0.5 * compute_s(steps, 2, "backward")
    counts = np.array([round(float(scenario.columns["num_micro_batches"][0]))])
    finish = pipeline_finish_s("one_f_one_b", 1, counts, forward, backward, times.exposed_hop_s)
    assert found.pipeline_finish_s[0].max(axis=1) == pytest.approx(finish[:, 0], rel=1e-9)
    assert finish.max() > 1.05 * steps.even.pipeline_finish_s.max()


EXPERTS_OVER_TWO_NODES = (
    "parallelism.pipeline={stages: 1, virtual_stages: 1, schedule: one_f_one_b}",
    "parallelism.tensor=1",
    "parallelism.expert_tensor=1",
    "parallelism.context=1",
    "parallelism.data=auto",
    "parallelism.expert=16",
    "model.layers.0.count=3",
    "workload.sequences_per_step=64",
)


def test_one_slow_link_is_a_slow_network_where_every_group_has_it() -> None:
    """16 ranks, one expert-parallel group and one of data: whichever rank's link is slow, all go at its pace."""
    scenario = scenario_of(*EXPERTS_OVER_TWO_NODES, "devices=16", name="qwen3_30b_a3b")
    steps = steps_of(scenario, Perturbations(slow_links=(SlowLink("network", 5, 0.4),)))
    slower = replace(steps.step.system, hardware=degraded(steps.step.system.hardware, [1.0, 0.4]))
    whole = run_step(prepare_step(slower, scenario.columns)).step_time_s[0]
    assert whole > 1.1 * steps.even.step_time_s[0]
    assert steps.run([0]).run.step_time_s[0] == pytest.approx(whole, rel=1e-12)


def test_a_slow_link_delays_its_own_group_and_what_waits_for_it() -> None:
    """32 ranks, two groups: layers of one are slowed; the reduction, which both take part in, waits for them."""
    fields = (*EXPERTS_OVER_TWO_NODES, "devices=32")
    scenario = scenario_of(*fields, W3, name="qwen3_30b_a3b")
    slow = Perturbations(slow_links=(SlowLink("network", 20, 0.4),))
    found, healthy = (steps_of(scenario, one).run([0]).run for one in (slow, None))
    groups = found.pipeline_finish_s[0, 0].reshape(2, 16)
    assert groups[0] == pytest.approx(healthy.pipeline_finish_s[0, 0, :16], rel=1e-12)
    assert groups[1].min() > 1.1 * healthy.pipeline_finish_s[0, 0, 16:].max()
    ends = found.finish_s[0, 0]
    assert np.ptp(ends) < 1e-3 * ends.max()


def test_late_hosts_are_absorbed_while_the_queue_is_long_and_delay_by_their_excess_when_not() -> None:
    """One device, so that nobody waits: every pass ends with the later of the device and its late host."""
    fields = ("parallelism.data=1", "parallelism.expert=1", "devices=1", "workload.sequences_per_step=8")
    scenario = scenario_of(*fields, name="m6t_base_v100")
    steps = steps_of(scenario)
    part = next(iter(steps.step.passes([{}], lambda _: np.ones((1, 1))).values()))
    assert part is not None
    little = steps_of(scenario, Perturbations(host_jitter_s=1e-7)).run([0, 1])
    assert little.run.step_time_s == pytest.approx([steps.even.step_time_s[0]] * 2, rel=1e-4)
    much = steps_of(scenario, Perturbations(host_jitter_s=10.0))
    late = host_jitter_s(much.perturbations, (1, much.step.passes_per_rank), steps=[0, 1], seed=3)
    found = much.run([0, 1]).run.step_time_s - steps.even.step_time_s[0]
    assert (found <= late.sum(axis=(1, 2)) + 1e-9).all()
    assert found == pytest.approx(late.sum(axis=(1, 2)), rel=0.1)


@pytest.mark.parametrize(
    "perturbations",
    [
        Perturbations(),
        Perturbations(speed_spread=0.1, host_jitter_s=1e-3, slow_links=(SlowLink("network", 9, 0.5),)),
        Perturbations(flapping_links=(FlappingLink("network", 9, 0.2, 0.7, 0.3),)),
    ],
    ids=["loads", "speeds-hosts-links", "flapping"],
)
def test_draws_are_the_same_bytes_whatever_they_are_run_with(
    perturbations: Perturbations, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = scenario_of(*SHORT, "workload.sequences_per_step=32", W3)
    steps = steps_of(scenario, perturbations)
    whole = steps.run(range(6))
    again = steps_of(scenario, perturbations).run([4, 5])
    monkeypatch.setattr(module, "CELLS_AT_ONCE", 1)
    alone = steps_of(scenario, perturbations).run(range(6))
    for name in ("drawn_s", "max_over_mean", "dropped_fraction", "peak_bytes"):
        assert np.array_equal(getattr(whole, name), getattr(alone, name))
        assert np.array_equal(getattr(whole, name)[4:], getattr(again, name))
    assert np.array_equal(whole.run.step_time_s, alone.run.step_time_s)
    assert np.array_equal(whole.run.step_time_s[4:], again.run.step_time_s)
    assert len(np.unique(whole.run.step_time_s)) == 6
    other = steps_of(scenario, perturbations, seed=4).run([4, 5])
    assert not np.array_equal(other.run.step_time_s, again.run.step_time_s)


def test_losses_add_up_to_the_mean_step_and_quantiles_are_ordered() -> None:
    scenario = scenario_of(*SHORT, W3)
    steps = steps_of(scenario, Perturbations(slow_ranks=(SlowRank(7, 1.3),)))
    found = steps.run(range(8))
    even = steps.even
    bubble = float(even.exposed_s["pipeline_bubble"][0, 0, 0])
    parts = loss_attribution(float(even.step_time_s[0]), bubble, found.drawn_s, found.run.step_time_s)
    assert parts.total_s == pytest.approx(found.run.step_time_s.mean(), rel=1e-12)
    assert min(parts.work_s, parts.bubble_s, parts.imbalance_s, parts.stragglers_s) > 0
    levels = quantiles_s(found.run.step_time_s)
    assert levels["p50"] <= levels["p95"] <= levels["p99"] <= found.run.step_time_s.max()


def test_memory_of_the_fullest_rank_follows_its_rows() -> None:
    """W2: four times the mean on one rank of each group: what the memory model says of that load on every rank."""
    scenario = scenario_of(*SHORT, W2)
    expected = estimate_loaded(scenario).memory.peak
    found = steps_of(scenario).run([0, 1]).peak_bytes
    assert estimate_loaded(scenario_of(*SHORT)).memory.peak < 0.8 * expected
    assert found == pytest.approx([expected] * 2, rel=0.02)


def test_each_direction_of_a_pipeline_has_loads_of_its_own() -> None:
    """DualPipe holds every layer on two stages, whose groups see different tokens."""
    fields = ("parallelism.pipeline={stages: 4, virtual_stages: 1, schedule: dualpipe}", *SHORT[1:], W3)
    steps = steps_of(scenario_of(*fields))
    system, sequence = steps.step.system, steps.step.sequence
    loads = drawn_loads(system, steps.step.columns, sequence, steps=[1], seed=3, directions=2)
    seconds = [loads.seconds(system.hardware, direction) for direction in (0, 1)]
    found = steps.run([1]).run.step_time_s[0]
    assert found == run_step(steps.step, loads=seconds).step_time_s[0]
    assert found != run_step(steps.step, loads=seconds[:1]).step_time_s[0]


@pytest.mark.parametrize("schedule", ["one_f_one_b", "dualpipe"])
def test_timelines_of_an_uneven_world_are_possible(schedule: str) -> None:
    """Loads, a slow device and its slow link: no stream runs two things at once, nothing starts before its input."""
    fields = (f"parallelism.pipeline={{stages: 4, virtual_stages: 1, schedule: {schedule}}}", *SHORT[1:], W3)
    slow = Perturbations(slow_ranks=(SlowRank(21, 1.4),), slow_links=(SlowLink("network", 21, 0.01),))
    steps = steps_of(scenario_of(*fields), slow)
    ranks = [int(steps.step.ranks.global_ranks(stage)[5]) for stage in range(4)]
    assert 21 in ranks
    run = steps.run([2], ranks).run
    assert run.timeline is not None
    assert overlapping_events(run.timeline) == 0
    assert unsorted_events(run.timeline) == 0
    assert early_passes(run.timeline) == 0
    ends = [own.end for own in (run.timeline.of_ranks([rank]) for rank in ranks)]
    assert max(ends) <= run.step_time_s[0] * (1 + 1e-12)
    took = run.timeline.messages.target_s - run.timeline.messages.source_s
    assert took.max() > 10 * steps.step.exposed_hop_s


@pytest.mark.parametrize("seed", range(16))
def test_what_is_slow_never_speeds_a_step_up(seed: int) -> None:
    """Random scenarios, all ranks apart; parts of every rank sum to the step."""
    scenario = loaded(random_document(seed))
    level = scenario.system.hardware.fabric.levels[-1].name
    ranks = int(scenario.columns["devices"][0])
    slow = Perturbations(
        slow_ranks=(SlowRank(ranks - 1, 1.4),), slow_links=(SlowLink(level, 0, 0.3),), host_jitter_s=1e-4
    )
    found = steps_of(scenario, slow).run([0])
    assert found.run.step_time_s[0] >= found.drawn_s[0] * (1 - 1e-12)
    total = sum(found.run.exposed_s.values())
    np.testing.assert_allclose(total, np.broadcast_to(found.run.step_time_s[0], total.shape), rtol=1e-9)
