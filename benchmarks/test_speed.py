"""How long things take, in three groups: frequent, targeted, whole. Nothing here fails for being slow."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from random_scenarios import shipped_library

from moesim.describe.documents import read_document
from moesim.engine.max_plus import pipeline_finish_s
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import load
from moesim.estimation.spaces import Space, grid
from moesim.estimation.tables import estimate_many
from moesim.resources import find_scenario
from moesim.structure.pipeline_building_blocks import squeezed_orders
from moesim.structure.pipeline_schedules import build_program

needs_command_line = pytest.mark.skipif(
    importlib.util.find_spec("moesim.cli") is None, reason="moesim.cli, the command line, is not there"
)


@pytest.mark.benchmark(group="frequent")
def test_step_of_a_loaded_scenario(benchmark):
    scenario = load("m6t_1t_v100x480", library=shipped_library())
    answer = benchmark(estimate_loaded, scenario)
    assert answer.step_time_s > 0


@pytest.mark.benchmark(group="frequent")
@pytest.mark.parametrize("cases", [1, 2000])
def test_one_f_one_b_of_sixteen_stages(benchmark, cases):
    generator = np.random.default_rng(1)
    forward, backward = generator.uniform(1, 2, (16, cases)), generator.uniform(2, 4, (16, cases))
    counts, hop = np.full(cases, 240), np.full(cases, 0.01)
    finish = benchmark(pipeline_finish_s, "one_f_one_b", 1, counts, forward, backward, hop)
    assert finish.shape == (16, cases)


@pytest.mark.benchmark(group="targeted")
def test_interleaved_one_f_one_b_of_eight_stages_and_four_chunks(benchmark):
    generator = np.random.default_rng(2)
    forward, backward = generator.uniform(1, 2, (32, 500)), generator.uniform(2, 4, (32, 500))
    counts, hop = np.full(500, 128), np.full(500, 0.01)
    finish = benchmark(pipeline_finish_s, "interleaved_one_f_one_b", 4, counts, forward, backward, hop)
    assert finish.shape == (8, 500)


@pytest.mark.benchmark(group="targeted")
@pytest.mark.parametrize("schedule", ["dualpipe", "v_half"])
def test_program_of_sixteen_stages_and_sixty_four_micro_batches(benchmark, schedule):
    virtual = 2 if schedule == "v_half" else 1

    def unroll():
        squeezed_orders.cache_clear()
        return build_program.__wrapped__(schedule, 16, virtual, 64)

    program = benchmark(unroll)
    assert (program.stage >= 0).sum() > 2 * 16 * virtual * 64


@pytest.mark.benchmark(group="targeted")
def test_dualpipe_of_sixteen_stages(benchmark):
    generator = np.random.default_rng(3)
    forward, backward = generator.uniform(1, 2, (16, 500)), generator.uniform(2, 4, (16, 500))
    counts, hop = np.full(500, 240), np.full(500, 0.01)
    finish = benchmark(pipeline_finish_s, "dualpipe", 1, counts, forward, backward, hop, backward / 2)
    assert finish.shape == (16, 500)


@pytest.mark.benchmark(group="targeted")
def test_scenario_read_and_checked(benchmark):
    library = shipped_library()
    assert benchmark(lambda: load("deepseek_v3", library=library)).scenario.devices == 2048


def deepseek_space() -> Space:
    """Layouts of DeepSeek-V3 on 2,048 devices: every row is legal, whether it fits or not."""
    axes = {
        "parallelism.data": ["auto"],
        "parallelism.tensor": [1, 2, 4, 8],
        "parallelism.pipeline.stages": [1, 2, 4, 8, 16],
        "parallelism.expert": [1, 2, 4, 8, 16, 32, 64, 128],
        "parallelism.zero_stage": [0, 1, 2, 3],
        "parallelism.recompute": ["none", "selective", "full"],
        "model.moe.router.capacity_factor": [None, 1.0, 1.25, 1.5, 2.0],
        "workload.sequences_per_micro_batch": [1, 2, 3, 4, 6],
        "workload.sequences_per_step": [24576, 49152, 73728],
    }
    return grid(read_document(find_scenario("deepseek_v3")), axes)


@pytest.mark.benchmark(group="whole")
@pytest.mark.parametrize("workers", [1, 2])
def test_configurations_of_deepseek_v3_per_second(benchmark, capsys, workers):
    """The headline: verdict, memory, step time with bounds, tokens/s and MFU of each configuration."""
    space = deepseek_space()
    table = benchmark.pedantic(
        estimate_many, args=(space,), kwargs={"workers": workers}, rounds=3 if benchmark.enabled else 1
    )
    funnel = table.funnel()
    assert funnel["illegal"] == 0
    assert funnel["tried"] == len(space) >= 100_000
    benchmark.extra_info |= funnel
    if benchmark.enabled:
        rate = len(space) / benchmark.stats.stats.median
        benchmark.extra_info["configurations_per_s"] = round(rate)
        text = f"{len(space):,} legal configurations, workers={workers}: {rate:,.0f} configurations per second"
        with capsys.disabled():
            sys.stdout.write(f"\n{text}\n")


def run_command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "moesim", *arguments], check=True, capture_output=True)


@pytest.mark.benchmark(group="whole")
def test_python_starts(benchmark):
    """What every command pays before moesim: the floor of the next two."""
    benchmark.pedantic(lambda: subprocess.run([sys.executable, "-c", ""], check=True), rounds=5)


@pytest.mark.benchmark(group="whole")
@needs_command_line
def test_command_line_help(benchmark):
    benchmark.pedantic(run_command, args=("--help",), rounds=5)


@pytest.mark.benchmark(group="whole")
@needs_command_line
def test_command_line_estimate(benchmark):
    benchmark.pedantic(run_command, args=("estimate", "m6t_1t_v100x480"), rounds=5)
