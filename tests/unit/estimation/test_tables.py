from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_scenarios import loaded, random_document, shipped_library

from moesim.describe.documents import Document, assign, read_document
from moesim.errors import ScenarioError
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import load_document
from moesim.estimation.spaces import Axis, Space, grid, read_space
from moesim.estimation.step_estimate import StepEstimate
from moesim.estimation.tables import (
    MEASURES,
    VERDICTS,
    EstimateTable,
    SpaceEstimator,
    estimate_many,
    joined_tables,
)
from moesim.resources import data_directory, find_scenario
from moesim.structure.pipeline_schedules import SCHEDULES

SPACES = data_directory("scenarios") / "spaces"

DEEPSEEK_AXES: dict[str, list[Any]] = {
    "parallelism.data": ["auto"],
    "parallelism.pipeline.schedule": ["one_f_one_b", "interleaved_one_f_one_b"],
    "parallelism.tensor": [1, 2, 3, 8],
    "parallelism.context": [1, 2],
    "parallelism.pipeline.stages": [1, 4, 16],
    "parallelism.pipeline.virtual_stages": [1, 2],
    "parallelism.expert": [8, 64, 96],
    "parallelism.recompute": ["none", "selective", "full"],
    "parallelism.zero_stage": [0, 1, 2, 3],
    "workload.sequences_per_micro_batch": [1, 2],
    "workload.sequences_per_step": [3840, 15360],
    "model.moe.router.capacity_factor": [None, 1.0, 1.25],
}


def deepseek_space() -> Space:
    return grid(read_document(find_scenario("deepseek_v3")), DEEPSEEK_AXES)


def document_of_row(space: Space, row: int) -> Document:
    document = space.base
    for path, value in space.row_values(row).items():
        document = assign(document, path, value)
    return document


def single_answer(document: Document) -> tuple[str, StepEstimate | None]:
    """Verdict and answer of one scenario on its own."""
    try:
        answer = estimate_loaded(load_document(document, shipped_library()))
    except ScenarioError:
        return "illegal", None
    return ("ok" if answer.fits else "does_not_fit"), answer


def assert_row_equals_estimate(table: EstimateTable, row: int, document: Document) -> str:
    verdict, answer = single_answer(document)
    assert VERDICTS[table.verdict[row]] == verdict, f"row {row}: {table.row(row)}"
    actual = {name: float(table[name][row]) for name in MEASURES}
    if answer is None:
        assert all(np.isnan(value) for value in actual.values())
        return verdict
    expected = {
        "step_time_s": answer.step_time_s,
        "lower_s": answer.lower_s,
        "upper_s": answer.upper_s,
        "tokens_per_s": answer.tokens_per_s,
        "mfu_fraction": answer.mfu_fraction,
    }
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-12), f"row {row}: {name}"
    # whole bytes per category there, of the sum here
    assert abs(actual["memory_peak_bytes"] - answer.memory.peak) <= 6
    return verdict


