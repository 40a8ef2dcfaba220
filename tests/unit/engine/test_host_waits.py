"""The host runs ahead: closed forms against operations issued one by one, and both engines against each other."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from random_scenarios import loaded, random_document, with_fields

from moesim.describe.hardware import DurationFigure, LaunchBehaviour
from moesim.engine.analytical import PlanEvaluation, System, evaluate
from moesim.engine.breakdowns import breakdown
from moesim.engine.event_driven import simulate_step
from moesim.engine.host_waits import BACKWARD, FORWARD, HostPipeline, HostWaits, PassSeconds, host_waits
from moesim.engine.layer_cases import Block, BlockPhase, LayerCases
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario, build_system
from moesim.structure.layers import LayerKind, LayerSequence, StagePlan

AGREEMENT = 1e-6
OPERATION_S = 1e-5
READ_S = 2.5e-5
SEEDS = 96
VARIANTS: tuple[dict[str, Any], ...] = (
    {"launch_queue": 1024, "synchronises": []},
    {"launch_queue": 1024, "synchronises": ["exchange", "experts", "step"]},
    {"launch_queue": 100, "synchronises": ["exchange"]},
    {"launch_queue": 1024, "synchronises": ["hop", "step"]},
)


def duration(seconds: float) -> DurationFigure:
    return DurationFigure(value=f"{seconds * 1e6:.6f} us", kind="assumed", source="none")


def launch_of(**fields: Any) -> LaunchBehaviour:
    constants = {
        "kernel_launch_time": duration(OPERATION_S),
        "operation_time": duration(OPERATION_S),
        "host_synchronisations_per_moe_layer": 1,
        "host_synchronisation_time": duration(READ_S),
    }
    return LaunchBehaviour(**constants | {"launch_queue": 1024, "synchronises": ["step"]} | fields)


@dataclass(frozen=True)
class Pass:
    """Operations of a pass, each with its kernel; before the one at ``reads_at`` the host waits for the device."""

    operations: int
    device_s: float
    reads_at: int | None = None


def finish_one_by_one_s(passes: list[Pass], queue: int) -> float:
    """Issue operation after operation, at most ``queue`` ahead of the kernels done; when the device has done all."""
    host, device, done = 0.0, 0.0, []
    for one in passes:
        for index in range(one.operations):
            if index == one.reads_at:
                host = max(host, device) + READ_S
            if len(done) >= queue:
                host = max(host, done[len(done) - queue])
            host += OPERATION_S
            device = max(device, host) + one.device_s / one.operations
            done.append(device)
    return device


def waits_of(forward: Pass, backward: Pass, launch: LaunchBehaviour, **fields: Any) -> HostWaits:
    """Waiting of a chunk with one layer that takes all of both passes."""
    phases = [
        BlockPhase(device_s=np.array([one.device_s]), host_s=np.array([one.operations * OPERATION_S]))
        for one in (forward, backward)
    ]
    for name, value in fields.items():
        setattr(phases[0], name, np.array([value]))
    empty = Block("end", False, BlockPhase(), BlockPhase())
    reads = forward.reads_at is not None
    block = Block("layer", reads, *phases)
    cases = np.zeros(1, dtype=np.int64)
    layers = LayerCases(cases, cases, (block,), empty, empty, 0, np.array([reads]))
    seconds = PassSeconds(
        host_s=np.stack([phase.host_s for phase in phases])[:, None],
        device_s=np.stack([phase.device_s for phase in phases])[:, None],
        gap_s=np.zeros((2, 1, 1)),
        waiting_by_block_s=phases[0].waiting_s[None],
    )
    sequence = LayerSequence((LayerKind("decoder", reads, False),), (0,), 0)
    plan = StagePlan(1, 1, np.ones((1, 1)))
    pipeline = HostPipeline(launch, sequence, plan, "one_f_one_b", is_training=True)
    return host_waits(pipeline, layers, cases, seconds)


class TestAgainstOperationsIssuedOneByOne:
    """The recursion's rate, and its first pass, are those of a queue that is run operation by operation."""

    PAIRS = (
        pytest.param(Pass(400, 2e-3), Pass(400, 9e-3), id="the backward pass hides the host of the forward one"),
        pytest.param(Pass(400, 2e-3), Pass(400, 5e-3), id="hides part of it"),
        pytest.param(Pass(400, 6e-3), Pass(400, 3.5e-3), id="the forward pass hides part"),
        pytest.param(Pass(300, 1e-3), Pass(300, 2e-3), id="the host is slower in both"),
        pytest.param(Pass(300, 5e-3), Pass(300, 9e-3), id="the device is slower in both"),
    )

    @pytest.mark.parametrize("queue", [1024, 150])
    @pytest.mark.parametrize(("forward", "backward"), PAIRS)
    def test_time_of_many_micro_batches(self, forward, backward, queue):
        waits = waits_of(forward, backward, launch_of(launch_queue=queue))
        own_s = forward.device_s + backward.device_s
        for micro_batches in (1, 2, 7):
            passes = [forward, backward] * micro_batches
            predicted = micro_batches * (own_s + float(waits.waiting_s.sum())) + float(waits.start_s[0])
            assert predicted == pytest.approx(finish_one_by_one_s(passes, queue), abs=4 * OPERATION_S * micro_batches)

    def test_a_lead_ends_where_counts_are_read(self):
        """Half of the forward pass is issued before its counts are read; the other half finds the host level."""
        forward, backward = Pass(400, 2e-3, reads_at=200), Pass(400, 9e-3)
        waits = waits_of(forward, backward, launch_of(), routed_host_s=2e-3, routed_device_s=1e-3)
        own_s = forward.device_s + backward.device_s
        few, many = (finish_one_by_one_s([forward, backward] * count, 1024) for count in (2, 7))
        assert own_s + float(waits.waiting_s.sum()) == pytest.approx((many - few) / 5, abs=4 * OPERATION_S)
        assert waits.leading_s[0][1][0] == pytest.approx(1e-3)

    def test_without_a_queue_host_and_device_meet_after_every_pass(self):
        forward, backward = Pass(400, 2e-3), Pass(400, 9e-3)
        waits = waits_of(forward, backward, launch_of(launch_queue=0))
        assert waits.waiting_s[FORWARD, 0, 0] == pytest.approx(2e-3)
        assert waits.waiting_s[BACKWARD, 0, 0] == 0.0
        assert waits.start_s[0] == 0.0

    def test_a_step_that_reads_nothing_begins_with_a_lead(self):
        forward, backward = Pass(400, 2e-3), Pass(400, 9e-3)
        assert waits_of(forward, backward, launch_of()).start_s[0] == pytest.approx(2e-3)
        assert waits_of(forward, backward, launch_of(synchronises=[])).start_s[0] == 0.0


