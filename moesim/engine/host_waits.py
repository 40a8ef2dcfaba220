"""What the device waits for the host in each pass of a steady step, with the host ahead as far as it can be.

The device starts a kernel when it is issued and the one before is done. From one synchronisation to the next, that is a
recursion in the max-plus algebra over passes: each ends at the later of the host's end and the device's own. Passes
come round again every micro-batch, so its rate is a closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.cost.host_times import lead_s, replays_step, wait_s
from moesim.describe.hardware import LaunchBehaviour
from moesim.engine.layer_cases import Block, LayerCases
from moesim.structure.columns import BoolArray, FloatArray, IntArray
from moesim.structure.layers import LayerSequence, StagePlan
from moesim.structure.rank_programs import ChunkLayers, chunk_layers

FORWARD, BACKWARD = 0, 1


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of each chunk's forward and backward pass, arrays (2, chunks, n_cases) or broadcastable to it.

    ``gap_s`` between kernels; ``waiting_by_block_s`` (chunks, n_cases) what a forward pass waits where host and device
    are level before every block: used where counts are read.
    """

    host_s: FloatArray
    device_s: FloatArray
    gap_s: FloatArray
    waiting_by_block_s: FloatArray

    @property
    def issued_s(self) -> FloatArray:
        """What the device needs with the gaps."""
        return np.asarray(self.device_s + self.gap_s)


@dataclass(frozen=True)
class HostWaits:
    """What passes wait for the host.

    Attributes
    ----------
    waiting_s : ndarray of shape (2, chunks, n_cases)
        Forward and backward, with gaps and synchronisations.
    late_s : ndarray of shape (2, chunks, n_cases)
        Part of it that more lead would take away, where no counts are read.
    lead_s : ndarray of shape (2, chunks, n_cases)
        What the host is ahead when a pass begins.
    leading_s : tuple of tuple of ndarray of shape (n_cases,)
        By chunk, what that takes off the first blocks of a forward pass, up to the first that reads counts.
    start_s : ndarray of shape (n_cases,)
        What a step waits once because its first pass begins without a lead.
    reads_counts : ndarray of bool of shape (n_cases,)
        Whether host and device are level before every block of a forward pass.
    """

    waiting_s: FloatArray
    late_s: FloatArray
    lead_s: FloatArray
    leading_s: tuple[tuple[FloatArray, ...], ...]
    start_s: FloatArray
    reads_counts: BoolArray


@dataclass(frozen=True)
class HostPipeline:
    """Who issues what: a stack's launches, the layers of the model in order, and where chunks of them run."""

    launch: LaunchBehaviour
    sequence: LayerSequence
    plan: StagePlan
    schedule: str
    is_training: bool

    @property
    def runs_ahead(self) -> bool:
        """Whether the host takes a lead from one pass to the next.

        Passes have to alternate: those of inference and of GPipe follow their like, which leave no lead to one another
        that they would need.
        """
        if not self.is_training or not self.launch.launch_queue or replays_step(self.launch):
            return False
        if self.schedule == "gpipe":
            return False
        is_level_at_hops = "hop" in self.launch.synchronises and self.plan.virtual_stages == 1
        return self.plan.stages == 1 or not is_level_at_hops

    def moe_layers(self, layers: LayerCases) -> FloatArray:
        """MoE layers of each chunk, (chunks,)."""
        are_moe = np.array([block.is_moe for block in layers.layers], dtype=np.float64)
        counts = are_moe @ self.plan.counts
        counts[-1] += layers.token_prediction_moe_layers
        return np.asarray(counts)


