"""Formulas in words, with an operation's numbers put in; the substituted text evaluates to the modelled seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.cost.collectives import collective_time
from moesim.cost.efficiency_surfaces import OVERLAP_EXPONENT, ROW_GRANULARITY
from moesim.cost.operators import Hardware
from moesim.structure.step_graph import AttentionCore, Collective, Gemm, MemoryTraffic, Operation

GEMM_FORMULA = (
    "t0 + (compute^p + memory^p)^(1/p); compute = max(2 groups rows columns / (peak fraction), smallest tile) "
    "(inner + prologue), memory = bytes / (bandwidth fraction)"
)
ATTENTION_FORMULA = (
    "t0 kernels + (compute^p + memory^p)^(1/p); compute = 2 pairs heads width visible / (peak fraction), "
    "memory = bytes / (bandwidth fraction)"
)
TRAFFIC_FORMULA = "t0 kernels + bytes / (bandwidth fraction)"
COLLECTIVE_FORMULAS = {
    "all_to_all": "L + t + c sqrt(L t), faster protocol; L = base and peer latencies of the levels crossed, "
    "t = max over levels of bytes across it / (fraction bandwidth)",
    "all_reduce": "L + t + c sqrt(L t) of ring, tree or switch, quick or bulk protocol; "
    "ring: 2 (n - 1) rounds, t = 2 (n - 1)/n bytes / (fraction bandwidth)",
    "all_gather": "L + t + c sqrt(L t), quick or bulk protocol; "
    "n - 1 rounds, t = (n - 1)/n bytes / (fraction bandwidth)",
    "reduce_scatter": "L + t + c sqrt(L t), quick or bulk protocol; "
    "n - 1 rounds, t = (n - 1)/n bytes / (fraction bandwidth)",
    "broadcast": "L + t + c sqrt(L t); ceil(log2 e) rounds per level, bytes / (fraction bandwidth) in each",
    "point_to_point": "L + t + c sqrt(L t) of the slowest level crossed",
}


@dataclass(frozen=True)
class Explanation:
    """A formula in words and with numbers; ``substituted`` is arithmetic that gives the seconds."""

    formula: str
    substituted: str


def explain_operation(operation: Operation, hardware: Hardware) -> Explanation:
    """Explain the first case of an operation at mean load."""
    match operation.work:
        case Gemm() as work:
            return _gemm(work, hardware)
        case AttentionCore() as work:
            return _attention(work, hardware, operation.kernels)
        case MemoryTraffic() as work:
            return _traffic(work, hardware, operation.kernels)
        case Collective() as work:
            return _collective(work, hardware)


def _norm(fixed: str, compute: str, memory: str) -> str:
    p = OVERLAP_EXPONENT
    return f"{fixed} + (({compute})**{p} + ({memory})**{p})**(1/{p})"


def _gemm(work: Gemm, hardware: Hardware) -> Explanation:
    rates = hardware.device
    rows, columns, inner, groups = (float(np.ravel(x)[0]) for x in (work.rows, work.columns, work.inner, work.groups))
    padded = float(np.ceil(rows / ROW_GRANULARITY - 1e-9) * ROW_GRANULARITY) if groups > 1 else rows
    peak = f"({rates.peak_for(work.precision):.12g} * {rates.gemm_fraction:.12g})"
    output = work.output_bytes * (2 if work.accumulates else 1)
    num_bytes = (
        f"{groups:.12g} * (({rows:.12g} + {columns:.12g}) * {inner:.12g} * {work.input_bytes:g}"
        f" + {rows:.12g} * {columns:.12g} * {output:g})"
    )
    rate = f"2 * {groups:.12g} * {padded:.12g} * {columns:.12g} / {peak}"
    compute = f"max({rate}, {rates.smallest_tile_s:.12g}) * ({inner:.12g} + {rates.prologue_length:g})"
    memory = f"{num_bytes} / ({rates.memory_bandwidth:.12g} * {rates.gemm_memory_fraction:.12g})"
    return Explanation(GEMM_FORMULA, _norm(f"{rates.gemm_fixed_s:.12g}", compute, memory))


def _attention(work: AttentionCore, hardware: Hardware, kernels: int) -> Explanation:
    rates = hardware.device
    pairs, heads, elements = (float(np.ravel(x)[0]) for x in (work.pairs, work.heads, work.io_elements))
    flops = f"2 * {pairs:.12g} * {heads:.12g} * {work.matmul_width:.12g} * {work.visible_fraction:g}"
    compute = f"{flops} / ({rates.peak_for(work.precision):.12g} * {rates.attention_fraction:.12g})"
    memory = (
        f"{elements:.12g} * {work.element_bytes:g} / ({rates.memory_bandwidth:.12g} * {rates.traffic_fraction:.12g})"
    )
    return Explanation(ATTENTION_FORMULA, _norm(f"{rates.gemm_fixed_s:.12g} * {kernels}", compute, memory))


def _traffic(work: MemoryTraffic, hardware: Hardware, kernels: int) -> Explanation:
    rates = hardware.device
    num_bytes = float(np.ravel(work.num_bytes)[0])
    wire = f"{num_bytes:.12g} / ({rates.memory_bandwidth:.12g} * {rates.traffic_fraction:.12g})"
    return Explanation(TRAFFIC_FORMULA, f"{kernels} * {rates.traffic_fixed_s:.12g} + {wire}")


def _collective(work: Collective, hardware: Hardware) -> Explanation:
    """Latency is what an empty message takes; the rest is wire time and what chunks cost, as an effective rate."""
    first = Collective(work.kind, work.num_bytes[:1], work.group, work.copies)
    tiny = Collective(work.kind, work.num_bytes[:1] * 0 + 1e-9, work.group, work.copies)
    whole = float(np.ravel(collective_time(first, hardware.fabric).modelled_s)[0])
    latency = float(np.ravel(collective_time(tiny, hardware.fabric).modelled_s)[0])
    num_bytes, size = float(np.ravel(work.num_bytes)[0]), float(np.ravel(work.group.size)[0])
    if whole <= 0:
        return Explanation(COLLECTIVE_FORMULAS[work.kind], "0")
    rate = num_bytes / max(whole - latency, 1e-30)
    words = f"{COLLECTIVE_FORMULAS[work.kind]} [{size:g} ranks, {num_bytes:.6g} bytes]"
    return Explanation(words, f"{latency:.12g} + {num_bytes:.12g} / {rate:.12g}")