def with_launch(scenario: LoadedScenario, **fields: Any) -> System:
    before = scenario.system
    launch = before.stack.launch.model_copy(update=fields)
    stack = before.stack.model_copy(update={"launch": launch})
    return build_system(
        scenario.scenario, before.device, before.cluster, stack, surfaces=before.hardware.device.surfaces
    )


def evaluated(system: System, scenario: LoadedScenario) -> PlanEvaluation:
    (evaluation,) = evaluate(system, scenario.columns)
    return evaluation


def step_time_s(system: System, scenario: LoadedScenario) -> float:
    return float(evaluated(system, scenario).step_time_s[0])


SLOW_HOST: dict[str, Any] = {"operation_time": duration(30e-6), "kernel_gap": duration(1.6e-6)}


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_both_engines_agree_while_the_host_runs_ahead(variant):
    ahead = 0
    for seed in range(SEEDS):
        fields = random_document(seed)
        if fields["workload"]["kind"] != "training":
            continue
        scenario = loaded(fields)
        system = with_launch(scenario, **SLOW_HOST, **VARIANTS[variant])
        run = simulate_step(system, scenario.columns)
        evaluation = evaluated(system, scenario)
        assert run.step_time_s[0] == pytest.approx(float(evaluation.step_time_s[0]), rel=AGREEMENT), seed
        parts = breakdown(evaluation, scenario.columns, 0)["exposed"]
        assert sum(parts.values()) == pytest.approx(float(evaluation.step_time_s[0]), rel=1e-9), seed
        ahead += bool(evaluation.times.chunk.waits.lead_s.any())
    assert ahead >= 3


