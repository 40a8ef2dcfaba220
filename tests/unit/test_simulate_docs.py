"""What docs/simulate.md shows is run, and its table of keys is complete."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from moesim.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "simulate.md").read_text(encoding="utf-8")
COMMANDS = [line for line in PAGE.splitlines() if line.startswith("moesim ")]


def test_the_page_has_examples() -> None:
    assert len(COMMANDS) == 6


@pytest.mark.parametrize("line", COMMANDS)
def test_examples_do_what_they_say(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[1:]) in (0, 3)
    assert "Over " in capsys.readouterr().out
    written = [word for word in shlex.split(line) if word.startswith("mixtral.")]
    assert all((tmp_path / name).stat().st_size > 1000 for name in written)


def test_the_table_has_the_keys_that_simulate_adds(capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for command in ("simulate", "estimate"):
        assert main([command, "m6t_1t_v100x480", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    table = PAGE.split("| key | meaning |")[1].split("\n\n")[0]
    keys = {key for line in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert keys == set(answers[0]) - set(answers[1])


def test_options_of_the_page_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--help"]) == 0
    helped = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= helped
