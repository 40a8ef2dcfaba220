"""M6-T 1T on 480 V100 (arXiv:2105.15082), counted by hand: no formula of moesim is used here.

24 layers of 960 experts, hidden 1024, expert width 21248, one top-1 prototype, capacity 1.25, one sequence of 1024
tokens per device. Shapes and vocabulary are assumptions of the scenario; the arithmetic is not.
"""

from collections.abc import Callable
from functools import cache
from math import ceil

import pytest

from moesim.describe.hardware_library import HardwareLibrary
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import load
from moesim.estimation.step_estimate import StepEstimate

LAYERS, EXPERTS, HIDDEN, WIDTH, VOCAB, DEVICES, TOKENS = 24, 960, 1024, 21248, 50_000, 480, 1024
GIB = 2.0**30

EXPERT_PARAMETERS = LAYERS * EXPERTS * 2 * HIDDEN * WIDTH
DENSE_LAYER = 4 * HIDDEN**2 + HIDDEN * EXPERTS + 2 * HIDDEN  # attention, router, two norms
DENSE_PARAMETERS = LAYERS * DENSE_LAYER + VOCAB * HIDDEN + HIDDEN  # tied embedding, final norm
HELD_EXPERTS, HELD_DENSE = EXPERT_PARAMETERS / DEVICES, DENSE_PARAMETERS

FP32_ADAM = ("precision.parameters=fp32", "optimizer.kind=adam")
FP32_ADAFACTOR = ("precision.parameters=fp32",)

FP16_PEAK, FP32_PEAK, NIC_BYTES_PER_S = 125e12, 15.7e12, 100e9 / 8 / 8  # one 100 Gb/s NIC for 8 devices

SLOTS = ceil(1.25 * TOKENS / EXPERTS)
ROWS = EXPERTS // DEVICES * SLOTS * DEVICES  # two local experts, slots from every one of 480 sources
ATTENTION = 2 * TOKENS * 4 * HIDDEN**2 + 2 * 2 * TOKENS * TOKENS * HIDDEN  # the masked half is computed as well
ROUTER = 2 * TOKENS * HIDDEN * EXPERTS
EINSUM = 4 * TOKENS * EXPERTS * SLOTS * HIDDEN  # dispatch and combine
EXPERT = ROWS * 2 * 2 * HIDDEN * WIDTH
HEAD = 2 * TOKENS * HIDDEN * VOCAB
ALL_TO_ALL_BYTES = EXPERTS * SLOTS * HIDDEN * 2  # fp16, empty slots included


@pytest.fixture(scope="module")
def answer() -> Callable[..., StepEstimate]:
    """``answer(*assignments)``: the shipped scenario with overrides."""
    library = HardwareLibrary()

    @cache
    def estimated(*assignments: str) -> StepEstimate:
        return estimate_loaded(load("m6t_1t_v100x480", assignments=assignments, library=library))

    return estimated


def state_bytes(estimate: StepEstimate) -> int:
    return estimate.memory.weights + estimate.memory.gradients + estimate.memory.optimizer


def test_parameters(answer: Callable[..., StepEstimate]) -> None:
    found = answer().parameters
    assert pytest.approx(1002.6e9, rel=1e-4) == EXPERT_PARAMETERS
    assert found.expert == EXPERT_PARAMETERS
    assert found.total == EXPERT_PARAMETERS + DENSE_PARAMETERS
    assert found.active == EXPERT_PARAMETERS // EXPERTS + DENSE_PARAMETERS
    assert found.per_device == pytest.approx(HELD_EXPERTS + HELD_DENSE, rel=1e-9)


def test_the_sums_of_the_hand_calculation() -> None:
    """fp32 Adam: 16 bytes per parameter. Experts alone would just fit; with the rest they do not."""
    experts_alone, with_the_rest = 16 * HELD_EXPERTS / GIB, 16 * (HELD_EXPERTS + HELD_DENSE) / GIB
    assert experts_alone == pytest.approx(31.12, abs=0.005)
    assert with_the_rest == pytest.approx(33.7, abs=0.05)
    assert experts_alone < 31.7 < with_the_rest
    weights_and_gradients = 8 * (HELD_EXPERTS + HELD_DENSE) / GIB
    assert weights_and_gradients == pytest.approx(16.9, abs=0.05)


def test_fp32_adam_does_not_fit(answer: Callable[..., StepEstimate]) -> None:
    estimate = answer(*FP32_ADAM)
    memory = estimate.memory
    assert state_bytes(estimate) == pytest.approx(16 * (HELD_EXPERTS + HELD_DENSE), rel=0.005)
    assert state_bytes(estimate) > memory.capacity
    assert memory.capacity == pytest.approx(31.7 * GIB, rel=0.005)
    assert not estimate.fits
    assert memory.deficit == memory.peak - memory.capacity > 0
    assert memory.weights == memory.gradients == pytest.approx(memory.optimizer / 2, abs=2)