class TestTableEqualsEstimates:
    @pytest.mark.slow
    def test_random_rows_of_a_grid_over_deepseek_v3(self):
        space = deepseek_space()
        table = estimate_many(space)
        assert len(table) == len(space) > 20_000
        generator = np.random.default_rng(11)
        by_verdict = [np.flatnonzero(table.verdict == number) for number in range(3)]
        assert all(len(rows) > 500 for rows in by_verdict)
        seen = set()
        for rows in by_verdict:
            for row in generator.choice(rows, 50, replace=False):
                seen.add(assert_row_equals_estimate(table, int(row), document_of_row(space, int(row))))
        assert seen == set(VERDICTS)

    def test_rows_of_a_space_of_linked_structural_fields(self):
        """Top-k against prototypes at two capacities: each variant is a model of its own."""
        space = read_space(SPACES / "m6t_variants.yaml")
        table = estimate_many(space)
        assert len(table) == 9
        for row in range(9):
            assert_row_equals_estimate(table, row, document_of_row(space, row))
        assert len(set(table["step_time_s"])) > 3

    def test_rows_of_structural_axes_across_numeric_ones(self):
        base = read_document(find_scenario("mixtral_8x7b"))
        axes = {
            "parallelism.tensor": [1, 2],
            "precision.compute": ["bf16", "fp8"],
            "parallelism.expert": [1, 8],
            "model.moe.router.imbalance": [{"kind": "uniform"}, {"kind": "max_over_mean", "value": 2.0}],
            "workload.sequences_per_micro_batch": [1, 2],
        }
        space = grid(base, axes)
        table = estimate_many(space)
        verdicts = {assert_row_equals_estimate(table, row, document_of_row(space, row)) for row in range(len(space))}
        assert "ok" in verdicts
        for row, values in enumerate(product(*axes.values())):
            assert tuple(space.row_values(row).values()) == values

    def test_rows_of_every_pipeline_schedule(self):
        """Weight gradients apart, chunks in a V and both ways: legal and illegal rows, several stages and batches."""
        axes = {
            "parallelism.pipeline.schedule": list(SCHEDULES),
            "parallelism.pipeline.virtual_stages": [1, 2],
            "parallelism.pipeline.stages": [2, 4],
            "workload.sequences_per_step": [64, 256, 2048],
        }
        base = assign(read_document(find_scenario("mixtral_8x7b")), "parallelism.data", "auto")
        space = grid(base, axes)
        table = estimate_many(space)
        verdicts = [assert_row_equals_estimate(table, row, document_of_row(space, row)) for row in range(len(space))]
        legal = [row for row in range(len(space)) if verdicts[row] != "illegal"]
        assert {space.row_values(row)["parallelism.pipeline.schedule"] for row in legal} == set(SCHEDULES)
        assert len(legal) < len(space)

    @pytest.mark.slow
    def test_a_list_of_random_scenarios(self):
        scenarios = [loaded(random_document(seed)).scenario for seed in range(200)]
        table = estimate_many(scenarios)
        for row, scenario in enumerate(scenarios):
            answer = estimate_loaded(loaded(random_document(row)))
            assert table["step_time_s"][row] == pytest.approx(answer.step_time_s, rel=1e-12), scenario.name
            assert VERDICTS[table.verdict[row]] == ("ok" if answer.fits else "does_not_fit")

    def test_virtual_stages_of_a_prefill_are_illegal_in_a_grid_too(self):
        base = assign(read_document(find_scenario("mixtral_8x7b")), "workload.kind", "prefill")
        base = assign(base, "parallelism.pipeline.schedule", "interleaved_one_f_one_b")
        space = grid(base, {"parallelism.pipeline.stages": [1, 2], "parallelism.pipeline.virtual_stages": [1, 2]})
        table = estimate_many(space)
        for row in range(len(space)):
            assert_row_equals_estimate(table, row, document_of_row(space, row))

    @pytest.mark.parametrize("field", ["source_length", "target_length"])
    def test_lengths_that_a_decoder_has_no_use_for_are_illegal_in_a_grid_too(self, field):
        space = grid(read_document(find_scenario("mixtral_8x7b")), {f"workload.{field}": [1024, 2048]})
        table = estimate_many(space)
        for row in range(len(space)):
            assert_row_equals_estimate(table, row, document_of_row(space, row))

    def test_a_length_missing_in_the_base_may_come_from_an_axis(self):
        base = assign(read_document(find_scenario("mixtral_8x7b")), "workload.sequence_length", None)
        space = grid(base, {"workload.sequence_length": [1024, 2048]})
        table = estimate_many(space)
        for row in range(len(space)):
            assert_row_equals_estimate(table, row, document_of_row(space, row))


def assert_same_tables(one: EstimateTable, two: EstimateTable) -> None:
    assert (one.verdict == two.verdict).all()
    assert [one.reasons[code] for code in one.reason_code] == [two.reasons[code] for code in two.reason_code]
    for name in MEASURES:
        assert one[name].tobytes() == two[name].tobytes(), name


