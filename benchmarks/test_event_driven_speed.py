"""How long a step takes rank by rank: the scale the event-driven engine is for. Nothing here fails for being slow."""

from __future__ import annotations

import resource
import sys

import numpy as np
import pytest
from random_scenarios import shipped_library

from moesim.engine.drawn_loads import drawn_loads, with_even_loads
from moesim.engine.event_driven import RankDelays, SimulatedRun, run_step
from moesim.engine.step_passes import prepare_step
from moesim.estimation.loading import LoadedScenario, load

DIRICHLET = "model.moe.router.imbalance={kind: dirichlet, concentration: 10.0}"


def scenario(name: str, *changes: str) -> LoadedScenario:
    return load(name, assignments=changes, library=shipped_library())


def drawn_steps(loaded: LoadedScenario, draws: int) -> SimulatedRun:
    """Draw a load for every rank and layer, held over the step, price it and run all ranks."""
    step = prepare_step(with_even_loads(loaded.system), loaded.columns)
    directions = step.evaluation.plan.placed.directions
    loads = drawn_loads(step.system, step.columns, step.sequence, steps=range(draws), seed=1, directions=directions)
    seconds = [loads.seconds(step.system.hardware, direction) for direction in range(directions)]
    return run_step(step, loads=seconds)


def note(benchmark, run: SimulatedRun) -> None:
    """Say how many operations ran, and the most memory this process has had so far."""
    assert run.columns == run.ranks.count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    benchmark.extra_info |= {"operations": run.operations, "peak_gib": round(peak / 2**30, 2)}
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["operations_per_s"] = run.operations / seconds
        print(f"\n{run.operations / seconds / 1e6:.0f} million operations per second, {peak / 2**30:.2f} GiB")  # noqa: T201


@pytest.mark.benchmark(group="whole")
def test_one_step_of_m6t_1t_on_all_of_its_480_ranks(benchmark):
    loaded = scenario("m6t_1t_v100x480")

    def step():
        prepared = prepare_step(loaded.system, loaded.columns)
        return run_step(prepared, delays=RankDelays(compute_factor=np.linspace(1.0, 1.1, 480)))

    note(benchmark, benchmark(step))


@pytest.mark.benchmark(group="whole")
def test_one_step_of_deepseek_v3_on_2048_ranks_with_dualpipe_and_drawn_loads(benchmark):
    loaded = scenario("deepseek_v3", "parallelism.pipeline.schedule=dualpipe", DIRICHLET)
    note(benchmark, benchmark.pedantic(drawn_steps, (loaded, 1), rounds=3))


@pytest.mark.benchmark(group="whole")
def test_hundred_draws_of_mixtral_on_64_ranks(benchmark):
    loaded = scenario("mixtral_8x7b", DIRICHLET)
    note(benchmark, benchmark.pedantic(drawn_steps, (loaded, 100), rounds=3))


@pytest.mark.benchmark(group="targeted")
def test_max_plus_over_ranks_and_draws(benchmark):
    loaded = scenario("mixtral_8x7b")
    step = prepare_step(loaded.system, loaded.columns)
    delays = RankDelays(compute_factor=np.random.default_rng(1).uniform(1.0, 1.5, (100, 64)))
    note(benchmark, benchmark(run_step, step, delays=delays))


@pytest.mark.benchmark(group="targeted")
def test_timeline_of_one_rank_of_each_stage_of_deepseek_v3(benchmark):
    loaded = scenario("deepseek_v3")
    step = prepare_step(loaded.system, loaded.columns)
    run = benchmark.pedantic(run_step, (step,), {"timeline_ranks": range(0, 2048, 128)}, rounds=3)
    assert run.timeline is not None
    benchmark.extra_info["events"] = len(run.timeline)
