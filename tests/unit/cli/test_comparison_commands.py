"""``moesim compare``: exit codes, files, bad input."""

from __future__ import annotations

import json

import pytest
from measured_files import result, write_records

from moesim.cli import main

SHAPE = {"m": 4096, "n": 4096, "k": 4096}


@pytest.fixture
def records(tmp_path):
    return str(write_records(tmp_path / "r.jsonl", [result("gemm", "gemm", "forward", SHAPE, median_s=2e-4)]))


def test_report_chart_and_json_are_written_and_the_exit_code_says_fine(capsys, tmp_path, records):
    report, chart = tmp_path / "report.md", tmp_path / "chart.html"
    files = ["--out", str(report), "--chart", str(chart)]
    assert main(["compare", records, "--profile", "h200_sxm", "--tolerance", "0.5", "--json", *files]) == 0
    answer = json.loads(capsys.readouterr().out)
    (case,) = answer["cases"]
    assert case["low_s"] < case["predicted_s"] < case["high_s"]
    assert answer["suites"]["gemm"]["median"] == pytest.approx(abs(case["predicted_s"] / 2e-4 - 1))
    assert "| gemm | 1 |" in report.read_text(encoding="utf-8")
    assert "m=4096" in chart.read_text(encoding="utf-8")


def test_a_median_beyond_the_tolerance_ends_with_1_and_names_the_suite(capsys, records):
    assert main(["compare", records, "--profile", "h200_sxm", "--tolerance", "0.0001"]) == 1
    assert "gemm" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--profile", "h200"], ["--profile", "h200_sxm", "--stack", "x"]])
def test_unknown_profiles_end_with_2(capsys, records, arguments):
    assert main(["compare", records, *arguments]) == 2
    assert "E-SCN-009" in capsys.readouterr().err


def test_a_file_of_another_tool_ends_with_2_and_leaves_no_report(capsys, tmp_path):
    log, report = tmp_path / "nccl.log", tmp_path / "report.md"
    log.write_text("# nThread 1 nGpus 8\n", encoding="utf-8")
    assert main(["compare", str(log), "--profile", "h200_sxm", "--out", str(report), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["errors"][0]["line"] == 1
    assert not report.exists()
