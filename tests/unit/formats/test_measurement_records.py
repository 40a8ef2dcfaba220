"""Reading measured records: everything that is wrong, each with its line, and nothing lost of what is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from measured_files import SESSION, result, write_records

from moesim.errors import FormatError
from moesim.formats.measurement_records import read_measurements

ROOT = Path(__file__).parents[3]
GEMM = result("gemm", "gemm", "forward", {"m": 64, "n": 128, "k": 256})


def problems(path: Path):
    with pytest.raises(FormatError) as caught:
        read_measurements(path)
    return caught.value.problems


def test_every_case_of_a_measured_file_is_read_with_its_session():
    measured = read_measurements(ROOT / "validation" / "measurements" / "h200_sxm/single_gpu_torch2.11.jsonl")
    assert len(measured.cases) == 1001
    assert measured.device_names == ("NVIDIA H200",)
    assert [case.split("/")[0] for case, _ in measured.skipped] == ["attention", "attention"]
    assert sum(measured.cases[-1].loads) > 0


def test_a_case_that_was_measured_again_counts_once_with_its_last_time(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [GEMM, {**GEMM, "median_s": 2e-4}])
    (case,) = read_measurements(path).cases
    assert (case.median_s, case.line) == (2e-4, 3)


def test_a_truncated_file_says_which_line_and_how_many_records_are_whole(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [GEMM, GEMM], end="")
    path.write_text(path.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    (problem,) = problems(path)
    assert problem.line == 3
    assert "cut off" in problem.message
    assert "2 records before it are whole" in problem.remedy


def test_all_wrong_numbers_are_named_at_once(tmp_path):
    wrong = [
        {**GEMM, "median_s": float("nan"), "samples": True},
        {**GEMM, "shape": None},
        {**GEMM, "pass": "sideways", "loads": [-1]},
        {key: value for key, value in GEMM.items() if key != "bytes"},
    ]
    found = [(problem.line, problem.field) for problem in problems(write_records(tmp_path / "a.jsonl", wrong))]
    assert found == [(2, "median_s"), (2, "samples"), (3, "shape"), (4, "loads"), (4, "pass"), (5, "bytes")]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "E-FMT-014"),
        ("#  nThread 1 nGpus 8 minBytes 8\n#  size count type\n", "E-FMT-014"),
        ('{"traceEvents": []}\n', "E-FMT-014"),
        (json.dumps(SESSION) + "\n", "E-FMT-014"),
        (json.dumps({**SESSION, "schema_version": 7}) + "\n" + json.dumps(GEMM) + "\n", "E-FMT-009"),
        ("[" * 100_000 + "\n", "E-FMT-014"),
    ],
)
def test_what_is_no_file_of_measurements_is_refused_once_with_a_remedy(tmp_path, text, code):
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    (problem,) = problems(path)
    assert (problem.code, problem.file) == (code, str(path))
    assert problem.remedy


def test_missing_files_folders_and_binary_files_are_problems_of_their_own(tmp_path):
    binary = tmp_path / "b.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    assert [problem.code for path in (tmp_path / "none", tmp_path, binary) for problem in problems(path)] == [
        "E-FMT-001",
        "E-FMT-001",
        "E-FMT-004",
    ]
