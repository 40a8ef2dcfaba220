"""What the README shows is run: its shell examples through ``main``, its Python through ``exec``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from moesim.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith("moesim ")]


@pytest.fixture
def fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "scenarios").symlink_to(ROOT / "scenarios")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_has_the_examples_that_are_run_here() -> None:
    commands = {shlex.split(line)[1] for line in shell_lines()}
    assert commands >= {"estimate", "sweep", "chart"}
    assert len(blocks("python")) == 1


@pytest.mark.parametrize("line", shell_lines())
def test_shell_examples_do_what_they_say(line: str, fresh_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, _, comment = line.partition("#")
    said = re.search(r"exit code (\d)", comment)
    arguments = shlex.split(command)[1:]
    assert main(arguments) == (int(said.group(1)) if said else 0)
    for option in ("--output", "--out"):
        if option in arguments:
            assert (fresh_folder / arguments[arguments.index(option) + 1]).stat().st_size > 1000
    capsys.readouterr()


def test_the_python_example_runs(fresh_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks("python")[0], {"__name__": "readme"})
    out = capsys.readouterr().out
    assert "GiB" in out
    assert "'tried': 108" in out


def test_the_abridged_output_is_what_estimate_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = blocks("text")
    assert main(["estimate", "m6t_1t_v100x480"]) == 0
    printed = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    for line in shown.splitlines():
        if line.strip():
            assert " ".join(line.split()) in printed
