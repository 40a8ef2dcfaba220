"""What a person should know of an answer: the bottleneck and what relieves it, and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moesim.describe.scenario import Scenario
from moesim.engine.analytical import System
from moesim.estimation.step_estimate import AnswerWarning, Bottleneck
from moesim.structure.columns import DROPLESS, Columns
from moesim.structure.placement import crossed_level, process_group

if TYPE_CHECKING:
    from moesim.engine.uneven_world import LossAttribution

RELIEF: dict[str, str] = {
    "attention": "shorten sequences, use a flash kernel, or split attention over tensor or context ranks",
    "dense_ffn": "it is compute: a lower compute precision or more devices",
    "router": "fewer experts or a fused top-k kernel",
    "dispatch_combine": "smaller group_tokens (one-hot costs group_tokens/d_ff of the experts), or a permute dispatch",
    "expert_gemm": "a lower capacity_factor or compute precision; larger micro-batches give each expert more rows",
    "embedding_head_loss": "shard the vocabulary over tensor ranks",
    "memory_bound": "fused element-wise kernels, or sequence parallelism",
    "all_to_all": "keep the expert group inside fast links, send fewer bytes (dispatch precision), overlap it",
    "tensor_parallel": "a smaller tensor degree, inside one node",
    "context_parallel": "a smaller context degree, or overlap its ring with attention",
    "data_parallel": "more micro-batches per step, overlapped reduction, or fewer gradient bytes",
    "pipeline_p2p": "fewer stages, or overlap the transfers",
    "recompute": "selective recompute or none, if memory allows",
    "optimizer": "shard the optimizer state (zero_stage 1)",
    "host": "CUDA graphs, fewer synchronisations, or larger kernels",
    "imbalance": "a balancing loss or bias, a capacity factor, or more experts per rank",
    "pipeline_bubble": "more micro-batches per step, virtual stages, or evener stages (layers_per_stage)",
}
STRAGGLER_RELIEF = (
    "find and replace what is slow or late (devices, links, hosts): it costs more than uneven loads and bubbles"
)
GROUPED = ("tensor", "context", "data", "expert_tensor", "expert", "expert_data")
ROUNDING_TOLERANCE = 0.1
TIGHT_MEMORY_FRACTION = 0.95


def find_bottleneck(exposed_s: Mapping[str, float], step_time_s: float) -> Bottleneck:
    """Largest exposed part of the step."""
    name = max(exposed_s, key=lambda key: exposed_s[key])
    return Bottleneck(name, exposed_s[name] / step_time_s, RELIEF[name])


def bottleneck_of_losses(bottleneck: Bottleneck, losses: LossAttribution) -> Bottleneck:
    """Waiting for others has another remedy where stragglers cost more than uneven loads and the pipeline's shape."""
    is_waiting = bottleneck.name in ("imbalance", "pipeline_bubble")
    if not is_waiting or losses.stragglers_s <= max(losses.imbalance_s, losses.bubble_s):
        return bottleneck
    return replace(bottleneck, relief=STRAGGLER_RELIEF)


def warnings_of(
    system: System, columns: Columns, slots: float, dropped: float, memory_share: float
) -> Iterator[AnswerWarning]:
    """Things that change how far an answer can be trusted."""
    yield from _routing_warnings(system.scenario, columns, slots, dropped)
    yield from _placement_warnings(system, columns)
    if TIGHT_MEMORY_FRACTION < memory_share <= 1:
        text = f"memory is {memory_share:.1%} of what is usable; the memory model is not exact to that"
        yield AnswerWarning("W-MEM-001", text)
    if system.scenario.model.mtp_layers:
        yield AnswerWarning("W-MTP-001", "parameter counts are without the multi-token-prediction modules (mtp)")
    moe = system.scenario.model.moe
    if moe is not None and moe.router.precision not in system.device.peak_flop_rate:
        text = f"{system.device.id} lists no {moe.router.precision} rate; the router is priced at its slowest"
        yield AnswerWarning("W-PRC-001", text)
    if system.scenario.optimizer.offload != "none":
        yield AnswerWarning("W-OFF-001", "the host's own optimizer arithmetic is not modelled, only the transfers")


def _placement_warnings(system: System, columns: Columns) -> Iterator[AnswerWarning]:
    """Groups whose closed forms are rough; simulated on the wires they are what they are."""
    if system.hardware.fabric.contention is not None:
        return
    for dimension in GROUPED:
        group = process_group(columns, system.scenario.parallelism.rank_order, dimension)
        if domain := crossed_level(group, system.hardware.fabric.sizes):
            text = (
                f"some {dimension} groups ({group.size[0]:.0f} ranks, {group.stride[0]:.0f} apart) lie across the ends "
                f"of domains of {domain} devices: closed forms of their collectives are rough; see --network flow"
            )
            yield AnswerWarning("W-NET-001", text)


def _routing_warnings(scenario: Scenario, columns: Columns, slots: float, dropped: float) -> Iterator[AnswerWarning]:
    moe = scenario.model.moe
    factor = float(columns["capacity_factor"][0])
    if moe is None or factor == DROPLESS:
        return
    group = routing_group_tokens(scenario, columns)
    scale = moe.router.experts_per_token if moe.router.capacity_per == "assignment" else 1
    asked = scale * factor * group / moe.num_experts
    if slots > asked * (1 + ROUNDING_TOLERANCE):
        text = (
            f"{asked:.2f} slots per expert and routing group round up to {slots:g}: {slots / asked:.2f} times the rows"
        )
        yield AnswerWarning("W-CAP-001", text)
    if dropped > 0:
        yield AnswerWarning("W-CAP-002", f"{dropped:.1%} of the assignments exceed an expert's slots and are dropped")


def routing_group_tokens(scenario: Scenario, columns: Columns) -> float:
    """Tokens of one routing group of the decoder, for the first row; decoding, one token per sequence."""
    length = columns["target_length"] * 0 + 1.0 if scenario.workload.kind == "decode" else columns["target_length"]
    tokens = float((columns["micro_batch"] * length / columns["context"] / columns["tensor"])[0])
    asked = float(columns["group_tokens"][0])
    return tokens if asked == 0 else float(np.minimum(asked, tokens))