def host_waits(pipeline: HostPipeline, layers: LayerCases, cases: IntArray, seconds: PassSeconds) -> HostWaits:
    """Waiting of each pass in the steady state, in which forward and backward passes of a chunk alternate.

    Parameters
    ----------
    pipeline : HostPipeline
        Who issues what.
    layers : LayerCases
        Blocks over their cases.
    cases : ndarray of shape (n_cases,)
        Those that are used.
    seconds : PassSeconds
        Of each chunk.

    Notes
    -----
    A pass needs h on the host and d, gaps included, on the device. From level, the host is (d - h)+ ahead at its end,
    at most the queue's Q, and the next pass waits by that much less. With a = h - d of the forward and b of the
    backward pass a micro-batch waits (a - min((-b)+, Q))+ + (b - min((-a)+, Q))+; with a long queue that is (a + b)+,
    the rate of the recursion. Where counts are read, a lead helps until the first of them, each block up to the last
    waits by itself, and only the head leaves a lead to the backward pass. Passes of one kind that follow each other
    while a pipeline fills get the steady state's lead, too; what the host gains while a stage waits for others is left
    out.
    """
    launch, (_, chunks, num_cases) = pipeline.launch, seconds.host_s.shape
    moe_layers = pipeline.moe_layers(layers)
    reads = layers.reads_counts[cases] & bool(moe_layers.any())
    lead, leading = np.zeros(seconds.host_s.shape), ((),) * chunks
    if pipeline.runs_ahead:
        lead = _leads(launch, layers, cases, seconds, reads)
        if reads.any():
            held = chunk_layers(pipeline.sequence, pipeline.plan)
            leading = tuple(_leading(chunk, layers, cases, lead[FORWARD, at]) for at, chunk in enumerate(held))
    late = wait_s(seconds.host_s, seconds.issued_s, lead)
    first_s = np.minimum(wait_s(seconds.host_s[FORWARD, 0], seconds.issued_s[FORWARD, 0]), lead[FORWARD, 0])
    waiting = late + seconds.gap_s
    if reads.any():
        saved = np.array([sum(parts, np.zeros(num_cases)) for parts in leading])
        read_s = launch.host_synchronisations_per_moe_layer * launch.host_synchronisation_time.value
        by_block = seconds.waiting_by_block_s - saved + seconds.gap_s[FORWARD] + (moe_layers * read_s)[:, None]
        waiting[FORWARD] = np.where(reads, by_block, waiting[FORWARD])
        first_s = np.where(reads, saved[0], first_s)
    return HostWaits(waiting, late * ~reads, lead, leading, first_s * ("step" in launch.synchronises), reads)


def _leads(
    launch: LaunchBehaviour, layers: LayerCases, cases: IntArray, seconds: PassSeconds, reads: BoolArray
) -> FloatArray:
    """What the host is ahead at the beginning of forward and backward passes, (2, chunks, n_cases)."""
    issued_s = seconds.issued_s
    after_forward = lead_s(seconds.host_s[FORWARD], issued_s[FORWARD], launch)
    if reads.any():
        head, level = layers.last.forward, np.zeros_like(after_forward)
        level[-1] = lead_s(_at(head.host_s, layers, cases), _at(head.issued_s, layers, cases), launch)
        after_forward = np.where(reads, level, after_forward)
    after_backward = lead_s(seconds.host_s[BACKWARD], issued_s[BACKWARD], launch, after_forward)
    return np.stack([after_backward, after_forward])


def _leading(chunk: ChunkLayers, layers: LayerCases, cases: IntArray, ahead_s: FloatArray) -> tuple[FloatArray, ...]:
    """What a lead takes off the host time of a chunk's first blocks, up to the counts of the first MoE layer."""
    blocks = [layers.layers[layer.kind] for layer in chunk.layers]
    first_moe = next((at for at, block in enumerate(blocks) if block.is_moe), len(blocks) - 1)
    saved = []
    for block in [layers.first] * chunk.is_first + blocks[: first_moe + 1]:
        used_s = np.minimum(_waiting_until_counts_s(block, layers, cases), ahead_s)
        saved.append(used_s)
        ahead_s = ahead_s - used_s
    return tuple(saved)


def _waiting_until_counts_s(block: Block, layers: LayerCases, cases: IntArray) -> FloatArray:
    """Waiting of a block's forward pass that a lead can take away: in a MoE layer, that before counts are read."""
    phase = block.forward
    waiting_s = _at(phase.waiting_s, layers, cases)
    if not block.is_moe:
        return waiting_s
    before_s = wait_s(_at(phase.routed_host_s, layers, cases), _at(phase.routed_device_s, layers, cases))
    return np.minimum(waiting_s, before_s)


def _at(values: FloatArray | float, layers: LayerCases, cases: IntArray) -> FloatArray:
    return np.broadcast_to(values, layers.rows.shape)[cases]
