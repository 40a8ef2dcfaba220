"""Bytes that drawn loads add to activations and buffers of each rank, or spare it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.structure.columns import RECOMPUTE_CODES, FloatArray
from moesim.structure.layers import LayerKind, LayerSequence
from moesim.structure.lowering import LoweringContext
from moesim.structure.memory_footprint import LayerActivations, dispatch_buffer_bytes, layer_activations
from moesim.structure.parameters import mtp_layer_kind


@dataclass(frozen=True)
class LoadedBytes:
    """Bytes of a rank's activations and buffers beyond those at mean load, arrays (n_draws, n_ranks)."""

    activations: FloatArray
    buffers: FloatArray

    @property
    def total(self) -> FloatArray:
        """Both together; buffers peak whenever activations do, as in the memory model."""
        return np.asarray(self.activations + self.buffers)


@dataclass(frozen=True)
class _RowBytes:
    """Bytes of one layer kind per unit of load: what is kept, what a layer being rebuilt holds, its buffers."""

    kept: float
    everything: float
    buffers: float
    everything_at_mean: float
    buffers_at_mean: float


def loaded_bytes(
    context: LoweringContext,
    sequence: LayerSequence,
    layers: Sequence[tuple[int, FloatArray]],
    in_flight: float,
    modules_in_flight: float = 1.0,
) -> LoadedBytes:
    """Bytes that the loads of the layers of one stage add on each of its ranks.

    Parameters
    ----------
    context : LoweringContext
        One case.
    sequence : LayerSequence
        Layers of the model.
    layers : sequence of tuple of int and ndarray of shape (n_draws, n_ranks)
        Layers of the stage by number, those from ``len(sequence.order)`` on are modules of token prediction; and the
        rows of a rank's experts over their mean. A load holds over the step, so all its micro-batches have it.
    in_flight : float
        Micro-batches whose activations the stage holds at its peak, see ``pipeline_schedules``.
    modules_in_flight : float
        Micro-batches whose modules of token prediction it holds: those of its losses.

    Returns
    -------
    LoadedBytes
        Zero where every factor is 1.

    Notes
    -----
    All bytes of ``memory_footprint`` are affine in the rows, so the slope between loads 1 and 2 is exact. Kept
    activations of all layers add up; a stage that recomputes everything rebuilds one layer at a time, and layers take
    turns with the buffers of the exchange: there the largest counts.
    """
    kinds = [_kind_of(sequence, number) for number, _ in layers]
    per_kind = {kind: _row_bytes(context, kind) for kind in dict.fromkeys(kinds)}
    count = len(sequence.order)
    kept: FloatArray = np.zeros((1, 1))
    everything, buffers = [], []
    for (number, factor), kind in zip(layers, kinds, strict=True):
        slope = per_kind[kind]
        held = in_flight if number < count else modules_in_flight
        kept = kept + held * slope.kept * (factor - 1.0)
        everything.append(slope.everything_at_mean + slope.everything * (factor - 1.0))
        buffers.append(slope.buffers_at_mean + slope.buffers * (factor - 1.0))
    if not layers:
        return LoadedBytes(kept, kept)
    rebuilt = _largest(everything) - max(slope.everything_at_mean for slope in per_kind.values())
    is_rebuilt = not context.is_training or bool(context.columns["recompute"][0] == RECOMPUTE_CODES["full"])
    exchanged = _largest(buffers) - max(slope.buffers_at_mean for slope in per_kind.values())
    activations = (kept if context.is_training else 0.0) + rebuilt * is_rebuilt
    return LoadedBytes(*np.broadcast_arrays(activations, exchanged))


def loaded_peaks(
    context: LoweringContext,
    sequence: LayerSequence,
    chunks: Sequence[Sequence[tuple[int, FloatArray]]],
    moments: FloatArray,
    at_mean: tuple[FloatArray, float],
) -> FloatArray:
    """Most bytes of kept activations and losses that a stage's ranks hold at once, and what loads add to the rest.

    Parameters
    ----------
    context : LoweringContext
        One case.
    sequence : LayerSequence
        Layers of the model.
    chunks : sequence of sequence of tuple of int and ndarray of shape (n_draws, n_ranks)
        Of each chunk of the stage the layers that ``loaded_bytes`` takes.
    moments : ndarray of shape (n_moments, n_chunks + 1)
        Micro-batches of each chunk, and losses, held at once: ``activations_in_flight.held_at_once``.
    at_mean : tuple of ndarray of shape (n_chunks,) and float
        Bytes of one micro-batch on each chunk, and of a loss, at mean load.

    Returns
    -------
    ndarray of shape (n_draws, n_ranks)
        Bytes; at mean load those of the largest moment.
    """
    rest = loaded_bytes(context, sequence, [layer for layers in chunks for layer in layers], 0.0, 0.0)
    held: list[FloatArray] = []
    loss: FloatArray = np.full((1, 1), at_mean[1])
    for layers, kept in zip(chunks, at_mean[0], strict=True):
        rebuilt = loaded_bytes(context, sequence, layers, 0.0, 0.0).activations
        held.append(kept + loaded_bytes(context, sequence, layers, 1.0, 0.0).activations - rebuilt)
        if any(number >= len(sequence.order) for number, _ in layers):
            loss = loss + loaded_bytes(context, sequence, layers, 0.0, 1.0).activations - rebuilt
    parts = np.stack(np.broadcast_arrays(*held, loss))
    return np.asarray(np.tensordot(moments, parts, axes=1).max(axis=0) + rest.total)


def _largest(values: Sequence[FloatArray]) -> FloatArray:
    largest = values[0]
    for value in values[1:]:
        largest = np.maximum(largest, value)
    return largest


def _kind_of(sequence: LayerSequence, number: int) -> LayerKind:
    return sequence.kinds[sequence.order[number]] if number < len(sequence.order) else mtp_layer_kind(sequence)


def _row_bytes(context: LoweringContext, kind: LayerKind) -> _RowBytes:
    """What one layer's bytes grow by from load 1 to load 2."""
    recompute = context.columns["recompute"]

    def at(load: float) -> tuple[LayerActivations, float]:
        def factor(degrees: FloatArray) -> FloatArray:
            return np.full(degrees.shape, load)

        buffers = float(dispatch_buffer_bytes(context, kind, factor)[0]) if kind.is_moe else 0.0
        return layer_activations(context, kind, factor), buffers

    (mean, mean_buffers), (twice, twice_buffers) = at(1.0), at(2.0)
    return _RowBytes(
        kept=float((twice.kept(recompute) - mean.kept(recompute))[0]),
        everything=float((twice.everything - mean.everything)[0]),
        buffers=twice_buffers - mean_buffers,
        everything_at_mean=float(mean.everything[0]),
        buffers_at_mean=mean_buffers,
    )
