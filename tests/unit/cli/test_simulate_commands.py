"""``moesim simulate`` as people and programs run it: answers, files, bad input, interruptions."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from interrupts import heed_interrupts
from trace_event_rules import check_trace

from moesim.cli import main, simulate_text
from moesim.estimation import simulation

SMALL = "megatron_moe_mixtral_8xh100"
UNEVEN = ("--set", "model.moe.router.imbalance={kind: dirichlet, concentration: 4.0}")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["simulate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def answered(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    found, out, _ = run(capsys, *arguments, "--json")
    assert found == code
    answer: dict[str, Any] = json.loads(out)
    return answer


def test_people_read_the_estimate_and_what_draws_and_ranks_do(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "mixtral_8x7b", *UNEVEN, "--draws", "3", "--seed", "2", "--ranks", "0,17")
    assert (code, err) == (0, "")
    for text in (
        "step time",
        "Where the step goes",
        "Over 3 draws, seed 2",
        "p99",
        "imbalance of the drawn loads",
        "stage 3",
        "least busy",
        "rank 17",
        "(the same)",
    ):
        assert text in out


def test_json_has_the_keys_of_estimate_and_those_of_draws(capsys: pytest.CaptureFixture[str]) -> None:
    answer = answered(capsys, "mixtral_8x7b", "--ranks", "0-2,40")
    assert main(["estimate", "mixtral_8x7b", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert set(estimate) < set(answer)
    assert (answer["engine"], answer["draws"], answer["seed"]) == ("event_driven", 1, 0)
    assert answer["step_time_s"] == pytest.approx(estimate["step_time_s"], rel=1e-6)
    assert answer["quantiles_s"] == dict.fromkeys(("p50", "p95", "p99"), pytest.approx(answer["step_time_s"]))
    exposed = sum(part["exposed"] for part in answer["breakdown_s"].values())
    assert exposed == pytest.approx(answer["step_time_s"], rel=1e-9)
    assert sum(answer["losses_s"].values()) == pytest.approx(answer["step_time_s"], rel=1e-9)
    assert [rank["rank"] for rank in answer["ranks"]] == [0, 1, 2, 40]
    assert answer["ranks"][0]["stands_for"] == "0-15"
    assert [stage["ranks"] for stage in answer["stages"]] == [16] * 4


def test_what_does_not_fit_is_answered_with_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    assignments = ("--set", "optimizer.kind=adam", "--set", "precision.parameters=fp32")
    answer = answered(capsys, "m6t_1t_v100x480", *assignments, code=3)
    assert answer["fits"] is False


def test_the_trace_obeys_the_format_and_repeats(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("one.json.gz", "two.json.gz"):
        code, _, err = run(capsys, "mixtral_8x7b", *UNEVEN, "--seed", "4", "--timeline", str(tmp_path / name))
        assert code == 0
        assert "events" in err
    assert (tmp_path / "one.json.gz").read_bytes() == (tmp_path / "two.json.gz").read_bytes()
    run(capsys, "mixtral_8x7b", *UNEVEN, "--seed", "5", "--timeline", str(tmp_path / "other.json.gz"))
    assert (tmp_path / "one.json.gz").read_bytes() != (tmp_path / "other.json.gz").read_bytes()
    events = check_trace(tmp_path / "one.json.gz")
    assert {event["pid"] for event in events["X"]} == {0, 16, 32, 48}
    assert len(events["s"]) > 100
    assert {event["name"] for event in events["C"]} >= {"memory", "all_to_all link", "pipeline_p2p link"}


@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b", "zb_h1", "zb_v", "dualpipe", "dualpipe_v"])
def test_traces_of_other_schedules_obey_the_format(
    schedule: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    few = ("--set", "workload.sequences_per_step=256")
    run(capsys, "mixtral_8x7b", *few, "--schedule", schedule, "--timeline", str(path), "--ranks", "0,16,48")
    events = check_trace(path)
    assert {event["pid"] for event in events["X"]} == {0, 16, 48}
    assert {event["args"]["micro_batch"] for event in events["X"] if event["cat"] == "expert_gemm"} == set(range(16))


def test_memory_in_the_trace_peaks_where_the_answer_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = answered(capsys, "mixtral_8x7b", "--timeline", str(tmp_path / "trace.json"))
    points = [event for event in check_trace(tmp_path / "trace.json")["C"] if event["name"] == "memory"]
    peak = max(points, key=lambda event: sum(event["args"].values()))
    assert sum(peak["args"].values()) == pytest.approx(answer["memory_bytes"]["peak"], abs=8)
    assert peak["args"]["activations"] == pytest.approx(answer["memory_bytes"]["activations"], abs=1)
    assert peak["pid"] == 16 * answer["memory_bytes"]["peak_stage"]


def test_the_chart_is_one_file_that_says_what_it_shows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "chart.html"
    code, _, err = run(capsys, "mixtral_8x7b", *UNEVEN, "--draws", "2", "--chart", str(path))
    assert (code, f"wrote {path}" in err) == (0, True)
    page = path.read_text(encoding="utf-8")
    for text in ("a simulated step", "rank 16, stage 1", "first of 2 draws", "Memory of a device", "Plotly.newPlot"):
        assert text in page


def test_every_problem_is_reported_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("--draws", "0", "--seed", "-1", "--ranks", "3,64", "--schedule", "zb-h1", "--slow-rank", "4")
    files = ("--timeline", str(tmp_path / "missing" / "t.json"), "--chart", str(tmp_path / "chart.png"))
    code, out, _ = run(capsys, "mixtral_8x7b", *arguments, *files, "--json")
    errors = {error["field"]: error for error in json.loads(out)["errors"]}
    assert code == 2
    assert set(errors) == {"--draws", "--seed", "--ranks", "--schedule", "--slow-rank", "--timeline", "--chart"}
    assert all(error["remedy"] for error in errors.values())
    assert errors["--timeline"]["code"] == "E-OUT-001"
    assert errors["--schedule"]["code"] == "E-SCN-010"
    assert "zb_h1" in errors["--schedule"]["remedy"]
    assert "63" in errors["--ranks"]["remedy"]
    assert list(tmp_path.iterdir()) == []


def test_problems_of_the_scenario_come_with_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "mixtral_8x7b", "--set", "devices=63", "--set", "stack=nope", "--draws", "0")
    assert (code, out) == (2, "")
    assert "--draws" in err
    assert "nope" in err


@pytest.mark.parametrize("ranks", ["", "a", "5-3", "64", "-1", "0,,1"])
def test_malformed_or_missing_ranks_are_refused(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "mixtral_8x7b", "--json", f"--ranks={ranks}")
    (error,) = json.loads(out)["errors"]
    assert (code, error["field"]) == (2, "--ranks")


def test_a_schedule_that_the_scenario_cannot_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "mixtral_8x7b", "--schedule", "dualpipe", "--set", "workload.sequences_per_step=48")
    assert code == 2
    assert "micro-batches" in err


def test_schedules_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    answer = answered(capsys, "mixtral_8x7b", "--compare-schedules")
    assert len(answer["schedules"]) == 10
    code, out, _ = run(capsys, "mixtral_8x7b", "--compare-schedules", "--schedule", "zb_v")
    assert code == 0
    assert "zb_v *" in out


@contextmanager
def interrupting_progress(draws: int) -> Iterator[Callable[[int, int], None]]:
    """Progress that is interrupted from the keyboard when three draws are done."""

    def advance(done: int, _: int) -> None:
        if done >= 3:
            raise KeyboardInterrupt

    yield advance


def test_an_interruption_leaves_what_is_finished(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate_text, "draw_progress", interrupting_progress)
    monkeypatch.setattr(simulation, "BATCH_S", 0.0)
    path = tmp_path / "trace.json"
    code, out, err = run(capsys, SMALL, *UNEVEN, "--draws", "50", "--timeline", str(path), "--json")
    answer = json.loads(out)
    assert code == 130
    assert (answer["draws"], answer["draws_asked"]) == (3, 50)
    assert "3 of 50 draws" in err
    check_trace(path)
    code, out, _ = run(capsys, SMALL, *UNEVEN, "--draws", "50")
    assert code == 130
    assert "Over 3 of 50 draws" in out


def test_ctrl_c_on_a_terminal_prints_the_draws_done_so_far(tmp_path: Path) -> None:
    """The real command; its progress bar on a pseudo-terminal tells when draws are done."""
    terminal, its_end = pty.openpty()
    arguments = [SMALL, *UNEVEN, "--draws", "1000000", "--json", "--timeline", str(tmp_path / "trace.json.gz")]
    command = [sys.executable, "-m", "moesim", "simulate", *arguments]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    piped = {"stdout": subprocess.PIPE, "stderr": its_end}
    with subprocess.Popen(command, **piped, env=environment, preexec_fn=heed_interrupts) as process:
        os.close(its_end)
        shown, deadline = b"", time.monotonic() + 60
        while b"/1000000" not in shown.replace(b" 0/1000000", b"") and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        try:
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            os.close(terminal)
    assert process.returncode == 130, shown
    answer = json.loads(out)
    assert 0 < answer["draws"] < 1_000_000
    check_trace(tmp_path / "trace.json.gz")


def test_simulate_loads_nothing_it_does_not_need() -> None:
    code = (
        "import sys; from moesim.cli import main; main(['simulate', 'm6t_1t_v100x480', '--json']);"
        "print([name for name in ('scipy', 'networkx', 'plotly', 'torch') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
