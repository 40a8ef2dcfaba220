from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from random_scenarios import loaded, random_document, shipped_library, with_fields
from rank_by_rank import pipeline_finish_s as plain_finish_s
from timeline_checks import early_passes, overlapping_events, separate_ends, unsorted_events

from moesim.engine.analytical import evaluate
from moesim.engine.event_driven import RankDelays, SimulatedRun, run_step, simulate_step
from moesim.engine.step_passes import PreparedStep, prepare_step
from moesim.engine.stream_times import RankSeconds
from moesim.errors import ScenarioError
from moesim.estimation.loading import LoadedScenario, load
from moesim.resources import shipped_scenarios
from moesim.structure.pipeline_schedules import SCHEDULES
from moesim.structure.step_graph import CATEGORIES

AGREEMENT = 1e-6
RANDOM = 200
RECORDED = range(24)
FOLDED = ("zb_v", "v_half", "v_min", "dualpipe_v")


def step_time_s(scenario: LoadedScenario) -> float:
    (evaluation,) = evaluate(scenario.system, scenario.columns)
    return float(evaluation.step_time_s[0])


@lru_cache(maxsize=16)
def small(*more: str) -> LoadedScenario:
    """Four layers of Mixtral on 32 ranks: two stages, expert parallelism 8, two data replicas, four micro-batches."""
    changes = [
        "parallelism.pipeline={stages: 2}",
        "parallelism.data=auto",
        "parallelism.tensor=1",
        "parallelism.expert=8",
        "devices=32",
        "workload.sequences_per_step=64",
        "model.layers.0.count=4",
        *more,
    ]
    return load("mixtral_8x7b", assignments=changes, library=shipped_library())


@lru_cache(maxsize=1)
def small_step() -> PreparedStep:
    return prepare_step(small().system, small().columns)


def random_loads(step: PreparedStep, draws: int = 1, seed: int = 1) -> RankSeconds:
    """Seconds of all that grows with load, up to twice the even ones."""
    dice = np.random.default_rng(seed)
    loads = {}
    for layer, kind in enumerate(step.sequence.order):
        program = step.block_programs[kind]
        for row in program.operations:
            if row.grows_with_load:
                even_s = program.even_s[row.table, row.index][0]
                loads[layer, row.phase, row.index] = even_s * (1.0 + dice.random((draws, step.ranks.count)))
    return loads


class TestAgreementWithTheAnalyticalEngine:
    @pytest.mark.parametrize("name", [path.stem for path in shipped_scenarios()])
    def test_shipped_scenarios_at_even_load(self, name):
        scenario = load(name, library=shipped_library())
        run = simulate_step(scenario.system, scenario.columns)
        assert run.step_time_s[0] == pytest.approx(step_time_s(scenario), rel=AGREEMENT)

    @pytest.mark.parametrize("kind", ["prefill", "decode"])
    @pytest.mark.parametrize("name", ["mixtral_8x7b", "deepseek_v3", "switch_base", "glam_64b_64e"])
    def test_inference_at_even_load(self, name, kind):
        changes = [f"workload.kind={kind}", "parallelism.pipeline.virtual_stages=1"]
        changes.append("parallelism.pipeline.schedule=one_f_one_b")
        scenario = load(name, assignments=changes, library=shipped_library())
        run = simulate_step(scenario.system, scenario.columns)
        assert run.step_time_s[0] == pytest.approx(step_time_s(scenario), rel=AGREEMENT)

    def test_two_hundred_random_scenarios(self):
        for seed in range(RANDOM):
            scenario = loaded(random_document(seed))
            run = simulate_step(scenario.system, scenario.columns)
            assert run.step_time_s[0] == pytest.approx(step_time_s(scenario), rel=AGREEMENT), seed

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_random_scenarios_under_every_schedule(self, schedule):
        tried = 0
        for seed in range(24):
            fields = random_document(seed)
            if fields["workload"]["kind"] != "training" or fields["parallelism"]["pipeline"]["stages"] < 2:
                continue
            pipeline = {
                "schedule": schedule,
                "virtual_stages": 2 if schedule in FOLDED else 1,
                "layers_per_stage": None,
            }
            try:
                scenario = loaded(
                    with_fields(fields, {f"parallelism.pipeline.{key}": pipeline[key] for key in pipeline})
                )
            except ScenarioError:
                continue
            run = simulate_step(scenario.system, scenario.columns)
            assert run.step_time_s[0] == pytest.approx(step_time_s(scenario), rel=AGREEMENT), seed
            tried += 1
        assert tried >= 2

    def test_alike_ranks_told_apart_take_as_long(self):
        for seed in range(0, 60, 3):
            scenario = loaded(random_document(seed))
            ranks = int(scenario.columns["devices"][0])
            apart = RankDelays(compute_factor=np.ones(ranks))
            run = simulate_step(scenario.system, scenario.columns, delays=apart)
            assert run.columns == ranks // run.ranks.stages
            assert run.step_time_s[0] == pytest.approx(step_time_s(scenario), rel=AGREEMENT), seed


