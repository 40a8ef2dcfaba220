"""Perturbations as people type them, and the sentences they get for what cannot be."""

from __future__ import annotations

import pytest

from moesim.describe.perturbations import FlappingLink, Perturbations, SlowLink, SlowRank, read_perturbations
from moesim.errors import ScenarioError

LEVELS = ["node", "network"]


def test_every_kind_is_read_in_si() -> None:
    found = read_perturbations(
        slow_ranks=["3=1.2", " 0 = 2 "],
        speed_spread=0.02,
        slow_links=["network:5=0.5", "node=0.25"],
        flapping_links=["network:1=0.1,500ms,0.25"],
        host_jitter="5us",
        num_ranks=8,
        levels=LEVELS,
    )
    assert found == Perturbations(
        slow_ranks=(SlowRank(3, 1.2), SlowRank(0, 2.0)),
        speed_spread=0.02,
        slow_links=(SlowLink("network", 5, 0.5), SlowLink("node", None, 0.25)),
        flapping_links=(FlappingLink("network", 1, 0.1, 0.5, 0.25),),
        host_jitter_s=5e-6,
    )
    assert found.is_drawn
    assert not found.is_none


def test_nothing_is_perturbed_by_default() -> None:
    found = read_perturbations(num_ranks=8, levels=LEVELS)
    assert found == Perturbations()
    assert found.is_none
    assert not found.is_drawn


@pytest.mark.parametrize(
    ("option", "text", "sentence"),
    [
        ("slow_ranks", "3", "--slow-rank: '3': this is not RANK=FACTOR; write it like 3=1.2"),
        ("slow_ranks", "8=1.2", "--slow-rank: '8=1.2': there is no rank '8'; ranks are 0 to 7"),
        ("slow_ranks", "-1=1.2", "--slow-rank: '-1=1.2': there is no rank '-1'; ranks are 0 to 7"),
        (
            "slow_ranks",
            "3=0",
            "--slow-rank: '3=0': the factor is '0'; give how many times as long kernels take, above 0, such as 1.2",
        ),
        (
            "slow_links",
            "net_work:0=0.5",
            "--slow-link: 'net_work:0=0.5': the cluster has no level 'net_work'; "
            "did you mean network? levels are node, network",
        ),
        (
            "slow_links",
            "node=1.5",
            "--slow-link: 'node=1.5': the factor is '1.5'; "
            "give the share of the bandwidth that is left, above 0 and up to 1",
        ),
        (
            "flapping_links",
            "node:0=0.5",
            "--flapping-link: 'node:0=0.5': this is not LEVEL:RANK=FACTOR,PERIOD,DUTY; "
            "write it like network:0=0.1,2s,0.25",
        ),
        (
            "flapping_links",
            "node:0=0.5,0s,1",
            "--flapping-link: 'node:0=0.5,0s,1': the period is 0; give a time above 0, such as 2s",
        ),
        (
            "flapping_links",
            "node:0=0.5,1s,nan",
            "--flapping-link: 'node:0=0.5,1s,nan': the duty is 'nan'; "
            "give the share of the period that is slow, above 0 and up to 1",
        ),
    ],
)
def test_what_cannot_be_gets_its_own_sentence(option: str, text: str, sentence: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        read_perturbations(**{option: [text]}, num_ranks=8, levels=LEVELS)  # type: ignore[arg-type]
    assert str(caught.value) == sentence
    assert caught.value.code == "E-CLI-001"


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ScenarioError) as caught:
        read_perturbations(
            slow_ranks=["x=1", "2=2", "2=3"], speed_spread=9.0, host_jitter="5", num_ranks=4, levels=LEVELS
        )
    sentences = [problem.sentence() for problem in caught.value.problems]
    assert len(sentences) == 4
    assert sentences[1].startswith("--host-jitter: '5': ")
    assert sentences[2] == ("--speed-spread: the spread is 9; give a deviation of the logarithm, such as 0.02, up to 2")
    assert sentences[3] == "--slow-rank: rank 2 is given 2 times; give each rank one factor"