def test_fp32_adam_of_the_experts_alone(answer: Callable[..., StepEstimate]) -> None:
    """Take the hand-counted rest away: 31.12 GiB are left."""
    experts = state_bytes(answer(*FP32_ADAM)) - 16 * HELD_DENSE
    assert experts / GIB == pytest.approx(31.12, rel=0.005)


def test_fp32_adafactor_fits(answer: Callable[..., StepEstimate]) -> None:
    """Weights and gradients are 8 bytes per parameter; the factored second moment is next to nothing."""
    estimate = answer(*FP32_ADAFACTOR)
    memory = estimate.memory
    assert memory.weights + memory.gradients == pytest.approx(8 * (HELD_EXPERTS + HELD_DENSE), rel=0.005)
    assert state_bytes(estimate) / GIB == pytest.approx(16.9, rel=0.005)
    assert memory.optimizer < 0.002 * memory.weights
    assert estimate.fits
    assert memory.deficit == 0


def test_the_shipped_precisions_fit(answer: Callable[..., StepEstimate]) -> None:
    """fp16 weights, fp32 gradients and fp32 master copy: 10 bytes per parameter."""
    estimate = answer()
    assert state_bytes(estimate) == pytest.approx(10 * (HELD_EXPERTS + HELD_DENSE), rel=0.005)
    assert estimate.fits


def test_executed_flops(answer: Callable[..., StepEstimate]) -> None:
    """Backward is twice forward, but the dispatch mask has no gradient: 1 of dispatch, 2 of combine."""
    layer = 3 * (ATTENTION + ROUTER + EXPERT) + 2.5 * EINSUM
    expected = LAYERS * layer + 3 * HEAD
    assert answer().hardware_flops_per_step / DEVICES == pytest.approx(expected, rel=1e-12)


def test_forward_flops(answer: Callable[..., StepEstimate]) -> None:
    """One forward pass, from the prefill step; its head sees one token only."""
    expected = LAYERS * (ATTENTION + ROUTER + EINSUM + EXPERT) + HEAD / TOKENS
    prefill = answer("workload.kind=prefill")
    assert prefill.hardware_flops_per_step / DEVICES == pytest.approx(expected, rel=1e-12)


def test_model_flops(answer: Callable[..., StepEstimate]) -> None:
    """One expert for each of the 1024 tokens, no empty slot, no einsum, half of the scores."""
    layer = ATTENTION - 2 * TOKENS * TOKENS * HIDDEN + ROUTER + TOKENS * 4 * HIDDEN * WIDTH
    expected = DEVICES * 3 * (LAYERS * layer + HEAD)
    assert answer().model_flops_per_step == pytest.approx(expected, rel=1e-12)


def test_experts_compute_whole_slots(answer: Callable[..., StepEstimate]) -> None:
    """1.33 slots are rounded up to 2: 1,920 rows for 1,024 tokens."""
    assert (SLOTS, ROWS) == (2, 1920)
    assert answer().routing.slots_per_expert == SLOTS
    assert "W-CAP-001" in [warning.code for warning in answer().warnings]


def test_step_time_lies_above_the_roofline_of_compute_and_network(answer: Callable[..., StepEstimate]) -> None:
    """The stack overlaps no all-to-all, so both rooflines add up; four all-to-all per layer leave the node."""
    estimate = answer()
    fp16 = LAYERS * (3 * (ATTENTION + EXPERT) + 2.5 * EINSUM) + 3 * HEAD
    compute_s = fp16 / FP16_PEAK + LAYERS * 3 * ROUTER / FP32_PEAK
    leaves_node = (DEVICES - 8) / DEVICES
    network_s = LAYERS * 4 * ALL_TO_ALL_BYTES * leaves_node / NIC_BYTES_PER_S
    assert compute_s + network_s < estimate.step_time_s < 2.5 * (compute_s + network_s)
    assert max(compute_s, network_s) <= estimate.lower_s
    assert network_s < estimate.exposed_s["all_to_all"] < 1.5 * network_s
    expert_s = LAYERS * 3 * EXPERT / FP16_PEAK
    assert expert_s < estimate.exposed_s["expert_gemm"] < 2 * expert_s


def test_optimizer_time_is_at_least_its_traffic(answer: Callable[..., StepEstimate]) -> None:
    """Adam in fp32: read gradient, read and write weights and two moments, at 900 GB/s."""
    parameters = HELD_EXPERTS + HELD_DENSE
    least_s = parameters * (4 + 2 * 4 + 2 * 8) / 900e9
    assert least_s < answer(*FP32_ADAM).exposed_s["optimizer"] < 2 * least_s
