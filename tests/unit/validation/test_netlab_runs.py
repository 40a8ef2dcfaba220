"""The network lab on real emulated networks, where this machine allows them, and what it says where it does not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import ScenarioError
from validation.netlab import namespaces, probes
from validation.netlab.__main__ import main
from validation.netlab.jobs import time_collective
from validation.netlab.namespaces import lab_namespaces, leftovers, missing_requirements, sweep
from validation.netlab.probes import assert_rates
from validation.netlab.runs import RunOptions, option_problems
from validation.netlab.topologies import LabTopology, emulated
from validation.netlab.workers import workers

ROOT = Path(__file__).parents[3]
SLOW_RATE = 40e6  # so low that a busy machine carries it too
HOLD = """
import sys, time
from validation.netlab.namespaces import signals_as_exceptions
from validation.netlab.topologies import LabTopology, emulated
from validation.netlab.workers import workers


def rest(session):
    time.sleep(60)


if __name__ == "__main__":
    topology = LabTopology("tree", 4, 40e6, 2)
    try:
        with signals_as_exceptions(), emulated(topology) as hosts, workers(hosts, joins_gloo=False) as group:
            group.tell(rest)  # a rank at work does not notice by itself that the run is gone
            time.sleep(0.3)
            print("ready", flush=True)
            time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.fixture(scope="module")
def lab():
    """Skip where networks cannot be emulated."""
    pytest.importorskip("torch", reason="the network lab measures torch's gloo, and torch is not installed")
    problems = missing_requirements()
    if problems:
        pytest.skip(f"no network lab here: {'; '.join(problem.message for problem in problems)}")


@pytest.mark.slow
def test_a_short_run_fits_predicts_and_writes_its_report(lab, tmp_path, capsys):
    code = main(["--short", "--rate", "60Mb/s", "--repeats", "3", "--out", str(tmp_path)])
    answer = json.loads((tmp_path / "results.json").read_text())
    errors = {row["part"]: abs(row["error"]) for row in sorted(answer["rows"], key=lambda row: abs(row["error"]))}
    assert {name: len(links) for name, links in answer["probes"].items()} == {"flat_4": 1, "tree_2x2_2to1": 3}
    assert code == (0 if all(one["is_met"] for one in answer["verdicts"]) else 1)
    assert errors["collective"] < 0.5  # worst of a part; a busy machine may miss the tolerances of a full run
    assert errors["step"] < 0.5
    assert (tmp_path / "rows.csv").read_text().count("\n") == 1 + len(answer["rows"])
    assert (tmp_path / "chart.html").stat().st_size > 10_000
    assert "tree_2x2_2to1" in (tmp_path / "report.md").read_text()
    assert "kept" in capsys.readouterr().out
    assert not [name for name in lab_namespaces() if f"-{os.getpid()}-" in name]


@pytest.mark.slow
def test_a_network_that_is_slower_than_it_says_is_refused(lab, monkeypatch):
    topology = LabTopology("flat", 2, SLOW_RATE)
    monkeypatch.setattr(probes, "TRIES", 1)
    slower = LabTopology("flat", 2, SLOW_RATE / 2)
    refusal = pytest.raises(ScenarioError, match=r"flat_2: plain TCP moves 1\d\.\d Mb/s over a host link")
    with emulated(slower) as hosts, workers(hosts, joins_gloo=False) as group, refusal as caught:
        assert_rates(topology, group)
    assert "lower --rate" in caught.value.problems[0].remedy


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_behind_when_a_run_is_killed(lab, number, tmp_path):
    script = tmp_path / "hold.py"
    script.write_text(HOLD)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
    mine = [name for name in lab_namespaces() if f"-{process.pid}-" in name]
    assert len(mine) == 5  # four hosts, one fabric
    assert not set(mine) & set(leftovers())  # another run's sweep leaves them alone
    process.send_signal(number)
    process.wait(20)
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert not set(mine) & set(lab_namespaces())
        return
    assert set(mine) <= set(leftovers())
    deadline = time.monotonic() + 10
    while any(namespaces.processes_in(name) for name in mine) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(namespaces.processes_in(name) for name in mine)  # ranks end with the run, before any sweep
    assert set(mine) <= set(sweep())
    assert not set(mine) & set(lab_namespaces())


@pytest.mark.slow
def test_a_rank_that_fails_is_named_with_its_last_words(lab):
    topology = LabTopology("flat", 2, SLOW_RATE)
    failure = pytest.raises(ScenarioError, match=r"rank 0: .*no collective is called 'gossip'")
    with emulated(topology) as hosts, workers(hosts, joins_gloo=False) as group, failure:
        group.run(_unknown_collective)


def _unknown_collective(session):
    time_collective(session, "gossip", 64, np.zeros((1, 2)))


def test_whoever_is_not_root_is_told(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    problems = missing_requirements()
    assert [problem.code for problem in problems] == ["E-NET-004"]
    assert "only root" in problems[0].message


def test_every_missing_program_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert [problem.message.split("'")[1] for problem in missing_requirements()] == ["ip", "tc"]


def test_rates_that_the_cores_cannot_carry_are_refused(tmp_path, capsys):
    assert main(["--rate", "40Gb/s", "--out", str(tmp_path)]) == 2
    assert "8 hosts can be emulated from 10" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_rate_without_a_unit_is_refused(tmp_path, capsys):
    assert main(["--rate", "fast", "--out", str(tmp_path)]) == 2
    assert "--rate" in capsys.readouterr().err


def test_all_wrong_options_are_told_at_once(tmp_path):
    problems = option_problems(RunOptions(tmp_path, rate=1.0, repeats=0))
    assert {problem.field for problem in problems} >= {"rate", "repeats"}


def test_names_tell_whose_namespaces_they_are():
    run = namespaces.RunNames("x")
    assert namespaces.is_owned(run.name("h0"))
    assert not namespaces.is_owned(f"netlab-{os.getpid()}-1-x-h0")  # an older process with this one's number
    assert not namespaces.is_owned("netlab-nonsense")
