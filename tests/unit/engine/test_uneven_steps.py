"""Steps in an uneven world: even where nothing is uneven, what theory says of one slow rank, and the same draws again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from random_scenarios import loaded, random_document, shipped_library

from moesim.describe.perturbations import FlappingLink, Perturbations, SlowLink, SlowRank
from moesim.engine import uneven_steps as module
from moesim.engine.uneven_steps import UnevenSteps
from moesim.engine.uneven_world import loss_attribution, quantiles_s
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


def test_a_device_at_twice_the_time_delays_a_single_stage_by_all_it_computes() -> None:
    """One stage: every all-to-all waits for it, so all of its compute and update is on the longest path."""
    scenario = scenario_of(*ONE_STAGE)
    even = steps_of(scenario)
    slow = steps_of(scenario, Perturbations(slow_ranks=(SlowRank(5, 2.0),))).run([0])
    waiting = {"host", "all_to_all", "tensor_parallel", "context_parallel", "data_parallel", "pipeline_p2p"}
    waiting |= {"pipeline_bubble", "imbalance"}
    computed = sum(part[0, 0, 0] for name, part in even.even.exposed_s.items() if name not in waiting)
    hidden = sum(part[0, 0, 0] for part in even.even.hidden_s.values())
    delay = slow.run.step_time_s[0] - even.even.step_time_s[0]
    assert computed > 0.5 * even.even.step_time_s[0]
    assert computed - hidden - 1e-9 <= delay <= computed + 1e-9
    assert slow.drawn_s[0] == even.even.step_time_s[0]


def test_a_slow_rank_of_one_stage_is_the_pipeline_of_a_slow_stage() -> None:
    """1F1B from a max-plus recursion of its own: the stage of the slow rank takes longer, the others as before."""
    from moesim.engine.max_plus import pipeline_finish_s

    scenario = scenario_of(*SHORT, "parallelism.zero_stage=0")
    rank = int(steps_of(scenario).step.ranks.global_ranks(2)[3])
    slow = steps_of(scenario, Perturbations(slow_ranks=(SlowRank(rank, 1.5),)))
    found = slow.run([0]).run
    times, columns = slow.step.evaluation.times, scenario.columns
    forward, backward = times.forward_s.copy(), times.backward_s.copy()
    all_slow = steps_of(scenario, Perturbations(slow_ranks=tuple(SlowRank(r, 1.5) for r in range(64))))
    factors = all_slow.run([0]).run
    run_times = {key: part for key, part in _pass_seconds(all_slow).items()}
    forward[2], backward[2] = run_times[2, 0], run_times[2, 1]
    counts = np.array([round(float(columns["num_micro_batches"][0]))])
    finish = pipeline_finish_s("one_f_one_b", slow.step.evaluation.plan.placed, counts, forward, backward, None, times.exposed_hop_s)
    assert found.pipeline_finish_s[0].max(axis=1) == pytest.approx(finish[:, 0], rel=1e-9)
    assert factors.step_time_s[0] > found.step_time_s[0]


def _pass_seconds(steps: UnevenSteps) -> dict[tuple[int, int], float]:
    raise NotImplementedError
