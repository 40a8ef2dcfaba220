"""Files of results: whole lines, torn lines, and files that are something else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moesim.errors import FormatError, ScenarioError
from moesim.measurement.record_files import RecordFile, finished_cases

RESULT = {"record": "result", "session": "a", "case": "x", "median_s": 1e-3}


def test_records_come_back_in_their_order(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "out.jsonl")
    assert file.recover() == []
    for number in range(3):
        file.append({**RESULT, "case": f"x{number}"})
    assert [record["case"] for record in file.recover()] == ["x0", "x1", "x2"]


def test_a_torn_last_line_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "out.jsonl")
    file.append(RESULT)
    whole = file.path.read_bytes()
    torn = json.dumps({**RESULT, "case": "torn"}).encode()
    for cut in range(len(torn) + 1):  # the last one lacks only its end of line
        file.path.write_bytes(whole + torn[:cut])
        assert file.recover() == [RESULT]
        assert file.path.read_bytes() == whole


@pytest.mark.parametrize("text", ["a: scenario\n", "[1]\n", '{"record": "else"}\n', "notes", "\xff\n", '{"record"\n'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(FormatError) as caught:
        RecordFile(path).recover()
    assert caught.value.problems[0].line == 1
    assert path.read_text(encoding="latin-1") == text


@pytest.mark.parametrize("name", ["missing/out.jsonl", ".", "pipe"])
def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ScenarioError, match="cannot be written"):
        RecordFile(tmp_path / name).recover()


def test_a_full_disk_is_told() -> None:
    with pytest.raises(ScenarioError, match="No space left"):
        RecordFile(Path("/dev/full")).append(RESULT)


def test_only_cases_of_the_session_are_finished() -> None:
    records = [RESULT, {**RESULT, "session": "b", "case": "y"}, {"record": "skip", "session": "a", "case": "z"}]
    assert finished_cases(records, "a") == {"x", "z"}
