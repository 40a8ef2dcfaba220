"""Collectives measured on a user's links become a stack that predicts other sizes, through files alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from measured_files import result, write_records

from moesim.cli import main
from moesim.cost.collectives import collective_time, fabric_rates
from moesim.describe.hardware_library import HardwareLibrary
from moesim.structure.placement import ProcessGroup
from moesim.structure.step_graph import Collective

ALPHA_S, REDUCED, EXCHANGED = {"scale_up": 3e-6, "scale_out": 9e-6}, 0.7, 0.55
CLUSTER, STACK = "h100_sxm_hgx_nodes", "megatron_core_nccl"
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
NOMINAL = {"scale_up": 450e9, "scale_out": 50e9}


def planted_s(kind: str, tier: str, ranks: int, size: float) -> float:
    """Rings of n - 1 rounds (an all-reduce twice) and direct exchanges with n - 1 peers."""
    passes, steps = (2.0 if kind == "all_reduce" else 1.0), ranks - 1
    fraction = EXCHANGED if kind == "all_to_all" else REDUCED
    return passes * (steps * ALPHA_S[tier] + size * steps / ranks / (fraction * NOMINAL[tier]))


def records(sizes, *, noise: float = 0.0):
    generator = np.random.default_rng(0)
    return [
        result(
            "collectives",
            kind,
            "forward",
            {"ranks": ranks, "size": int(size), "level": tier},
            planted_s(kind, tier, ranks, size) * float(np.exp(noise * generator.normal())),
        )
        for tier, ranks in (("scale_up", 4), ("scale_up", 8))
        for kind in KINDS
        for size in sizes
    ]


@pytest.fixture
def folder(tmp_path):
    for name in ("devices", "stacks"):
        (tmp_path / name).mkdir()
    return tmp_path


def calibrate(folder, measured, *more: str) -> int:
    out, stack_out = folder / "devices" / "mine.yaml", folder / "stacks" / "my_links.yaml"
    arguments = ["--profile", "h100_sxm", "--stack", STACK, "--out", str(out), "--stack-out", str(stack_out)]
    return main(["calibrate", str(measured), *arguments, *more])


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_stack_calibrated_on_some_sizes_predicts_the_others(folder, noise):
    measured = write_records(folder / "links.jsonl", records([2.0**power for power in range(10, 31, 2)], noise=noise))
    assert calibrate(folder, measured, "--cluster", CLUSTER) == 0
    library = HardwareLibrary([folder])
    cluster, stack = library.cluster(CLUSTER), library.stack("my_links")
    fabric = fabric_rates(cluster, library.device(cluster.device), stack)
    for kind in KINDS:
        for size in (2.0**13, 2.0**21, 2.0**27):
            group = ProcessGroup(np.array([8.0]), np.array([1.0]))
            (found_s,) = collective_time(Collective(kind, np.array([size]), group), fabric).modelled_s
            assert found_s == pytest.approx(planted_s(kind, "scale_up", 8, size), rel=0.005 + noise), (kind, size)


def test_tiers_without_measurements_stay_as_they_are_and_errors_are_stated(folder):
    measured = write_records(folder / "links.jsonl", records([2.0**power for power in range(10, 31, 2)], noise=0.03))
    assert calibrate(folder, measured, "--cluster", CLUSTER) == 0
    library = HardwareLibrary([folder])
    mine, before = library.stack("my_links").collectives, library.stack(STACK).collectives
    for name in ("round_latency", "reduce_fraction", "peer_latency", "all_to_all_fraction"):
        assert getattr(mine["scale_out"], name).value == pytest.approx(
            getattr(before["scale_out"], name).value, rel=1e-3
        )
        figure = getattr(mine["scale_up"], name)
        assert figure.kind == "fitted"
        assert "links.jsonl" in figure.source
        assert 0.0 < figure.error_fraction < 0.1


def test_links_of_another_cluster_and_unknown_levels_are_refused(folder, capsys):
    measured = write_records(folder / "links.jsonl", records([2.0**power for power in range(10, 31, 4)]))
    assert calibrate(folder, measured, "--cluster", "v100_sxm2_32gb_dgx1_nodes") == 2
    assert "more than" in capsys.readouterr().err
    assert calibrate(folder, measured, "--cluster", "tpu_v4_8x8x8") == 2
    assert "torus" in capsys.readouterr().err
    text = measured.read_text(encoding="utf-8").replace('"level": "scale_up"', '"level": "rail"')
    measured.write_text(text, encoding="utf-8")
    assert json.loads(text.splitlines()[1])["shape"]["level"] == "rail"
    assert calibrate(folder, measured, "--cluster", CLUSTER) == 2
    assert "no level 'rail'" in capsys.readouterr().err
    assert not list(folder.glob("*/*.yaml"))