@lru_cache(maxsize=64)
def recorded(seed: int) -> SimulatedRun:
    """A random scenario whose ranks compute at random speeds, some of them recorded."""
    scenario = loaded(random_document(seed))
    dice = np.random.default_rng(seed)
    step = prepare_step(scenario.system, scenario.columns)
    count = step.ranks.stages * step.ranks.count
    local = int(dice.integers(step.ranks.count))
    same_place = [int(step.ranks.global_ranks(stage)[local]) for stage in range(step.stages)]
    ranks = [*same_place, *dice.choice(count, min(count, 3), replace=False).tolist()]
    delays = RankDelays(compute_factor=1.0 + 0.5 * dice.random(count), host_late_s=1e-5 * dice.random((1, count, 3)))
    return run_step(step, delays=delays, timeline_ranks=ranks)


class TestWhatNoMachineCanDo:
    @pytest.mark.parametrize("seed", RECORDED)
    def test_no_stream_runs_two_things_at_once(self, seed):
        assert overlapping_events(recorded(seed).timeline) == 0

    @pytest.mark.parametrize("seed", RECORDED)
    def test_events_are_sorted_and_run_forwards(self, seed):
        assert unsorted_events(recorded(seed).timeline) == 0

    @pytest.mark.parametrize("seed", RECORDED)
    def test_nothing_starts_before_its_input_has_arrived(self, seed):
        run = recorded(seed)
        first = run.ranks.place(run.timeline.ranks[:1])[1][0]
        column = [int(run.ranks.global_ranks(stage)[first]) for stage in range(run.ranks.stages)]
        assert early_passes(run.timeline.of_ranks(column)) == 0

    @pytest.mark.parametrize("seed", RECORDED)
    def test_exposed_parts_sum_to_the_step_time_on_every_rank(self, seed):
        run = recorded(seed)
        np.testing.assert_allclose(
            sum(run.exposed_s.values()), run.step_time_s[:, None, None] * np.ones_like(run.finish_s)
        )
        for category, seconds in (*run.exposed_s.items(), *run.hidden_s.items()):
            assert category in CATEGORIES
            assert seconds.min() >= -1e-9 * run.step_time_s[0]

    @pytest.mark.parametrize("seed", RECORDED)
    def test_unfolded_passes_end_when_folded_ones_do_and_take_the_same_by_category(self, seed):
        run = recorded(seed)
        stage, place = run.ranks.place(run.timeline.ranks)
        for rank, at in zip(run.timeline.ranks, zip(stage, place, strict=True), strict=True):
            own = run.timeline.take(run.timeline.rank == rank)
            at_work = own.take(own.category != CATEGORIES.index("pipeline_p2p"))
            assert at_work.end == pytest.approx(run.finish_s[0][at], rel=1e-9)
            for category in ("expert_gemm", "attention", "all_to_all", "recompute", "data_parallel", "tensor_parallel"):
                events = own.take(own.category == CATEGORIES.index(category))
                parts = [part[category][0][at] for part in (run.exposed_s, run.hidden_s) if category in part]
                seconds = float((events.end_s - events.start_s).sum())
                assert seconds == pytest.approx(sum(parts), abs=1e-9 * run.step_time_s[0]), category

    def test_members_of_a_collective_start_and_end_together(self):
        step = small_step()
        groups = step.ranks.groups["expert"].members(step.ranks.count)
        ranks = step.ranks.global_ranks(1)[groups[1]]
        run = run_step(step, loads=random_loads(step), timeline_ranks=ranks.tolist())
        assert separate_ends(run.timeline, ranks) == 0
        others = [int(ranks[0]), int(step.ranks.global_ranks(1)[groups[0, 0]])]
        run = run_step(step, loads=random_loads(step), timeline_ranks=others)
        assert separate_ends(run.timeline, np.array(others)) > 0  # another group meets by itself

    def test_as_many_bytes_leave_as_the_tables_have(self):
        step = small_step()
        run = run_step(step, loads=random_loads(step), timeline_ranks=range(32))
        timeline, program = run.timeline, step.block_programs[0]
        micro_batches, layers = int(step.columns["num_micro_batches"][0]), len(step.sequence.order) // 2
        sent = sum(row.num_bytes for row in program.operations if row.stream == "all_to_all") * micro_batches * layers
        for rank in range(32):
            events = timeline.take((timeline.rank == rank) & (timeline.stream == 1))
            assert events.num_bytes.sum() == pytest.approx(sent)
        for direction in (1, -1):
            down = np.sign(timeline.messages.target_rank - timeline.messages.source_rank) == direction
            assert timeline.messages.num_bytes[down].sum() == pytest.approx(16 * micro_batches * step.hop_bytes)


