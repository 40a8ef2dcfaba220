"""Answers of the event-driven engine: the same sums, whatever the batches, and what is finished when interrupted."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_scenarios import loaded as loaded_document
from random_scenarios import random_document
from trace_event_rules import check_trace

import moesim
from moesim.describe.hardware_library import HardwareLibrary
from moesim.describe.perturbations import Perturbations, SlowRank
from moesim.engine.uneven_steps import UnevenRun, UnevenSteps
from moesim.errors import ScenarioError
from moesim.estimation import simulation
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario, load
from moesim.estimation.simulated_step import SimulatedStep
from moesim.estimation.simulation import simulate_loaded
from moesim.formats.chrome_trace import read_chrome_trace, write_chrome_trace, write_simulated_trace
from moesim.resources import shipped_scenarios

SHIPPED = [path.stem for path in shipped_scenarios()]
UNEVEN = "model.moe.router.imbalance={kind: dirichlet, concentration: 4.0}"
EVEN = "model.moe.router.imbalance={kind: uniform}"


@lru_cache(maxsize=64)
def loaded_scenario(name: str, *assignments: str) -> LoadedScenario:
    return load(name, assignments=assignments, library=HardwareLibrary())


def check_sums(answer: SimulatedStep) -> None:
    estimate = answer.estimate
    assert sum(estimate.exposed_s.values()) == pytest.approx(estimate.step_time_s, rel=1e-9)
    assert min(estimate.exposed_s.values()) >= 0
    assert min(estimate.hidden_s.values()) >= 0
    assert estimate.lower_s <= estimate.step_time_s <= estimate.upper_s
    for shares in (*answer.stages, *answer.ranks):
        total = shares.busy_fraction + shares.exposed_fraction + shares.idle_fraction
        assert total == pytest.approx(1.0, rel=1e-9)
        assert min(shares.busy_fraction, shares.exposed_fraction, shares.idle_fraction) >= -1e-9
    assert answer.losses.total_s == pytest.approx(estimate.step_time_s, rel=1e-12)


@pytest.mark.parametrize("name", SHIPPED)
def test_an_even_step_is_the_one_that_estimate_gives(name: str) -> None:
    loaded = loaded_scenario(name)
    moe = loaded.scenario.model.moe
    if moe is not None and moe.router.imbalance.kind != "uniform":
        loaded = loaded_scenario(name, EVEN)
    answer, estimate = simulate_loaded(loaded), estimate_loaded(loaded)
    check_sums(answer)
    assert answer.estimate.step_time_s == pytest.approx(estimate.step_time_s, rel=1e-6)
    assert abs(answer.agreement.relative_difference) < 1e-6
    assert answer.estimate.memory == estimate.memory
    assert answer.estimate.routing == estimate.routing
    assert answer.losses.imbalance_s == answer.losses.stragglers_s == 0
    assert set(answer.estimate.to_json()) == set(estimate.to_json())


def test_draws_do_not_depend_on_how_many_are_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_scenario("megatron_moe_mixtral_8xh100", UNEVEN)
    together = simulate_loaded(loaded, draws=9, seed=5)
    monkeypatch.setattr(simulation, "BATCH_S", 0.0)
    one_by_one = simulate_loaded(loaded, draws=9, seed=5)
    np.testing.assert_allclose(together.step_times_s, one_by_one.step_times_s, rtol=1e-12)
    fewer = simulate_loaded(loaded, draws=4, seed=5)
    np.testing.assert_allclose(fewer.step_times_s, together.step_times_s[:4], rtol=1e-12)
    other = simulate_loaded(loaded, draws=9, seed=6)
    assert not np.isclose(other.step_times_s, together.step_times_s, rtol=1e-6).any()
    for answer in (together, one_by_one, fewer, other):
        check_sums(answer)
        assert answer.losses.imbalance_s > 0
    quantiles = together.quantiles_s
    assert min(together.step_times_s) <= quantiles["p50"] <= quantiles["p95"] <= quantiles["p99"]
    assert quantiles["p99"] <= max(together.step_times_s)


def test_a_slow_rank_costs_time_and_is_the_busy_one() -> None:
    loaded = loaded_scenario("mixtral_8x7b", EVEN)
    slow = Perturbations(slow_ranks=(SlowRank(17, 1.5),))
    answer = simulate_loaded(loaded, perturbations=slow, ranks=(16, 17, 18, 40))
    check_sums(answer)
    assert answer.losses.imbalance_s == 0
    assert answer.losses.stragglers_s > 0.3 * answer.losses.work_s
    busy = {rank.rank: rank.busy_fraction for rank in answer.ranks}
    assert busy[17] > 1.3 * busy[16]
    assert busy[16] == pytest.approx(busy[18])
    assert [rank.stands_for for rank in answer.ranks] == [(16,), (17,), (18,), (40,)]
    assert answer.stages[1].least_busy_fraction == pytest.approx(busy[16])
    assert answer.estimate.upper_s >= answer.estimate.step_time_s


def test_what_is_recorded_is_of_the_first_draw_and_has_the_peak_of_the_memory_model() -> None:
    loaded = loaded_scenario("mixtral_8x7b", EVEN)
    answer = simulate_loaded(loaded, records=True)
    recording, memory = answer.recording, answer.estimate.memory
    assert recording is not None
    assert [rank.rank for rank in answer.ranks] == [0, 16, 32, 48]
    assert answer.ranks[1].stands_for == tuple(range(16, 32))
    assert recording.timeline.end == pytest.approx(answer.step_times_s[0], rel=1e-9)
    peaks = [rank.peak_memory_bytes or 0 for rank in answer.ranks]
    assert max(peaks) == pytest.approx(memory.peak, abs=8)
    assert peaks.index(max(peaks)) == memory.peak_stage


def test_a_name_a_scenario_and_a_loaded_one_give_the_same_answer() -> None:
    loaded = loaded_scenario("megatron_moe_mixtral_8xh100", UNEVEN)
    answers = [moesim.simulate(loaded.scenario, draws=2, seed=3), simulate_loaded(loaded, draws=2, seed=3)]
    assert answers[0].step_times_s.tolist() == answers[1].step_times_s.tolist()
    by_name = moesim.simulate("megatron_moe_mixtral_8xh100")
    assert by_name.estimate.step_time_s == pytest.approx(moesim.estimate("megatron_moe_mixtral_8xh100").step_time_s)


def test_ranks_are_reported_without_a_recording() -> None:
    answer = simulate_loaded(loaded_scenario("m6t_1t_v100x480"), ranks=(0, 5))
    assert answer.recording is None
    assert [rank.peak_memory_bytes for rank in answer.ranks] == [None, None]
    assert len(answer.ranks[0].stands_for) == 480


@pytest.mark.parametrize("finished", [0, 3])
def test_an_interruption_keeps_the_draws_that_are_finished(finished: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "BATCH_S", 0.0)
    loaded = loaded_scenario("megatron_moe_mixtral_8xh100", UNEVEN)
    run, runs = UnevenSteps.run, 0

    def interrupted(world: UnevenSteps, *arguments: Any) -> UnevenRun:
        nonlocal runs
        runs += 1
        if runs > finished:
            raise KeyboardInterrupt
        return run(world, *arguments)

    monkeypatch.setattr(UnevenSteps, "run", interrupted)
    if not finished:
        with pytest.raises(KeyboardInterrupt):
            simulate_loaded(loaded, draws=5, records=True)
        return
    answer = simulate_loaded(loaded, draws=5, records=True)
    assert (answer.draws, answer.draws_asked, answer.is_interrupted) == (3, 5, True)
    assert answer.recording is not None
    check_sums(answer)


def test_progress_is_told_batch_by_batch() -> None:
    told: list[tuple[int, int]] = []
    loaded = loaded_scenario("megatron_moe_mixtral_8xh100", UNEVEN)
    simulate_loaded(loaded, draws=40, advance=lambda done, total: told.append((done, total)))
    assert told[0] == (1, 40)
    assert told[-1] == (40, 40)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_ranks_that_would_fill_the_memory_are_refused_before_they_do() -> None:
    loaded = loaded_scenario("deepseek_v3")
    with pytest.raises(ScenarioError, match="at most") as caught:
        simulate_loaded(loaded, ranks=range(2048), records=True)
    assert caught.value.problems[0].field == "--ranks"


def test_many_operations_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "MANY_EVENTS", 10)
    answer = simulate_loaded(loaded_scenario("m6t_1t_v100x480"), records=True)
    assert [warning.code for warning in answer.estimate.warnings][-1] == "W-TRC-001"


def test_drawn_loads_are_what_the_answer_says_of_routing() -> None:
    answer = simulate_loaded(loaded_scenario("megatron_moe_mixtral_8xh100", UNEVEN), draws=5)
    assert answer.estimate.routing.max_over_mean_load > 1.1
    capped = loaded_scenario("m6t_1t_v100x480", "model.moe.router.imbalance={kind: preset, name: W1}")
    answer = simulate_loaded(capped, draws=2)
    assert 0.1 < answer.estimate.routing.dropped_fraction < 0.9


@pytest.mark.parametrize("seed", [1, 9, 20, 25, 47, 48, 53])
def test_recordings_of_random_scenarios_obey_the_format_and_hold_the_modelled_memory(seed: int, tmp_path: Path) -> None:
    loaded = loaded_document(random_document(seed))
    answer = simulate_loaded(loaded, draws=2, records=True)
    check_sums(answer)
    assert abs(answer.agreement.relative_difference) < 1e-6
    path, again = tmp_path / "trace.json", tmp_path / "again.json"
    write_simulated_trace(answer, path)
    check_trace(path)
    trace = read_chrome_trace(path)
    write_chrome_trace(
        trace.timeline, again, processes=trace.processes, memory=trace.memory, other_data=trace.other_data
    )
    assert again.read_bytes() == path.read_bytes()
    peak = max(rank.peak_memory_bytes or 0 for rank in answer.ranks)
    has_equal_chunks = loaded.scenario.parallelism.pipeline.schedule != "interleaved_one_f_one_b"
    assert peak == pytest.approx(answer.estimate.memory.peak, rel=1e-6 if has_equal_chunks else 0.15)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("schedule", ["one_f_one_b", "gpipe", "zb_h1", "dualpipe"])
def test_ranks_hold_the_activations_of_their_own_loads(schedule: str, recompute: str) -> None:
    """The peak of the fullest of all ranks, followed over time, is the one that the memory model gives a draw.

    The model counts a stage's two chunks in DualPipe as equal, which loads make unequal.
    """
    pipeline = f"parallelism.pipeline={{stages: 4, virtual_stages: 1, schedule: {schedule}}}"
    few = ("workload.sequences_per_step=128", f"parallelism.recompute={recompute}")
    answer = simulate_loaded(
        loaded_scenario("mixtral_8x7b", UNEVEN, pipeline, *few), ranks=range(64), records=True, seed=2
    )
    peaks = [rank.peak_memory_bytes or 0 for rank in answer.ranks]
    tolerance = 0.02 if schedule == "dualpipe" else 1e-9
    assert max(peaks) == pytest.approx(answer.peak_memory_bytes[0], rel=tolerance)
    assert len(set(peaks[:16])) > 1


def test_the_remedy_for_waiting_fits_what_is_waited_for() -> None:
    uneven = simulate_loaded(loaded_scenario("mixtral_8x7b", "model.moe.router.imbalance={kind: preset, name: W3}"))
    slow = simulate_loaded(
        loaded_scenario("mixtral_8x7b", EVEN), perturbations=Perturbations(slow_ranks=(SlowRank(17, 4.0),))
    )
    assert uneven.estimate.bottleneck.name == "imbalance"
    assert slow.estimate.bottleneck.name == "pipeline_bubble"
    assert "balancing" in uneven.estimate.bottleneck.relief
    assert "slow or late" in slow.estimate.bottleneck.relief
