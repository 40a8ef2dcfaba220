"""The one command that measures everything a single device can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "validation" / "suites" / "single_gpu"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=180)


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.slow
def test_every_suite_of_one_device_writes_its_file(tmp_path: Path) -> None:
    done = run(str(tmp_path / "results"), "--device", "cpu", "--budget", "16")
    assert done.returncode == 0, done.stderr
    for suite in ("single_gpu", "train_step", "memory", "moe_layer"):
        lines = (tmp_path / "results" / f"{suite}.jsonl").read_text(encoding="utf-8").splitlines()
        kinds = {json.loads(line)["record"] for line in lines}
        assert {"session", "end"} <= kinds
        assert ("skip" if suite == "memory" else "result") in kinds, suite


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((), "no folder"),
        (("one", "two"), "two folders"),
        (("one", "--budget"), "needs a value"),
        (("one", "--budget", "1h"), "whole number of seconds"),
        (("one", "--budget", "3"), "8 seconds at least"),
        (("one", "--device", "tpu"), "cuda or cpu"),
        (("one", "--fast"), "no option --fast"),
    ],
)
def test_bad_arguments_are_told_and_nothing_is_made(tmp_path: Path, arguments: tuple[str, ...], what: str) -> None:
    done = run(*(str(tmp_path / name) if name in ("one", "two") else name for name in arguments))
    assert done.returncode == 2
    assert what in done.stderr
    assert not list(tmp_path.iterdir())
