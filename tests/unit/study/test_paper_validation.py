"""Figures of papers: the cases are complete, the report adds up, and what was fitted stays fitted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesim.cli import main
from moesim.errors import FormatError
from moesim.study.paper_validation import PaperReport, read_paper_cases, validate_papers

CASES = Path(__file__).resolve().parents[3] / "validation" / "papers" / "cases.json"


@pytest.fixture(scope="module")
def report() -> PaperReport:
    return validate_papers(read_paper_cases(CASES))


def test_every_case_is_predicted_and_has_a_source(report: PaperReport) -> None:
    assert len(report.results) >= 30
    assert len({result.case.id for result in report.results}) == len(report.results)
    for result in report.results:
        assert result.predicted > 0, result.case.id
        assert len(result.case.source) > 10


def test_gshards_all_to_all_at_2048_is_predicted_from_what_was_fitted_at_128(report: PaperReport) -> None:
    """Tolerance 20 %: one efficiency from the 128-core bar; no wraparound on either slice."""
    errors = {result.case.id: result for result in report.results if "all-to-all" in result.case.id}
    fitted, judged = errors["gshard fig8 128E all-to-all"], errors["gshard fig8 2048E all-to-all"]
    assert (fitted.case.role, judged.case.role) == ("fit", "judge")
    assert abs(fitted.error) < 0.05
    assert abs(judged.error) < 0.20


def test_statistics_are_those_of_the_listed_errors(report: PaperReport) -> None:
    answer = report.to_json()
    errors = sorted(abs(case["error"]) for case in answer["cases"] if case["role"] == "judge")
    assert answer["statistics"]["judge"]["count"] == len(errors)
    middle = len(errors) // 2
    median = errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2
    assert answer["statistics"]["judge"]["median"] == pytest.approx(median)


def test_the_command_writes_its_table_and_fails_beyond_a_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.md"
    assert main(["validate", "papers", "--json", "--report", str(page)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["cases"]) == page.read_text(encoding="utf-8").count("| fit |") + page.read_text(
        encoding="utf-8"
    ).count("| judge |")
    assert main(["validate", "papers", "--tolerance", "0.0001"]) == 1
    assert main(["validate", "papers", "--tolerance", "1000"]) == 0
    assert main(["validate", "papers", "--data", str(tmp_path)]) == 2
    assert "cases.json" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"role": "guess"}, {"quantity": "colour"}, {"colour": 3}])
def test_a_case_that_says_something_else_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    cases = json.loads(CASES.read_text(encoding="utf-8"))
    file = tmp_path / "cases.json"
    file.write_text(json.dumps([{**cases[0], **change}]), encoding="utf-8")
    with pytest.raises(FormatError, match="paper cases"):
        read_paper_cases(file)
