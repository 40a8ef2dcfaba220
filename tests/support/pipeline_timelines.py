"""Timelines of whole steps built without the event-driven engine: one operation per pass, from the unrolled program."""

from __future__ import annotations

import numpy as np

from moesim.engine.max_plus import program_finish_s
from moesim.engine.timelines import STREAMS, Messages, Timeline
from moesim.structure.columns import FloatArray
from moesim.structure.pipeline_schedules import build_program
from moesim.structure.step_graph import CATEGORIES

EXCHANGE = 0.25
"""Share of each pass that also runs on the all-to-all stream."""
MESSAGE_BYTES = 4096.0


def pipeline_timeline(
    schedule: str,
    virtual_stages: int,
    micro_batches: int,
    forward_s: FloatArray,
    backward_s: FloatArray,
    hop_s: float,
    weight_gradient_s: FloatArray | None = None,
) -> Timeline:
    """One rank per stage; a pass is one operation of compute and an exchange beside its beginning.

    ``forward_s`` and the others (chunks,) in model order. A forward and a backward that run as one (DualPipe) both last
    as long as the pair.
    """
    stages = len(forward_s) // virtual_stages
    program = build_program(schedule, stages, virtual_stages, micro_batches)
    columns = [values[:, None] for values in (forward_s, backward_s)]
    weights = None if weight_gradient_s is None else weight_gradient_s[:, None]
    ends = program_finish_s(program, *columns, np.array([hop_s]), weights)[:, 0]
    nodes = np.flatnonzero(program.stage >= 0)
    row, partner = program.duration_row[nodes], program.partner[nodes]
    table = [forward_s, backward_s]
    if weight_gradient_s is not None:
        table += [backward_s - weight_gradient_s, weight_gradient_s]
    seconds = np.concatenate(table)[row]
    is_paired = partner < len(program.needs)
    seconds[is_paired] += np.concatenate(table)[program.duration_row[partner[is_paired]]]
    phase, chunk = np.array([0, 1, 1, 2])[row // program.placement.chunks], row % program.placement.chunks
    finish, rank, micro_batch = ends[nodes], program.stage[nodes], nodes % micro_batches
    start = finish - seconds
    received, needed = nodes[program.hops[nodes] > 0], program.needs[nodes[program.hops[nodes] > 0]]
    messages = Messages(
        program.stage[needed],
        ends[needed],
        program.stage[received],
        ends[needed] + hop_s,
        np.full(len(received), MESSAGE_BYTES),
    )
    both = [np.concatenate([values, values]) for values in (rank, chunk, micro_batch, phase)]
    on_compute = np.repeat([True, False], len(nodes))
    return Timeline(
        rank=both[0].astype(np.int64),
        stream=np.where(on_compute, STREAMS.index("compute"), STREAMS.index("all_to_all")).astype(np.int8),
        name=np.where(on_compute, both[3], 2).astype(np.int32),
        category=np.where(on_compute, CATEGORIES.index("expert_gemm"), CATEGORIES.index("all_to_all")).astype(np.int8),
        start_s=np.concatenate([start, start]),
        end_s=np.concatenate([finish, start + EXCHANGE * seconds]),
        layer=np.where(on_compute, -1, 0).astype(np.int32),
        micro_batch=both[2].astype(np.int32),
        chunk=both[1].astype(np.int32),
        phase=both[3].astype(np.int8),
        num_bytes=np.where(on_compute, 0.0, 1e6),
        names=('pass "forward"', "pass µ backward", "all_to_all.dispatch"),
        messages=messages,
    ).sorted()