@pytest.mark.slow
class TestSplittingTheWork:
    def test_two_workers_give_the_same_bits_as_one(self):
        axes = {**DEEPSEEK_AXES, "workload.sequences_per_micro_batch": [1, 2, 3, 4, 6]}
        space = grid(read_document(find_scenario("deepseek_v3")), axes)
        assert len(space) > 50_000, "else there is one chunk and one worker"
        assert_same_tables(estimate_many(space, workers=1), estimate_many(space, workers=2))

    def test_bounds_of_the_chunks_do_not_matter(self):
        space = deepseek_space()
        estimator = SpaceEstimator(space)
        whole = estimator.estimate_rows(0, len(space))
        edges = [0, 1, 2, 1000, 1024, 7777, len(space) - 1, len(space)]
        parts = [estimator.estimate_rows(*bounds) for bounds in pairwise(edges)]
        assert_same_tables(whole, joined_tables(space, parts))

    def test_order_of_the_chunks_does_not_matter(self):
        space = deepseek_space()
        backwards = SpaceEstimator(space)
        late = backwards.estimate_rows(5000, 9000)
        early = backwards.estimate_rows(0, 5000)
        whole = SpaceEstimator(space).estimate_rows(0, 9000)
        assert_same_tables(whole, joined_tables(space, [early, late]))


class TestFunnel:
    def test_verdicts_add_up_to_the_rows_tried(self):
        table = SpaceEstimator(deepseek_space()).estimate_rows(0, 5000)
        funnel = table.funnel()
        assert funnel["tried"] == 5000 == funnel["illegal"] + funnel["does_not_fit"] + funnel["ok"]
        counts = table.reason_counts()
        assert sum(counts.values()) == funnel["illegal"] + funnel["does_not_fit"]
        assert counts["memory"] == funnel["does_not_fit"]
        assert list(counts.values()) == sorted(counts.values(), reverse=True)

    def test_illegal_rows_have_a_reason_and_no_numbers_and_the_others_have_numbers(self):
        table = SpaceEstimator(deepseek_space()).estimate_rows(0, 5000)
        illegal = table.verdict == VERDICTS.index("illegal")
        fine = table.verdict == VERDICTS.index("ok")
        assert ((table.reason_code > 0) == ~fine).all()
        for name in MEASURES:
            assert np.isnan(table[name][illegal]).all()
            assert (table[name][~illegal] > 0).all()

    def test_bounds_hold_in_every_row(self):
        table = SpaceEstimator(deepseek_space()).estimate_rows(0, 10_000)
        legal = table.verdict != VERDICTS.index("illegal")
        assert (table["lower_s"][legal] <= table["step_time_s"][legal]).all()
        assert (table["step_time_s"][legal] <= table["upper_s"][legal]).all()


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="no scenarios"):
        estimate_many([])


def test_an_axis_with_a_wrong_value_is_refused_with_its_path():
    space = grid(read_document(find_scenario("mixtral_8x7b")), {"parallelism.zero_stage": [0, 7]})
    with pytest.raises(ScenarioError, match="zero_stage"):
        estimate_many(space)


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_spaces_have_configurations_that_are_fine(path: Path):
    table = estimate_many(path)
    assert table.funnel()["ok"] > 0


def test_linked_axes_vary_together_and_the_last_axis_fastest():
    base = read_document(find_scenario("mixtral_8x7b"))
    linked = Axis("shape", {"parallelism.tensor": [1, 2], "parallelism.sequence": [False, True]})
    space = Space(base, (linked, Axis("e", {"parallelism.expert": [2, 4, 8]})))
    rows = [tuple(row.values())[:3] for row in SpaceEstimator(space).estimate_rows(0, 6).rows()]
    assert rows == [(1, False, 2), (1, False, 4), (1, False, 8), (2, True, 2), (2, True, 4), (2, True, 8)]
