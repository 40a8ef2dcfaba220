"""Lists of cases: names, order, arithmetic and traffic. No torch is needed to make them."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from moesim.measurement.cases import Case, Target, by_value
from moesim.measurement.routed_loads import PRESETS, expert_choices, layer_loads, rank_loads
from moesim.measurement.suites import SUITES
from moesim.measurement.workbenches import Workbench
from moesim.structure.token_routing import draw

TARGETS = [Target("cuda", ("bf16",), 0), Target("cpu", ("fp32", "bf16"), 0)]


def cases_of(target: Target) -> list[Case]:
    return by_value([cases(target) for cases in SUITES.values()])


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.device)
def test_case_names_are_unique_and_cases_can_be_written(target: Target) -> None:
    cases = cases_of(target)
    assert max(Counter(case.identifier for case in cases).values()) == 1
    for case in cases:
        json.dumps([case.shape, case.loads, case.flops, case.traffic_bytes], allow_nan=False)
        assert case.flops >= 0
        assert case.working_set_bytes > 0


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.device)
def test_any_beginning_of_the_list_covers_every_suite(target: Target) -> None:
    assert {case.suite for case in cases_of(target)[: len(SUITES)]} == set(SUITES)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.device)
def test_every_pass_and_every_preset_is_measured(target: Target) -> None:
    cases = cases_of(target)
    passes = {suite: {case.pass_name for case in cases if case.suite == suite} for suite in SUITES}
    assert passes["gemm"] == passes["grouped_gemm"] == {"forward", "dgrad", "wgrad"}
    for suite in ("attention", "memory_bound", "dispatch", "router", "moe_layer", "transformer_block"):
        assert passes[suite] == {"forward", "backward"}
    for suite in ("grouped_gemm", "moe_layer"):
        assert {case.shape["preset"] for case in cases if case.suite == suite} == set(PRESETS)


def test_arithmetic_and_traffic_of_a_product_are_those_by_hand() -> None:
    cases = {case.identifier: case for case in cases_of(TARGETS[0])}
    forward = cases["gemm/gemm/forward/bf16/m=4096,n=4096,k=4096"]
    assert forward.flops == 2 * 4096**3
    assert forward.traffic_bytes == 3 * 2 * 4096**2
    assert cases["gemm/gemm/wgrad/bf16/m=4096,n=4096,k=4096"].traffic_bytes == (2 * 2 + 8) * 4096**2


def test_a_layer_counts_rows_of_every_choice_and_weights_of_experts_that_are_hit() -> None:
    layers = [case for case in cases_of(TARGETS[0]) if case.suite == "moe_layer" and case.shape["experts"] == 8]
    by_key = {(case.shape["preset"], case.pass_name): case for case in layers}
    equal = by_key["W0", "forward"]
    assert equal.flops == 6 * (4096 * 2) * 4096 * 14336 + 2 * 4096 * 4096 * 8
    assert by_key["W0", "backward"].flops == 2 * equal.flops
    # As for 8 ranks, each holds one expert: the empty rank of W5 saves the weights of one expert and nothing else.
    assert equal.traffic_bytes - by_key["W5", "forward"].traffic_bytes == 3 * 2 * 4096 * 14336


def test_loads_are_those_of_the_draw() -> None:
    matrix = draw("W1", 512, 16, 2, 4, 0, 0, 7)
    routed = rank_loads("W1", 512, 16, 2, num_ranks=4, seed=7)
    assert routed.rows == matrix.sum(axis=0).reshape(4, 4).sum(axis=1).max()
    assert layer_loads("W7", 512, 32, 2, seed=3).step > 0 or np.random.default_rng([3, 0]).random() < 0.1


@pytest.mark.parametrize("preset", PRESETS)
def test_choices_of_tokens_have_the_loads_and_differ_where_they_can(preset: str) -> None:
    loads = layer_loads(preset, 512, 32, 4, seed=1).loads
    choices = expert_choices(loads, 4, seed=1)
    assert tuple(np.bincount(choices.ravel(), minlength=32)) == loads
    if max(loads) <= len(choices):
        assert all(len(set(chosen)) == 4 for chosen in choices.tolist())


def test_input_sets_exceed_the_cache_unless_memory_is_short() -> None:
    bench = Workbench("cuda", 0, cache_bytes=60e6, memory_bytes=8e9)
    for working_set_bytes in (1e6, 50e6, 119e6, 121e6):
        assert bench.num_sets(working_set_bytes) * working_set_bytes >= 2 * bench.cache_bytes
    assert bench.num_sets(50e6, num_sharing=80) == 2
