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
    schedule: str, virtual_stages: int, micro_batches: int, forward_s: FloatArray, backward_s: FloatArray, hop_s: float
) -> Timeline:
    """One rank per stage; a pass is one operation of compute and an exchange beside its beginning.

    ``forward_s`` and ``backward_s`` (chunks,) in model order.
    """
    stages = len(forward_s) // virtual_stages
    program = build_program(schedule, stages, virtual_stages, micro_batches)
    finish = program_finish_s(program, forward_s[:, None], backward_s[:, None], np.array([hop_s]))[:-1, 0]
    nodes = np.arange(len(finish))
    phase, chunk = np.divmod(program.duration_row, stages * virtual_stages)
    seconds = np.concatenate([forward_s, backward_s])[program.duration_row]
    start, rank, micro_batch = finish - seconds, chunk % stages, nodes % micro_batches
    both = [np.concatenate([values, values]) for values in (rank, chunk, micro_batch, phase)]
    on_compute = np.repeat([True, False], len(nodes))
    received = np.flatnonzero(program.hops > 0)
    messages = Messages(
        rank[program.needs[received]],
        finish[program.needs[received]],
        rank[received],
        finish[program.needs[received]] + hop_s,
        np.full(len(received), MESSAGE_BYTES),
    )
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
