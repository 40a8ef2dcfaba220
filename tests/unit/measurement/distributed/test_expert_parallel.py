"""Layers and steps over several processes equal one process that has all experts: outputs and every gradient."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from expert_parallel_cases import (
    FAILING_SIZE,
    LAYERS,
    MODELS,
    SEED,
    SIZES,
    LayerCase,
    ModelCase,
    full_weights,
    run_layer_case,
)

from moesim.measurement.distributed.layer_shapes import drawn, rank_choices
from moesim.measurement.distributed.optional_back_ends import TORCH
from moesim.measurement.distributed.ranks import ALONE
from moesim.measurement.workbenches import open_workbench

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'moesim[measure]'")
reference_models = pytest.importorskip("reference_models")

ROOT = Path(__file__).resolve().parents[4]
TOLERANCE = {"fp32": 2e-5, "bf16": 3e-2}
TIMEOUT_S = 120


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def of_sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What the processes found, all cases in one start of them."""
    folder, ports = tmp_path_factory.mktemp("ranks"), ",".join(str(port) for port in free_ports(len(SIZES) + 1))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "expert_parallel_cases", str(folder), ports]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(max(SIZES))
    ]
    try:
        told = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert {process.returncode for process in processes} == {0}, "\n".join(told)[-4000:]
    of_sizes = {size: [torch.load(folder / f"{size}_{rank}.pt") for rank in range(size)] for size in SIZES}
    failing = [json.loads((folder / f"failing_{rank}.json").read_text()) for rank in range(FAILING_SIZE)]
    return {**of_sizes, 0: failing}


@pytest.fixture(params=SIZES, ids=lambda size: f"{size} processes")
def found(request: pytest.FixtureRequest, of_sizes: dict[int, list[dict]]) -> list[dict]:
    return of_sizes[request.param]


def assert_near(ours, theirs, dtype: str, what: str) -> None:
    assert ours.shape == theirs.shape
    distance, size = (ours.double() - theirs).norm(), theirs.norm()
    assert distance <= TOLERANCE[dtype] * size, f"{what}: {distance} of {size}"  # false for NaN


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_a_layer_over_processes_equals_one_process(found: list[dict], case: LayerCase) -> None:
    check_layer(case, [one["layers"][case.name] for one in found])


@pytest.mark.parametrize("case", [case for case in LAYERS if case.back_ends == TORCH], ids=lambda case: case.name)
def test_a_layer_of_a_process_alone_is_what_the_formulas_say(case: LayerCase) -> None:
    check_layer(case, [run_layer_case(case, open_workbench("cpu", 0), ALONE)])


def check_layer(case: LayerCase, of_ranks: list[dict]) -> None:
    shape, size = case.shape, len(of_ranks)
    cast = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    weights = {
        name: (weight if name == "router" else weight.to(cast)).double().requires_grad_()
        for name, weight in full_weights(shape).items()
    }
    routed = drawn(case.preset, shape, num_ranks=size, layer=0, seed=SEED)
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for rank, ours in enumerate(of_ranks):
        choices = None
        if not case.is_learned:
            drawn_choices = rank_choices(routed, shape, rank=rank, layer=0, seed=SEED)
            loads = np.bincount(drawn_choices.ravel(), minlength=shape.num_experts)
            assert loads.tolist() == routed.matrix[rank].tolist()
            choices = torch.from_numpy(drawn_choices)
        tokens = ours["tokens"].double().requires_grad_()
        out = reference_models.layer(tokens, weights, shape, choices)
        assert_near(ours["out"], out.detach(), case.dtype, f"output of rank {rank}")
        grads = torch.autograd.grad(out, [tokens, *weights.values()], ours["grad"].double())
        assert_near(ours["tokens_grad"], grads[0], case.dtype, f"gradient of the tokens of rank {rank}")
        of_weights = dict(zip(weights, grads[1:], strict=True))
        assert_near(ours["router"], of_weights["router"], case.dtype, f"gradient of the router from rank {rank}")
        for name, grad in of_weights.items():
            totals[name] += grad
    for name in ("up", "down"):
        gathered = torch.cat([ours[name] for ours in of_ranks])
        assert_near(gathered, totals[name], case.dtype, f"gradient of {name}")