def test_a_longer_queue_and_fewer_synchronisations_are_never_slower():
    """Without ZeRO's passes, which hide under waiting, too."""
    faster = 0
    for seed in range(SEEDS):
        fields = random_document(seed)
        if fields["parallelism"]["zero_stage"] >= 2:
            continue
        scenario = loaded(fields)
        every = {"synchronises": ["exchange", "experts", "hop", "step"]}
        times = [
            step_time_s(with_launch(scenario, **SLOW_HOST, **launch), scenario)
            for launch in (
                {"launch_queue": 0, **every},
                {"launch_queue": 1024, **every},
                {"launch_queue": 1024, "synchronises": ["exchange", "step"]},
                {"launch_queue": 1024, "synchronises": []},
            )
        ]
        assert all(after <= before * (1 + 1e-9) for before, after in pairwise(times)), seed
        faster += times[-1] < times[0] * 0.999
    assert faster >= 5


ONE_DEVICE: dict[str, Any] = {
    "schema_version": 1,
    "name": "one_device",
    "model": {
        "architecture": "decoder_only",
        "hidden_size": 1024,
        "vocab_size": 32000,
        "attention": {"kind": "multi_head", "heads": 8, "head_size": 128},
        "moe": {
            "num_experts": 8,
            "intermediate_size": 2048,
            "router": {"kind": "top_k", "experts_per_token": 2},
        },
        "layers": [{"count": 4, "ffn": "moe"}],
    },
    "workload": {
        "kind": "training",
        "sequence_length": 1024,
        "sequences_per_micro_batch": 4,
        "sequences_per_step": 12,
    },
    "precision": {"compute": "bf16", "parameters": "bf16"},
    "optimizer": {"kind": "adam"},
    "parallelism": {"pipeline": {"stages": 1}},
    "cluster": "h100_sxm_8",
    "devices": 1,
    "stack": "pytorch_grouped_mm_nccl",
}


class TestOneStageThatReadsNothing:
    """A loop of steps without a synchronisation takes max(host, device) of all it has, whatever the order."""

    def times(self, operation_s: float, *, sequences: int = 12, **changes: Any) -> tuple[float, PlanEvaluation]:
        scenario = loaded(with_fields(ONE_DEVICE, {"workload.sequences_per_step": sequences}))
        fields = {"operation_time": duration(operation_s), "launch_queue": 10**6, "synchronises": []}
        fields |= {"kernel_gap": None, "step_time": None} | changes
        evaluation = evaluated(with_launch(scenario, **fields), scenario)
        return float(evaluation.step_time_s[0]), evaluation

    def test_the_host_of_many_operations_hides_under_the_whole_step(self):
        device_s, _ = self.times(1e-9)
        low_s, slow_s = (self.times(operation_s)[0] for operation_s in (5e-3, 1e-2))
        host_s = slow_s - low_s  # host-bound: proportional to the time of an operation
        assert slow_s == pytest.approx(2 * host_s, rel=1e-6)
        for share in (0.5, 0.9, 0.99):
            assert self.times(1e-2 * share * device_s / slow_s)[0] == pytest.approx(device_s, rel=1e-6)

    def test_gaps_between_kernels_are_no_matter_of_the_host(self):
        without_s, _ = self.times(1e-9)
        gaps_s = [self.times(1e-9, kernel_gap=duration(gap))[0] - without_s for gap in (1e-6, 3e-6)]
        assert gaps_s[0] > 0
        assert gaps_s[1] == pytest.approx(3 * gaps_s[0], rel=1e-6)
        twice_s = self.times(1e-9, sequences=24, kernel_gap=duration(1e-6))[0] - self.times(1e-9, sequences=24)[0]
        parameters = estimate_loaded(loaded(ONE_DEVICE)).parameters.total
        assert 2 * gaps_s[0] - twice_s == pytest.approx(2e-6 * parameters / (320 * 65536), rel=1e-3)  # the update's
        captured_s, _ = self.times(1e-9, kernel_gap=duration(1e-6), cuda_graphs=["step"])
        assert captured_s == pytest.approx(without_s, rel=1e-6)