class TestPlainPythonRankByRank:
    """The same operations without folding, arrays or an unrolled program."""

    def agrees(self, scenario: LoadedScenario, seed: int) -> None:
        step = prepare_step(scenario.system, scenario.columns)
        count = step.ranks.stages * step.ranks.count
        dice = np.random.default_rng(seed)
        loads, delays = random_loads(step, seed=seed), RankDelays(compute_factor=1.0 + dice.random(count))
        run = run_step(step, loads=loads, delays=delays)
        passes = step.passes([loads], lambda stage: delays.compute_factor_of(step.ranks, stage, slice(1)))
        np.testing.assert_allclose(run.pipeline_finish_s[0], plain_finish_s(step, passes), rtol=1e-12)

    def test_random_scenarios(self):
        tried = 0
        for seed in range(60):
            scenario = loaded(random_document(seed))
            passes = scenario.columns["num_micro_batches"][0] * scenario.columns["devices"][0]
            if scenario.scenario.workload.kind == "training" and passes <= 600:
                self.agrees(scenario, seed)
                tried += 1
        assert tried >= 10

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_every_schedule(self, schedule):
        virtual = 2 if schedule in (*FOLDED, "interleaved_one_f_one_b") else 1
        self.agrees(small(f"parallelism.pipeline={{stages: 2, schedule: {schedule}, virtual_stages: {virtual}}}"), 5)


