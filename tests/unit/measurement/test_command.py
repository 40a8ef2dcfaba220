"""The command ``measure``: sentences and exit codes, resumption, and how little it needs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from interrupts import heed_interrupts

from moesim.errors import ERROR_CODES
from moesim.measurement import command, main
from moesim.measurement.fingerprints import _nvidia_smi, conditions, program_arguments
from moesim.measurement.suites import SUITES

ROOT = Path(__file__).resolve().parents[3]
needs_torch = pytest.mark.skipif(
    find_spec("torch") is None, reason="torch is not installed: pip install 'moesim[measure]'"
)
QUICK = ("single_gpu", "--device", "cpu", "--suites", "launch,optimizer")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "SUITE: nothing is named; choose from single_gpu, gemm, grouped_gemm,"),
        (("singel_gpu",), "SUITE: 'singel_gpu' is not among the choices; did you mean 'single_gpu'?"),
        (("single_gpu", "--budget", "8"), "--budget: '8' has no unit; add a unit, such as '8 us'"),
        (("single_gpu", "--budget", "8 GB"), "--budget: '8 GB' is an amount of data, a duration such as"),
        (("single_gpu", "--budget=-1s"), "--budget: '-1s' is negative"),
        (("single_gpu", "--budget", "0s"), "--budget: '0s' is no time at all; give at least 10s [E-SCN-007]"),
        (("single_gpu", "--suites", "gem"), "--suites: 'gem' is not among the choices; did you mean 'gemm'?"),
        (("single_gpu", "--suites", ","), "--suites: nothing is named; choose from gemm, grouped_gemm,"),
        (("single_gpu", "--device", "tpu"), "--device: 'tpu' is not among the choices"),
        (("single_gpu", "--seed", "1.5"), "--seed: '1.5' is not a whole number from 0"),
        (("single_gpu", "--seed", "-1"), "--seed: '-1' is not a whole number from 0"),
        (("single_gpu", "--out", ""), "--out: no file is named"),
        (("single_gpu", "--bugdet", "8s"), "unrecognized arguments: --bugdet 8s; the usage is: python -m moesim"),
        (("single_gpu", "--budget"), "argument --budget: expected one argument"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    code, err = run(capsys, *arguments)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert all(line.split("[")[-1].rstrip("]") in ERROR_CODES for line in err.splitlines())


def test_all_wrong_arguments_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = run(capsys, "single_gpu", "--budget", "8", "--suites", "gemm,a,b", "--device", "x")
    assert code == 2
    assert len(err.splitlines()) == 4


def test_help_needs_no_torch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["--help"]) == 0
    assert "--budget" in capsys.readouterr().out


def test_missing_and_old_torch_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, err = run(capsys, *QUICK)
    assert code == 2
    assert "torch cannot be imported" in err
    assert "pip install" in err
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.3.1+cu121"))
    code, err = run(capsys, *QUICK)
    assert code == 2
    assert "torch is 2.3.1+cu121, but at least 2.4 is needed" in err


def test_a_machine_without_cuda_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, version = SimpleNamespace(is_available=lambda: False), SimpleNamespace(cuda=None, hip=None)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.9.0", cuda=cuda, version=version))
    code, err = run(capsys, "single_gpu")
    assert code == 2
    assert "--device: there is no CUDA device: torch 2.9.0 was built without CUDA; add --device cpu" in err


@needs_torch
def test_an_unwritable_file_is_told_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for out in (tmp_path / "missing" / "out.jsonl", tmp_path):
        code, err = run(capsys, *QUICK, "--out", str(out))
        assert code == 2
        assert "cannot be written" in err
        assert "[E-OUT-001]" in err


@needs_torch
def test_an_interrupt_exits_with_130_and_leaves_whole_lines(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupt)
    code, err = run(capsys, *QUICK, "--out", str(tmp_path / "out.jsonl"))
    assert code == 130
    assert "interrupted" in err
    assert [record["record"] for record in records(tmp_path / "out.jsonl")] == ["session"]


@needs_torch
def test_a_run_resumes_after_truncation_and_measures_nothing_twice(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    assert run(capsys, *QUICK, "--out", str(out), "--budget", "60s")[0] == 0
    first = records(out)
    kinds = [record["record"] for record in first]
    assert kinds[0] == "session"
    assert kinds[-1] == "end"
    assert set(kinds[1:-1]) == {"result"}
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2])
    code, err = run(capsys, *QUICK, "--out", str(out), "--budget", "60s")
    assert code == 0
    assert f"2 of {len(first) - 2} cases are in the file already" in err
    second = records(out)
    assert second[:3] == first[:3]
    assert [record["record"] for record in second].count("session") == 1
    measured = [record["case"] for record in second if record["record"] == "result"]
    assert sorted(measured) == sorted({record["case"] for record in first if record["record"] == "result"})


@needs_torch
def test_another_fingerprint_begins_a_session_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for seed in ("0", "1", "0"):
        assert run(capsys, *QUICK, "--out", str(out), "--budget", "60s", "--seed", seed)[0] == 0
    found = records(out)
    sessions = [record for record in found if record["record"] == "session"]
    assert [session["fingerprint"]["seed"] for session in sessions] == [0, 1]
    assert len({session["session"] for session in sessions}) == 2
    assert [record["measured"] for record in found if record["record"] == "end"][2] == 0


@needs_torch
def test_the_fingerprint_says_what_times_depend_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import numpy
    import torch

    out = tmp_path / "out.jsonl"
    assert run(capsys, "single_gpu", "--device", "cpu", "--suites", "launch", "--out", str(out))[0] == 0
    session = records(out)[0]
    fingerprint = session["fingerprint"]
    assert session["schema_version"] == 1
    assert fingerprint["torch_version"] == torch.__version__
    assert fingerprint["numpy_version"] == numpy.__version__
    assert fingerprint["moesim_version"]
    assert fingerprint["device_name"]
    assert fingerprint["multiprocessors"] == torch.get_num_threads()
    names = {"memory_bytes", "driver_version", "cuda_version", "python_version", "system", "seed"}
    assert names <= set(fingerprint)
    assert isinstance(session["argv"], list)


def test_records_hold_no_folders_of_who_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = ["measure", "gemm", "--budget", "8s", "--out", str(tmp_path / "gemm.jsonl"), "results/a.jsonl"]
    monkeypatch.setattr("sys.argv", ["moesim", *argv])
    assert program_arguments() == [*argv[:5], "gemm.jsonl", "results/a.jsonl"]


def test_clocks_and_power_are_read_from_nvidia_smi_and_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "345, 3201, 1980, 3201, 75.12, 700.00, 27, P0, [N/A]"\n', encoding="ascii")
    program.chmod(0o755)
    device = SimpleNamespace(current_device=lambda: 0, get_device_properties=lambda _: SimpleNamespace(uuid="1-2"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=device))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    found = conditions("cuda")
    assert found["sm_clock_mhz"] == 345
    assert found["power_limit_w"] == 700
    assert found["performance_state"] == "P0"
    assert found["error_correction"] is None
    program.write_text("#!/bin/sh\nexit 9\n", encoding="ascii")
    assert conditions("cuda") == {}
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert _nvidia_smi(["driver_version"], "0") == []


BLOCKED = ("pydantic", "scipy", "typer", "rich", "ruamel", "networkx", "plotly")
LEAN = f"""
import builtins, runpy, sys
BLOCKED = {BLOCKED!r}
plain_import = builtins.__import__
def lean_import(name, globals=None, locals=None, fromlist=(), level=0):
    asking = (globals or {{}}).get("__name__", "")
    if name.split(".")[0] in BLOCKED:
        raise ImportError(f"{{asking}} asks for {{name}}")
    wanted = [name, *(f"{{name}}.{{part}}" for part in fromlist or ())]
    if asking.split(".")[0] in ("moesim", "__main__") and any(one.startswith("torch.distributed") for one in wanted):
        raise ImportError(f"{{asking}} asks for {{name}}")
    return plain_import(name, globals, locals, fromlist, level)