def test_the_cases_hold_drops_empty_experts_and_idle_ranks() -> None:
    """What the comparison above is worth."""
    by_name = {case.name: case for case in LAYERS}
    for size in SIZES:
        empty = by_name["dropless W5"]
        matrix = drawn("W5", empty.shape, num_ranks=size, layer=0, seed=SEED).matrix
        assert matrix[:, : 8 // size].sum() == 0
        scarce = by_name["dropping W1"]
        routed = drawn("W1", scarce.shape, num_ranks=size, layer=0, seed=SEED)
        assert (routed.matrix > scarce.shape.slots).any()
        choices = torch.from_numpy(rank_choices(routed, scarce.shape, rank=0, layer=0, seed=SEED))
        assert not reference_models.kept(choices, by_name["almost all dropped"].shape).any(dim=1).all()


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_gradients_of_a_step_are_those_of_all_tokens(found: list[dict], case: ModelCase) -> None:
    shape, size = case.shape, len(found)
    width = size // case.replicas
    of_ranks = [one["models"][case.name] for one in found]
    weights = {}
    for name, weight in of_ranks[0]["weights"].items():
        parts = [one["weights"][name] for one in of_ranks[:width]]
        is_expert = name.endswith(("up", "down"))
        weights[name] = (torch.cat(parts) if is_expert else weight).double().requires_grad_()
    routed = [drawn(case.preset, shape.layer, num_ranks=width, layer=layer, seed=SEED) for layer in range(2)]
    loss = 0.0
    for rank, ours in enumerate(of_ranks):
        choices = [
            torch.from_numpy(rank_choices(one, shape.layer, rank=rank % width, layer=layer, seed=SEED))
            for layer, one in enumerate(routed)
        ]
        of_rank = sum(reference_models.loss(weights, shape, *batch, choices) for batch in ours["batches"])
        assert_near(ours["loss"], of_rank.detach() / case.micro_batches, "fp32", f"loss of rank {rank}")
        loss = loss + of_rank / case.micro_batches / size
    for name, grad in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
        for rank, ours in enumerate(of_ranks):
            is_expert = name.endswith(("up", "down"))
            expected = grad.chunk(width)[rank % width] if is_expert else grad
            assert_near(ours["sums"][name], expected, "fp32", f"gradient of {name} on rank {rank}")


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_ranks_that_share_a_weight_hold_the_same_after_a_step(found: list[dict], case: ModelCase) -> None:
    width = len(found) // case.replicas
    of_ranks = [one["models"][case.name] for one in found]
    for rank, ours in enumerate(of_ranks):
        for name, weight in ours["stepped"].items():
            first = of_ranks[rank % width if name.endswith(("up", "down")) else 0]
            assert torch.equal(weight, first["stepped"][name])
            assert not torch.equal(weight, ours["weights"][name])
    words = [ours["batches"][0][0] for ours in of_ranks]
    assert not torch.equal(words[0], words[1])


def test_the_first_ranks_clock_decides_for_all(of_sizes: dict[int, list[dict]]) -> None:
    progress = [one["clocks"] for one in of_sizes[0]]
    assert progress == [[3, 0], [3, 0]]  # the first rank had time, the other had none


def test_a_case_that_fails_on_every_rank_or_before_an_exchange_is_skipped_by_all(
    of_sizes: dict[int, list[dict]],
) -> None:
    first, second = (one["skips"] for one in of_sizes[0])
    assert [record["record"] for record in first] == ["skip", "skip", "result"]
    assert first[0]["reason"] == "RuntimeError: not here"
    assert first[1]["reason"] == "rank 1: RuntimeError: only there"
    assert len(first[2]["rank_medians_s"]) == FAILING_SIZE
    assert first[2]["median_s"] >= max(5e-3, *first[2]["rank_medians_s"]) * 0.999  # the second rank sleeps longer
    assert second == []


def test_a_rank_that_fails_while_another_waits_ends_the_run_and_is_told(of_sizes: dict[int, list[dict]]) -> None:
    first, second = (one["failure"] for one in of_sizes[0])
    assert "rank 1 failed in overlap/exchange" in second["error"]
    assert "only there" in second["error"]
    assert "rank 0 lost rank 1 in overlap/exchange" in first["error"]
    assert "only there" in first["error"]
    assert {first["code"], second["code"]} == {"E-RUN-001"}
    assert [record["record"] for record in first["written"]] == ["skip"]  # so that the next run goes on behind it


def test_what_stops_the_first_rank_stops_the_others(of_sizes: dict[int, list[dict]]) -> None:
    first, second = (one["unreadable"] for one in of_sizes[0])
    assert "no record of a measurement" in first
    assert "the first rank could not begin" in second
