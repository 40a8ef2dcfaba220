"""``moesim simulate --network shared``: what collectives that meet add to a step, beside draws and slow parts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moesim.cli import main
from moesim.estimation.simulation import simulate
from moesim.resources import shipped_scenarios

SHARED_NIC = "m6t_1t_v100x480"
UNEVEN = ("--set", "model.moe.router.imbalance={kind: dirichlet, concentration: 4.0}")
FEW_STEPS = {"deepseek_v3": 4096, "mixtral_8x22b": 256, "qwen3_235b_a22b": 256}
"""Sequences per step of scenarios with very many micro-batches."""


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = main(["simulate", *arguments, "--json"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code in (0, 3), answer
    return answer


@pytest.mark.parametrize("name", [path.stem for path in shipped_scenarios()])
def test_every_shipped_scenario_reports_the_difference(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--set", f"workload.sequences_per_step={FEW_STEPS[name]}") if name in FEW_STEPS else ()
    answer = answered(capsys, name, *few, "--network", "shared")
    contention, step_time_s = answer["contention"], answer["step_time_s"]
    assert answer["network"] == "shared"
    assert contention["step_time_s"] == pytest.approx(step_time_s, rel=1e-9)
    assert contention["closed_step_time_s"] == pytest.approx(answer["agreement"]["event_driven_s"], rel=1e-9)
    added = contention["relative_difference"] * contention["closed_step_time_s"]
    assert contention["sharing_s"] == pytest.approx(added, abs=1e-12)
    assert contention["faults_s"] == 0.0
    assert 0.0 <= contention["sharing_s"] < 0.2 * step_time_s
    assert answer["losses_s"]["contention"] == contention["sharing_s"]
    assert sum(answer["losses_s"].values()) == pytest.approx(step_time_s, rel=1e-9)
    assert sum(part["exposed"] for part in answer["breakdown_s"].values()) == pytest.approx(step_time_s, rel=1e-9)
    shares = [link["busy_fraction"] for link in contention["busiest_links"]]
    assert shares == sorted(shares, reverse=True)
    assert all(0.0 < share <= 1.0 for share in shares)


def test_people_read_what_contention_adds_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", SHARED_NIC, "--network", "shared"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "contention on shared links",
        "contention adds 3.07%",
        "each on links of its own: 775 ms",
        "stage 0, network",
        "At the load that estimate prices, on links of their own: 775 ms",
    ):
        assert text in out


def test_the_network_is_closed_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    answer = answered(capsys, SHARED_NIC)
    assert answer["network"] == "closed"
    assert "contention" not in answer
    assert main(["simulate", SHARED_NIC]) == 0
    assert "contention" not in capsys.readouterr().out


def test_the_kinds_that_meet_are_those_that_become_longer(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the gradients' reduction runs beside a backward pass full of all-to-alls; nothing else does."""
    closed, shared = (answered(capsys, SHARED_NIC, "--network", network) for network in ("closed", "shared"))
    longer = {
        name: part["exposed"] - closed["breakdown_s"][name]["exposed"] for name, part in shared["breakdown_s"].items()
    }
    assert {name for name, added in longer.items() if abs(added) > 1e-9} <= {"all_to_all", "data_parallel", "host"}
    assert longer["all_to_all"] > 0.0


def test_what_is_added_at_even_load_is_added_to_every_draw(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("megatron_moe_deepseek_8xh100", *UNEVEN, "--draws", "4", "--slow-rank", "3=1.2", "--seed", "3")
    closed, shared = (answered(capsys, *arguments, "--network", network) for network in ("closed", "shared"))
    added = shared["contention"]["sharing_s"]
    assert added > 0.0
    for name, quantile in closed["quantiles_s"].items():
        assert shared["quantiles_s"][name] == pytest.approx(quantile + added, rel=1e-12)
    assert shared["losses_s"]["imbalance"] == closed["losses_s"]["imbalance"] > 0.0
    assert shared["losses_s"]["stragglers"] == closed["losses_s"]["stragglers"] > 0.0
    assert sum(shared["losses_s"].values()) == pytest.approx(shared["step_time_s"], rel=1e-9)
    exposed = [part["exposed"] for part in shared["breakdown_s"].values()]
    assert sum(exposed) == pytest.approx(shared["step_time_s"], rel=1e-9)
    assert min(exposed) >= 0.0


def test_slow_links_are_slow_for_all_that_crosses_them(capsys: pytest.CaptureFixture[str]) -> None:
    plain = answered(capsys, SHARED_NIC, "--network", "shared")
    slow = answered(capsys, SHARED_NIC, "--network", "shared", "--slow-link", "network:3=0.5")
    half = ("--flapping-link", "network:3=0.5,100 us,0.5")
    flapping = answered(capsys, SHARED_NIC, "--network", "shared", *half)
    assert slow["contention"]["sharing_s"] == plain["contention"]["sharing_s"]
    assert slow["losses_s"]["stragglers"] == slow["contention"]["faults_s"]
    sent_s = plain["contention"]["busiest_links"][0]["busy_s"]
    assert 0.9 * sent_s < slow["contention"]["faults_s"] < 1.1 * sent_s
    assert 0.3 * sent_s < flapping["contention"]["faults_s"] < 0.4 * sent_s
    assert main(["simulate", SHARED_NIC, "--network", "shared", "--slow-link", "network:3=0.5"]) == 0
    assert "slow and flapping links add" in capsys.readouterr().out


def test_two_links_that_flap_on_one_port_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    flapping = ("--flapping-link", "network:3=0.5,1 ms,0.5", "--flapping-link", "network=0.5,2 ms,0.5")
    assert main(["simulate", SHARED_NIC, *flapping, "--json"]) == 0
    capsys.readouterr()
    assert main(["simulate", SHARED_NIC, "--network", "shared", *flapping, "--json"]) == 2
    (error,) = json.loads(capsys.readouterr().out)["errors"]
    assert (error["field"], error["code"]) == ("--flapping-link", "E-CLI-001")
    assert "level network of stage 0" in error["message"]


def test_pictures_say_that_they_show_private_links(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    assert main(["simulate", SHARED_NIC, "--network", "shared", "--timeline", str(path)]) == 0
    assert "links of their own" in capsys.readouterr().err


def test_python_answers_as_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    found = simulate(SHARED_NIC, network="shared")
    assert found.contention is not None
    assert found.to_json() == answered(capsys, SHARED_NIC, "--network", "shared")


def test_without_a_pipeline_waiting_for_the_slowest_is_imbalance(capsys: pytest.CaptureFixture[str]) -> None:
    """To the end of its update: the others' step is over when that of the slow rank is."""
    answer = answered(capsys, SHARED_NIC, "--slow-rank", "17=1.3", "--ranks", "0,17")
    assert answer["breakdown_s"]["pipeline_bubble"]["exposed"] == pytest.approx(0.0, abs=1e-12)
    assert answer["breakdown_s"]["imbalance"]["exposed"] > 0.9 * answer["losses_s"]["stragglers"]
    assert min(rank["idle_fraction"] for rank in answer["ranks"]) >= 0.0