builtins.__import__ = lean_import
try:
    runpy.run_module("moesim", run_name="__main__", alter_sys=True)
except SystemExit as ended:
    loaded = [name for name in sys.modules if name.split(".")[0] in BLOCKED]
    outside = [name for name in sys.modules if name.startswith("moesim.")
               and not name.startswith(("moesim.measurement", "moesim.structure", "moesim.units", "moesim.errors"))]
    assert not loaded and not outside and "moesim.structure.layers" not in sys.modules, (loaded, outside)
    raise
"""


def start_copied(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """Run the suite from a bare copy of the package, far from this checkout, with everything else blocked."""
    if not (tmp_path / "moesim").exists():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "moesim", tmp_path / "moesim", ignore=ignored)
        (tmp_path / "lean.py").write_text(LEAN, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.Popen(
        [sys.executable, "lean.py", "measure", *arguments],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


@needs_torch
@pytest.mark.slow
def test_a_copied_folder_runs_on_torch_and_numpy_alone_within_its_budget(tmp_path: Path) -> None:
    begin = time.monotonic()
    process = start_copied(tmp_path, "single_gpu", "--device", "cpu", "--budget", "8s")
    out, err = process.communicate(timeout=120)
    elapsed_s = time.monotonic() - begin
    assert process.returncode == 0, err
    assert out == ""
    found = records(tmp_path / "results.jsonl")
    assert found[-1]["record"] == "end"
    # A case that is begun is finished, and the machine may be busy with other tests.
    assert found[-1]["elapsed_s"] < 8 + 8
    assert elapsed_s < 60
    assert {record["suite"] for record in found if record["record"] == "result"} == set(SUITES)
    assert not [record for record in found if record["record"] == "skip"]


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_whole_lines_and_can_go_on(tmp_path: Path, end: signal.Signals) -> None:
    arguments = ("single_gpu", "--device", "cpu", "--budget", "60s", "--out", "out.jsonl", "--suites")
    process = start_copied(tmp_path, *arguments, "memory_bound,optimizer,dispatch,gemm,grouped_gemm,attention")
    path = tmp_path / "out.jsonl"
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        time.sleep(0.02)
    process.send_signal(end)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if end == signal.SIGINT else -end), err
    before = path.read_bytes()
    assert before.endswith(b"\n")
    again = start_copied(tmp_path, *arguments, "launch")
    _, err = again.communicate(timeout=90)
    assert again.returncode == 0, err
    assert path.read_bytes().startswith(before)


@pytest.mark.gpu
@needs_torch
def test_the_suite_runs_on_a_gpu(tmp_path: Path) -> None:
    process = start_copied(tmp_path, "single_gpu", "--budget", "60s")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    found = [record for record in records(tmp_path / "results.jsonl") if record["record"] == "result"]
    assert {record["suite"] for record in found} == set(SUITES)
    assert {record["timed_by"] for record in found if record["suite"] == "gemm"} == {"cuda_graph"}