class TestDeterminism:
    def test_same_loads_give_the_same_bytes(self):
        step, again = small_step(), prepare_step(small().system, small().columns)
        loads = random_loads(step, draws=3)
        one, two = (run_step(prepared, loads=loads, timeline_ranks=[0, 9]) for prepared in (step, again))
        assert one.finish_s.tobytes() == two.finish_s.tobytes()
        assert one.timeline.start_s.tobytes() == two.timeline.start_s.tobytes()
        assert one.timeline.name.tobytes() == two.timeline.name.tobytes()

    def test_draws_together_are_draws_one_by_one(self):
        step = small_step()
        loads = random_loads(step, draws=4)
        together = run_step(step, loads=loads)
        for draw in range(4):
            alone = run_step(step, loads={key: values[draw] for key, values in loads.items()})
            np.testing.assert_array_equal(alone.finish_s[0], together.finish_s[draw])

    def test_draws_in_batches_are_draws_at_once(self, monkeypatch):
        step = small_step()
        loads = random_loads(step, draws=5)
        at_once = run_step(step, loads=loads)
        monkeypatch.setattr("moesim.engine.event_driven.CELLS_AT_ONCE", 2 * len(step.nodes) * step.ranks.count)
        batches = run_step(step, loads=loads)
        np.testing.assert_array_equal(at_once.finish_s, batches.finish_s)
        np.testing.assert_array_equal(at_once.exposed_s["imbalance"], batches.exposed_s["imbalance"])

    def test_numbering_of_groups_and_of_members_does_not_matter(self):
        step = small_step()
        loads = random_loads(step)
        order = np.arange(16).reshape(2, 8)[::-1, np.random.default_rng(3).permutation(8)].ravel()
        plain = run_step(step, loads=loads)
        turned = run_step(step, loads={key: values[:, order] for key, values in loads.items()})
        np.testing.assert_allclose(turned.finish_s, plain.finish_s[:, :, order], rtol=1e-12)
        assert turned.step_time_s[0] == pytest.approx(plain.step_time_s[0], rel=1e-12)


class TestBothWays:
    """DualPipe: every stage holds two chunks, one for each direction."""

    def test_one_mapping_of_loads_stands_for_both_directions(self):
        scenario = small("parallelism.pipeline={stages: 2, schedule: dualpipe}")
        step = prepare_step(scenario.system, scenario.columns)
        loads = random_loads(step)
        one, two = run_step(step, loads=loads), run_step(step, loads=[loads, loads])
        np.testing.assert_array_equal(one.finish_s, two.finish_s)

    def test_each_direction_has_loads_of_its_own(self):
        scenario = small("parallelism.pipeline={stages: 2, schedule: dualpipe}")
        step = prepare_step(scenario.system, scenario.columns)
        loads = random_loads(step)
        slow = {key: 2.0 * values for key, values in loads.items()}
        even, up, down = (run_step(step, loads=[*pair]) for pair in ((loads, loads), (loads, slow), (slow, loads)))
        assert up.step_time_s[0] > even.step_time_s[0]
        assert up.step_time_s[0] == pytest.approx(down.step_time_s[0], rel=0.02)
        np.testing.assert_allclose(up.pipeline_finish_s[0, ::-1], down.pipeline_finish_s[0], rtol=0.05)

    def test_stages_with_the_same_chunks_exchange_gradients_at_once(self):
        scenario = small("parallelism.pipeline={stages: 2, schedule: dualpipe}")
        step = prepare_step(scenario.system, scenario.columns)
        run = run_step(step, loads=[random_loads(step, seed=1), random_loads(step, seed=2)])
        assert np.ptp(run.pipeline_finish_s.max(axis=2)) > 1e-6
        assert np.ptp(run.finish_s) == pytest.approx(0.0, abs=1e-9)


