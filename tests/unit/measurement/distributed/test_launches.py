"""The command under torchrun, and what it says when it is launched wrongly."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from moesim.errors import ERROR_CODES, ScenarioError
from moesim.measurement import main
from moesim.measurement.arguments import read_options
from moesim.measurement.distributed.processes import Launch, read_launch

ROOT = Path(__file__).resolve().parents[4]
needs_torch = pytest.mark.skipif(
    find_spec("torch") is None, reason="torch is not installed: pip install 'moesim[measure]'"
)
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def launch(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (variables | changes).items():
        monkeypatch.setenv(name, value)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(list(arguments))
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert all(line.split("[")[-1].rstrip("]") in ERROR_CODES for line in err.splitlines() if "error:" in line)
    return code, err


def test_the_launchers_variables_are_read() -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert read_launch({}) is None
    assert read_launch(variables) == Launch(5, 8, 5, 8)
    assert read_launch(variables | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}) == Launch(5, 8, 1, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_PORT": ""}, "MASTER_PORT of the launcher's variables"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no number; launch it with: torchrun"),
        ({"RANK": "2"}, "rank 2 of 2"),
        ({"LOCAL_WORLD_SIZE": "3"}, "0 of 3 on its host, cannot be"),
    ],
)
def test_variables_of_a_broken_launch_are_told(changes: dict[str, str], said: str) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    with pytest.raises(ScenarioError) as error:
        read_launch(variables | changes)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("moe_layer", "--backend", "mpi"), "--backend: 'mpi' is not among the choices; choose from nccl, gloo"),
        (("moe_layer", "--backend", "nccl", "--device", "cpu"), "nccl joins processes on cuda, but --device is cpu"),
        (("gemm", "--backend", "gloo"), "--backend: gemm is measured on one device; leave it out"),
        (("gemm", "--expert-parallel", "2"), "--expert-parallel: gemm is measured on one device"),
        (("train_step", "--suites", "gemm"), "--suites chooses from single_gpu, but 'train_step' is measured"),
        (("moe_layer", "--expert-parallel", "0"), "'0' is not a whole number from 1"),
        (("moe_layer", "--routing", "learnt"), "did you mean 'learned'?"),
        (("moe_layer", "--timeout", "5"), "--timeout: '5' has no unit"),
    ],
)
def test_arguments_of_several_ranks_are_checked(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ScenarioError) as error:
        read_options(arguments)
    assert said in str(error.value)


def test_gloo_measures_on_processors_and_nothing_else_must_be_said() -> None:
    options = read_options(["moe_layer", "--backend", "gloo"])
    assert (options.device, options.backend, options.out.path.name) == ("cpu", "gloo", "results.jsonl")
    assert read_options(["gemm"]).suites == ("gemm",)
    assert read_options(["moe_layer"]).device == "cuda"


@needs_torch
@pytest.mark.parametrize(
    ("arguments", "launched", "said"),
    [
        (("moe_layer", "--backend", "gloo"), None, "was not launched as one of several; launch it with: torchrun"),
        (("collectives", "--device", "cpu"), None, "SUITE: collectives needs at least two processes, and this is one"),
        (("train_step", "--device", "cpu", "--expert-parallel", "4"), None, "but there is one process"),
        (("gemm", "--device", "cpu"), {}, "gemm is measured on one device, but 2 processes were launched"),
        (("moe_layer", "--backend", "gloo", "--expert-parallel", "3"), {}, "groups of 3 do not divide 2 ranks"),
    ],
)
def test_a_wrong_launch_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    launched: dict[str, str] | None,
    said: str,
) -> None:
    if launched is not None:
        launch(monkeypatch, **launched)
    out = tmp_path / "out.jsonl"
    code, err = run(capsys, *arguments, "--out", str(out))
    assert code == 2
    assert said in err
    assert not out.exists()


@needs_torch
def test_libraries_that_are_not_installed_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = run(capsys, "moe_layer", "--device", "cpu", "--experts", "grouped_gemm", "--exchange", "deepep")
    assert code == 2
    assert "--experts: grouped_gemm cannot be imported (No module named 'grouped_gemm'); install it, or use" in err
    assert "--exchange: deep_ep cannot be imported (No module named 'deep_ep'); install it, or use" in err


@needs_torch
def test_a_torch_without_nccl_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    launch(monkeypatch)
    code, err = run(capsys, "moe_layer", "--backend", "nccl")
    assert code == 2
    assert "was built without NCCL; use --backend gloo" in err


@needs_torch
def test_more_processes_than_devices_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    launch(monkeypatch, RANK="1")
    code, err = run(capsys, "moe_layer")
    assert (code, err) == (2, "")  # the first rank speaks
    launch(monkeypatch, RANK="0", LOCAL_RANK="1")
    code, err = run(capsys, "moe_layer")
    assert code == 2
    assert "2 processes on a host that has 1 CUDA device(s); launch with --nproc-per-node 1" in err


@needs_torch
def test_processes_that_do_not_come_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(monkeypatch)
    code, err = run(capsys, "moe_layer", "--backend", "gloo", "--timeout", "1s")
    assert code == 2
    assert "the 2 processes did not find each other within 1 s" in err
    assert "[E-RUN-001]" in err


@needs_torch
def test_memory_of_a_processor_is_skipped_with_its_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    code, err = run(capsys, "memory", "--device", "cpu", "--out", str(out))
    assert code == 0
    assert "0 cases measured" in err
    skips = [json.loads(line) for line in out.read_text().splitlines() if line.startswith('{"record": "skip"')]
    assert skips
    assert {record["reason"] for record in skips} == {
        "memory cannot be measured on a processor: torch counts allocations of CUDA only"
    }


def torchrun(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "-m", "moesim", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


@needs_torch
def test_torchrun_measures_layers_on_processors_and_resumes_a_torn_file(tmp_path: Path) -> None:
    """The very command of the documentation, with a short budget."""
    out = tmp_path / "results.jsonl"
    command = ("measure", "moe_layer", "--backend", "gloo", "--budget", "6s")
    begun = {"record": "result", "session": "elsewhere", "case": "gemm"}
    out.write_text(json.dumps(begun) + '\n{"record": "res', encoding="utf-8")
    ended = torchrun(tmp_path, *command)
    assert ended.returncode == 0, ended.stderr
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert records[0] == begun
    assert [record["record"] for record in records[1:]].count("session") == 1
    assert records[1]["fingerprint"]["world_size"] == 4
    assert records[1]["fingerprint"]["backend"] == "gloo"
    results = [record for record in records[1:] if record["record"] == "result"]
    assert len(results) == records[-1]["measured"] > 0
    assert records[-1]["left"] > 0
    assert len({record["case"] for record in results}) == len(results)
    for record in results:
        assert record["operation"] == "expert_parallel_layer"
        assert len(record["rank_medians_s"]) == record["shape"]["ranks"] == 4
        assert record["median_s"] >= sorted(record["rank_medians_s"])[0] > 0
        assert sum(record["loads"]) > 0
