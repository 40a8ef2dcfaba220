"""Fields of one scenario that must fit together, whatever the degrees: checked once, all problems at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from moesim.describe.hardware import Cluster, Device, Stack, TorusFabric
from moesim.describe.model import MAX_LAYERS, GroupedQueryAttention, HistogramLoad, LayerRun
from moesim.describe.scenario import DEFAULT_RANK_ORDER, Scenario


class Inconsistency(NamedTuple):
    """What does not fit, without the place in a file."""

    code: str
    field: str
    message: str
    remedy: str


def inconsistencies(scenario: Scenario) -> Iterator[Inconsistency]:
    """Problems between fields of a scenario."""
    yield from _layer_problems(scenario)
    yield from _length_problems(scenario)
    yield from _moe_problems(scenario)
    yield from overlap_problems(scenario)
    attention = scenario.model.attention
    if isinstance(attention, GroupedQueryAttention) and attention.heads % attention.kv_heads:
        yield Inconsistency(
            "E-SCN-004",
            "model.attention.kv_heads",
            f"{attention.heads} query heads do not share {attention.kv_heads} key-value heads evenly",
            f"choose kv_heads as a divisor of {attention.heads}",
        )
    order = scenario.parallelism.rank_order
    if sorted(order) != sorted(DEFAULT_RANK_ORDER):
        yield Inconsistency(
            "E-SCN-011",
            "parallelism.rank_order",
            f"rank_order {order} does not name each mesh dimension once",
            f"order {', '.join(DEFAULT_RANK_ORDER)}, fastest first",
        )
    if scenario.workload.kind != "training" and scenario.parallelism.pipeline.virtual_stages > 1:
        yield Inconsistency(
            "E-SCN-011",
            "parallelism.pipeline.virtual_stages",
            f"a {scenario.workload.kind} step has no backward passes to interleave",
            "use virtual_stages: 1",
        )
    schedule = scenario.parallelism.pipeline.schedule
    if scenario.workload.kind != "training" and schedule not in ("gpipe", "one_f_one_b", "interleaved_one_f_one_b"):
        yield Inconsistency(
            "E-SCN-011",
            "parallelism.pipeline.schedule",
            f"schedule {schedule} orders backward passes, which a {scenario.workload.kind} step has not",
            "use schedule: one_f_one_b",
        )


def _layer_problems(scenario: Scenario) -> Iterator[Inconsistency]:
    model = scenario.model
    sides: list[tuple[str, list[LayerRun]]] = [("layers", model.layers)]
    if model.encoder_layers is not None:
        sides.append(("encoder_layers", model.encoder_layers))
    for name, needed in (("dense_ffn", "dense"), ("moe", "moe")):
        users = [
            f"model.{side}.{index}.ffn"
            for side, runs in sides
            for index, run in enumerate(runs)
            if needed in run.kinds()
        ]
        if users and getattr(model, name) is None:
            yield Inconsistency(
                "E-SCN-002",
                f"model.{name}",
                f"{users[0]} asks for {needed} layers, but model.{name} is missing",
                f"describe model.{name} or change the layers",
            )
    is_pair = model.architecture == "encoder_decoder"
    if is_pair and model.encoder_layers is None:
        yield Inconsistency(
            "E-SCN-002", "model.encoder_layers", "an encoder_decoder model needs encoder_layers", "add encoder_layers"
        )
    if not is_pair and model.encoder_layers is not None:
        yield Inconsistency(
            "E-SCN-011",
            "model.encoder_layers",
            "a decoder_only model has no encoder_layers",
            "remove them, or set architecture: encoder_decoder",
        )
    total = sum(run.count for _, runs in sides for run in runs)
    if total > MAX_LAYERS:
        yield Inconsistency(
            "E-SCN-007", "model.layers", f"{total} layers exceed {MAX_LAYERS}", f"use at most {MAX_LAYERS} layers"
        )


def _length_problems(scenario: Scenario) -> Iterator[Inconsistency]:
    workload = scenario.workload
    is_pair = scenario.model.architecture == "encoder_decoder"
    needed = ("source_length", "target_length") if is_pair else ("sequence_length",)
    for name in ("sequence_length", "source_length", "target_length"):
        value = getattr(workload, name)
        if name in needed and value is None:
            yield Inconsistency(
                "E-SCN-002",
                f"workload.{name}",
                f"workload.{name} is missing; a {scenario.model.architecture} model needs it",
                f"add {name}",
            )
        if name not in needed and value is not None:
            yield Inconsistency(
                "E-SCN-011",
                f"workload.{name}",
                f"workload.{name} = {value} has no meaning for a {scenario.model.architecture} model",
                f"give {' and '.join(needed)} instead",
            )


def _moe_problems(scenario: Scenario) -> Iterator[Inconsistency]:
    moe = scenario.model.moe
    if moe is None:
        return
    imbalance = moe.router.imbalance
    if isinstance(imbalance, HistogramLoad):
        if len(imbalance.loads) != moe.num_experts:
            yield Inconsistency(
                "E-SCN-011",
                "model.moe.router.imbalance.loads",
                f"the histogram has {len(imbalance.loads)} loads for {moe.num_experts} experts",
                "give one load per expert",
            )
        if sum(imbalance.loads) <= 0:
            yield Inconsistency(
                "E-SCN-007", "model.moe.router.imbalance.loads", "all loads are zero", "give tokens per expert"
            )


def overlap_problems(scenario: Scenario) -> Iterator[Inconsistency]:
    """Mechanisms of overlap that this model or workload has nothing for, or that exclude each other."""
    overlap, moe = scenario.overlap, scenario.model.moe
    if moe is None and overlap.is_in_blocks:
        asked = [name for name in ("shared_experts", "expert_chunks", "two_micro_batches") if getattr(overlap, name)]
        yield Inconsistency(
            "E-SCN-011", f"overlap.{asked[0]}", "a model without experts has no all-to-all to hide", "remove it"
        )
    if moe is not None and overlap.shared_experts and not moe.shared_experts:
        yield Inconsistency(
            "E-SCN-011",
            "overlap.shared_experts",
            "the model has no shared experts that could run during the all-to-all",
            "remove it, or give model.moe.shared_experts",
        )
    if overlap.two_micro_batches and overlap.expert_chunks not in (None, 1):
        yield Inconsistency(
            "E-SCN-011",
            "overlap.expert_chunks",
            f"expert_chunks: {overlap.expert_chunks} and two_micro_batches both fill the time of the all-to-all",
            "choose one of them",
        )
    if overlap.is_in_blocks and scenario.stack_options.overlaps_expert_communication is not None:
        yield Inconsistency(
            "E-SCN-011",
            "stack_options.overlaps_expert_communication",
            "the stack's achieved overlap and explicit mechanisms both say what hides the all-to-all",
            "keep overlap, and leave this out",
        )
    if scenario.workload.kind != "training" and overlap.gradient_bucket is not None:
        yield Inconsistency(
            "E-SCN-011", "overlap.gradient_bucket", f"a {scenario.workload.kind} step has no gradients", "remove it"
        )


def hardware_mismatches(scenario: Scenario, device: Device, cluster: Cluster, stack: Stack) -> Iterator[Inconsistency]:
    """Problems between a scenario and its hardware and stack."""
    precision = scenario.precision.compute
    if precision not in device.peak_flop_rate:
        known = ", ".join(sorted(device.peak_flop_rate))
        yield Inconsistency(
            "E-SCN-008",
            "precision.compute",
            f"{device.id} has no {precision} arithmetic",
            f"it has {known}",
        )
    fabric = cluster.fabric
    tiers = {"torus"} if isinstance(fabric, TorusFabric) else {level.tier for level in fabric.levels}
    if isinstance(fabric, TorusFabric) and fabric.pods and scenario.devices > cluster.device_count // fabric.pods.count:
        yield Inconsistency(
            "E-SCN-011",
            "devices",
            f"{scenario.devices} devices span several pods of cluster {cluster.id}, which estimates do not know yet",
            f"use at most the {cluster.device_count // fabric.pods.count} devices of one pod",
        )
    missing = sorted(tiers - set(stack.collectives))
    if missing:
        yield Inconsistency(
            "E-SCN-011",
            "stack",
            f"stack {stack.id} has no collectives for {', '.join(missing)} links, which cluster {cluster.id} has",
            "choose a stack for this kind of cluster",
        )