class TestSlowRanks:
    """What theory says of one rank that takes longer."""

    def test_every_rank_of_a_synchronous_step_waits_for_the_slowest(self):
        scenario = load("m6t_base_v100", library=shipped_library())
        step = prepare_step(scenario.system, scenario.columns)
        even = run_step(step)
        factor = np.ones(step.ranks.count)
        factor[3 % step.ranks.count] = 1.5
        slow = run_step(step, delays=RankDelays(compute_factor=factor))
        compute = sum(even.exposed_s[name][0, 0, 0] for name in (*COMPUTE, "optimizer") if name in even.exposed_s)
        assert slow.step_time_s[0] - even.step_time_s[0] == pytest.approx(0.5 * compute, rel=1e-9)

    def test_a_slow_expert_layer_of_one_rank_delays_every_micro_batch_of_the_critical_stage(self):
        step, extra_s = small_step(), 1e-3
        loads = even_loads(step)
        key = next(key for key in loads if key[:2] == (3, "forward"))
        slow = loads[key].copy()
        slow[0, 5] += extra_s
        even, run = run_step(step, loads=loads), run_step(step, loads={**loads, key: slow})
        delay = extra_s * step.columns["num_micro_batches"][0]
        assert run.step_time_s[0] - even.step_time_s[0] == pytest.approx(delay, rel=1e-6)
        late = run.pipeline_finish_s[0, 1] - even.pipeline_finish_s[0, 1]
        np.testing.assert_allclose(late[:8], delay, rtol=1e-6)  # the rank's expert group; the other meets it at the end
        np.testing.assert_allclose(late[8:], 0.0, atol=1e-12)
        np.testing.assert_allclose(run.exposed_s["imbalance"][0, 1, 8:] - even.exposed_s["imbalance"][0, 1, 8:], delay)

    def test_a_slow_critical_stage_delays_by_every_micro_batch(self):
        step = small_step()
        loads, extra_s = even_loads(step), 0.5
        slow = {key: values + extra_s * (key == (3, "forward", key[2])) for key, values in loads.items()}
        added = sum(extra_s for key in loads if key[:2] == (3, "forward"))
        assert added
        even, run = run_step(step, loads=loads), run_step(step, loads=slow)
        own = step.columns["num_micro_batches"][0] * added
        assert run.step_time_s[0] - even.step_time_s[0] == pytest.approx(own, rel=0.02)

    def test_ranks_wait_at_each_layer_for_another_one(self):
        step = small_step()
        micro_batches, extra_s = step.columns["num_micro_batches"][0], 0.01
        loads = even_loads(step)
        on_one_rank, spread = dict(loads), dict(loads)
        for layer in (2, 3):
            key = next(key for key in loads if key[0] == layer and key[1] == "forward")
            on_one_rank[key], spread[key] = loads[key].copy(), loads[key].copy()
            on_one_rank[key][0, 0] += extra_s
            spread[key][0, layer] += extra_s
        one, two = (run_step(step, loads=seconds).step_time_s[0] for seconds in (on_one_rank, spread))
        assert one == pytest.approx(two, rel=1e-9)  # the sum over layers of the slowest, whoever it is
        even = run_step(step, loads=loads).step_time_s[0]
        assert one - even == pytest.approx(2 * extra_s * micro_batches, rel=1e-6)

    def test_a_late_host_delays_what_it_issues(self):
        step = small_step()
        even = run_step(step, delays=RankDelays(compute_factor=np.ones(32)))
        late = np.zeros((1, 32, step.passes_per_rank))
        late[0, 4, 0] = 10.0
        run = run_step(step, delays=RankDelays(host_late_s=late))
        pass_s = 10.0 + float(next(iter(step.passes([{}], lambda _: np.ones((1, 1))).values())).host_s[0, 0])
        assert run.step_time_s[0] == pytest.approx(even.step_time_s[0] + pass_s, rel=0.05)
        assert run.exposed_s["host"][0, 0, 4] > 9.0


COMPUTE = (
    "attention",
    "dense_ffn",
    "router",
    "dispatch_combine",
    "expert_gemm",
    "embedding_head_loss",
    "memory_bound",
)


def even_loads(step: PreparedStep) -> RankSeconds:
    ones = {}
    for layer, kind in enumerate(step.sequence.order):
        program = step.block_programs[kind]
        for row in program.operations:
            if row.grows_with_load:
                ones[layer, row.phase, row.index] = np.full(
                    (1, step.ranks.count), program.even_s[row.table, row.index][0]
                )
    return ones


def test_one_row_only():
    scenario = small()
    with pytest.raises(ValueError, match="one scenario at a time, not 2"):
        simulate_step(scenario.system, scenario.columns.take(np.array([0, 0])))


def test_ranks_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="no rank 32: ranks are 0 to 31"):
        run_step(small_step(), timeline_ranks=[32])
