"""Predict each measured device from the others: the error that devices without tables carry."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.cost.attention_surface import attention_surface_from_document, attention_time_s
from moesim.cost.moe_surface import moe_surface_from_document, moe_time_s
from moesim.cost.surface_transfer import (
    Anchors,
    SurfaceOrigin,
    TransferRules,
    carried_attention_surface,
    carried_gemm_surface,
    carried_moe_surface,
    kernel_machine,
    lender,
    nearest_lender,
    portable_core,
    transfer_rules,
)
from moesim.describe.hardware import Device
from moesim.describe.hardware_library import HardwareLibrary
from moesim.structure.columns import FloatArray
from moesim.study.fit_attention import attention_shapes
from moesim.study.fit_gemm import gemm_table
from moesim.study.fit_moe import (
    REMAINDERS,
    is_judged,
    is_slower_than_harder_rows,
    is_slower_than_scaled_rows,
    moe_rows,
    select_moe_rows,
)
from moesim.study.kernel_tables import (
    ATTENTION_COLUMNS,
    GEMM_COLUMNS,
    MOE_COLUMNS,
    BoolArray,
    ErrorStatistics,
    coverage,
    error_statistics,
    half_widths_of_bins,
    kernel_table_paths,
    log_bin_edges,
    read_kernel_table,
)

LEVEL = 0.9
INTERVAL_BINS = 6
ROWS_PER_TARGET = 4000
"""Rows of each target that count for an interval, drawn at random: every device weighs the same."""
TABLES = {"gemm": "gemm", "attention": "attention_prefill", "moe": "moe"}
Carrier = Callable[[Device, Device, Anchors], FloatArray]


@dataclass(frozen=True)
class MeasuredRows:
    """A target's measured times, which rows are of training size, and what predicts them from another device."""

    time_s: FloatArray
    is_training: BoolArray
    carry: Carrier


@dataclass(frozen=True)
class TransferResult:
    """A target predicted from a source: seconds by datasheet alone, and with the published rate if there is one."""

    operator: str
    target: str
    source: str
    relation: str
    is_rule: bool
    rows: MeasuredRows
    datasheet_s: FloatArray
    anchored_s: FloatArray | None

    @property
    def best_s(self) -> FloatArray:
        """What a profile with that knowledge predicts."""
        return self.datasheet_s if self.anchored_s is None else self.anchored_s

    @property
    def log_errors(self) -> FloatArray:
        """Values of log(measured / predicted)."""
        return np.asarray(np.log(self.rows.time_s / self.best_s))


def judge_transfers(
    data: Path, operator: str, library: HardwareLibrary, rates: Mapping[str, float]
) -> list[TransferResult]:
    """Predict every table of an operator from surfaces of other devices.

    Parameters
    ----------
    data : Path
        Folder of the tables.
    operator : str
        ``gemm``, ``attention`` or ``moe``.
    library : HardwareLibrary
        Devices and their surfaces; a surface was fitted on its own device's table alone.
    rates : mapping
        Published fraction of the peak that the largest GEMMs reach, by device.

    Returns
    -------
    list of TransferResult
        For each device the source the rule picks; and, where that is of the same generation, the one it would pick if
        the generation had no other table.
    """
    rules = transfer_rules(library.transfer_document())
    known = library.surface_devices(operator)
    paths = {name: path for name, path in kernel_table_paths(data, TABLES[operator]).items() if name in known}
    results = []
    for name, path in paths.items():
        target, rows = library.device(name), _measured_rows(operator, path, name, library)
        anchor = Anchors(compute_fraction=rates[name]) if name in rates and operator != "attention" else None
        for position, source in enumerate(_sources(target, known, library, rules)):
            results.append(
                TransferResult(
                    operator=operator,
                    target=name,
                    source=source.id,
                    relation=SurfaceOrigin(source.id, False, source.generation == target.generation).relation,
                    is_rule=position == 0,
                    rows=rows,
                    datasheet_s=rows.carry(source, target, Anchors()),
                    anchored_s=rows.carry(source, target, anchor) if anchor else None,
                )
            )
    return results


def _sources(target: Device, known: Sequence[str], library: HardwareLibrary, rules: TransferRules) -> list[Device]:
    others = {name: library.device(name) for name in known if name != target.id}
    lenders = [lender(one) for one in others.values()]
    elsewhere = [one for one in lenders if one.generation != target.generation]
    found = [nearest_lender(lender(target), some, rules).device for some in (lenders, elsewhere) if some]
    return [others[name] for name in dict.fromkeys(found)]


def _measured_rows(operator: str, path: Path, name: str, library: HardwareLibrary) -> MeasuredRows:
    readers: dict[str, Callable[[Path, str, HardwareLibrary], MeasuredRows]] = {
        "gemm": _gemm_rows,
        "attention": _attention_rows,
        "moe": _moe_rows,
    }
    return readers[operator](path, name, library)


def _surface(library: HardwareLibrary, operator: str, device: str) -> dict[str, Any]:
    document = library.surface(operator, device)
    assert document is not None
    return document


def _gemm_rows(path: Path, name: str, library: HardwareLibrary) -> MeasuredRows:
    table = gemm_table(read_kernel_table(path, GEMM_COLUMNS))

    def carry(source: Device, target: Device, anchors: Anchors) -> FloatArray:
        is_same = source.generation == target.generation
        document = _surface(library, "gemm", source.id)
        surface = carried_gemm_surface(document, kernel_machine(target), anchors, is_same_generation=is_same)
        return surface.time_s(table.m, table.n, table.k)

    is_training = np.minimum(np.minimum(table.m, table.n), table.k) >= 512
    return MeasuredRows(table.time_s, is_training, carry)


def _attention_rows(path: Path, name: str, library: HardwareLibrary) -> MeasuredRows:
    table = read_kernel_table(path, ATTENTION_COLUMNS)
    shapes = attention_shapes(table)

    def carry(source: Device, target: Device, anchors: Anchors) -> FloatArray:
        surface = attention_surface_from_document(_surface(library, "attention", source.id))  # type: ignore[arg-type]
        carried = carried_attention_surface(surface, kernel_machine(source), kernel_machine(target), anchors)
        return attention_time_s(carried, shapes)

    return MeasuredRows(table["time_us"] * 1e-6, shapes.flops >= 1e9, carry)


def _moe_rows(path: Path, name: str, library: HardwareLibrary) -> MeasuredRows:
    table = moe_rows(read_kernel_table(path, MOE_COLUMNS), remainder=REMAINDERS.get(name, "idle_experts"))
    kept = is_judged(table) & ~is_slower_than_harder_rows(table) & ~is_slower_than_scaled_rows(table)
    rows = select_moe_rows(table, kept)

    def carry(source: Device, target: Device, anchors: Anchors) -> FloatArray:
        surface = moe_surface_from_document(_surface(library, "moe", source.id))  # type: ignore[arg-type]
        core = portable_core(_surface(library, "gemm", source.id))
        machines = (kernel_machine(source), kernel_machine(target))
        carried = carried_moe_surface(surface, *machines, anchors=anchors, core=core)
        return moe_time_s(carried, rows.shapes, rows.load)

    is_training = rows.load.slots > 64 * rows.load.active_experts
    return MeasuredRows(rows.time_s, is_training, carry)


@dataclass(frozen=True)
class TransferInterval:
    """Half widths of the interval by predicted time, and what share of each target's rows the others' would cover."""

    edges_s: FloatArray
    half_widths: FloatArray
    coverages: Mapping[str, float]


def transfer_interval(results: Sequence[TransferResult]) -> TransferInterval:
    """Interval of transfers of one operator and relation, every target weighing the same.

    Parameters
    ----------
    results : sequence of TransferResult
        One per target.

    Returns
    -------
    TransferInterval
        Calibrated on all targets; ``coverages`` of each by the interval of the others.
    """
    coverages = {}
    for left_out in results:
        others = [one for one in results if one.target != left_out.target]
        if others:
            edges, widths = _half_widths(others)
            bins = np.searchsorted(edges, left_out.best_s, side="right")
            coverages[left_out.target] = coverage(left_out.log_errors, widths[bins])
    return TransferInterval(*_half_widths(results), coverages)


def _half_widths(results: Sequence[TransferResult]) -> tuple[FloatArray, FloatArray]:
    generator = np.random.default_rng(0)
    picks = [generator.permutation(one.best_s.size)[:ROWS_PER_TARGET] for one in results]
    sizes = np.concatenate([one.best_s[pick] for one, pick in zip(results, picks, strict=True)])
    errors = np.concatenate([one.log_errors[pick] for one, pick in zip(results, picks, strict=True)])
    edges = log_bin_edges(sizes, INTERVAL_BINS)
    return edges, half_widths_of_bins(errors, sizes, edges, level=LEVEL)


def transfer_intervals(results: Sequence[TransferResult]) -> dict[str, TransferInterval]:
    """Interval of each relation there are results for."""
    relations = dict.fromkeys(one.relation for one in results)
    return {name: transfer_interval([one for one in results if one.relation == name]) for name in relations}


def transfer_report(results: Mapping[str, Sequence[TransferResult]]) -> str:
    """Markdown page of transfers, by operator.

    Parameters
    ----------
    results : mapping
        What :func:`judge_transfers` returned, by operator.

    Returns
    -------
    str
        The page.
    """
    lines = [
        "# Each measured device predicted from the others",
        "",
        "What a device without tables has to expect. The source is of the target's own generation where one is",
        "measured, else of the nearest generation that lends (ampere, hopper, blackwell; of two as near the older);",
        "among several the one nearest in FLOPs per byte. Rows marked `as if` show the second case for devices of",
        "measured generations. No row of the target was used: `datasheet` takes its figures only, `published` also the",
        "fraction of the peak that its largest GEMMs are known to reach (MAMF). Within a generation the whole formula",
        "travels, between generations the one without L2 traffic and cached operands; residual grids only where peak,",
        "bandwidth and units agree, as in no pair here. Median / 90th percentile of |predicted / measured - 1| and",
        "bias; `training`: m, n, k >= 512 (GEMM), at least 1 GFLOP (attention), more than 64 tokens per expert (MoE).",
        "`covered`: share of rows inside the 90 % interval that the other targets of the same relation give.",
    ]
    for operator, found in results.items():
        intervals = transfer_intervals(found)
        lines += ["", f"## {operator}", ""]
        lines += ["| target | source | relation | datasheet | training | published | training | covered |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | ---: |"]
        lines += [_report_line(one, intervals[one.relation]) for one in found]
        for relation, interval in intervals.items():
            widths = ", ".join(f"{width:.2f}" for width in interval.half_widths)
            edges = ", ".join(f"{edge * 1e6:.3g}" for edge in interval.edges_s)
            lines += ["", f"Carried, {relation}: half widths of log(measured / predicted) {widths}; edges {edges} us."]
    return "\n".join([*lines, ""])


def _report_line(one: TransferResult, interval: TransferInterval) -> str:
    training = one.rows.is_training
    cells = [one.target, one.source, one.relation if one.is_rule else f"as if {one.relation}"]
    for predicted_s in (one.datasheet_s, one.anchored_s):
        if predicted_s is None:
            cells += ["-", "-"]
        else:
            cells.append(_errors(error_statistics(predicted_s, one.rows.time_s)))
            cells.append(_errors(error_statistics(predicted_s[training], one.rows.time_s[training])))
    covered = interval.coverages.get(one.target)
    return f"| {' | '.join([*cells, '-' if covered is None else f'{covered:.0%}'])} |"


def _errors(found: ErrorStatistics) -> str:
    return f"{100 * found.median:.1f} / {100 * found.p90:.1f} % ({found.bias:+.0%})" if found.count else "-"


def measured_facts(library: HardwareLibrary) -> dict[str, dict[str, str | float]]:
    """What choosing a source looks at in each device that has a surface, by device."""
    names = sorted({name for operator in TABLES for name in library.surface_devices(operator)})
    found = [lender(library.device(name)) for name in names]
    return {
        one.device: {"generation": one.generation, "flops_per_byte": float(f"{one.flops_per_byte:.6g}")}
        for one in found
    }


def transfer_data(
    document: Mapping[str, Any],
    results: Mapping[str, Sequence[TransferResult]],
    measured: Mapping[str, Mapping[str, str | float]],
) -> dict[str, Any]:
    """Rules with the intervals and errors of new results; what is not judged anew stays.

    Parameters
    ----------
    document : mapping
        The rules as they are.
    results : mapping
        What :func:`judge_transfers` returned, by operator.
    measured : mapping
        What :func:`measured_facts` returned.

    Returns
    -------
    dict
        JSON object of ``surfaces/transfer.json``.
    """
    intervals, errors = dict(document.get("intervals", {})), dict(document.get("errors", {}))
    for operator, found in results.items():
        intervals[operator] = {
            relation: {
                "level": LEVEL,
                "edges_s": [float(f"{edge:.4g}") for edge in interval.edges_s],
                "half_widths": [float(f"{width:.4g}") for width in interval.half_widths],
            }
            for relation, interval in transfer_intervals(found).items()
        }
        errors[operator] = [
            {"target": one.target, "source": one.source, "relation": one.relation, "published_rate": kind}
            | {name: round(value, 4) for name, value in asdict(error_statistics(times_s, one.rows.time_s)).items()}
            for one in found
            for kind, times_s in ((False, one.datasheet_s), (True, one.anchored_s))
            if times_s is not None
        ]
    facts = {name: dict(one) for name, one in measured.items()}
    return {**document, "measured": facts, "intervals": intervals, "errors": errors}


def write_transfer_validation(
    data: Path, operators: Sequence[str], *, reports: Path, surfaces: Path | None = None
) -> None:
    """Judge transfers of some operators; write ``transfer.md``, and ``transfer.json`` beside the surfaces.

    Parameters
    ----------
    data : Path
        Folder of the tables.
    operators : sequence of str
        Operators that have tables there.
    reports : Path
        Folder of the report.
    surfaces : Path, optional
        Folder of the surfaces; nothing is written there without it.
    """
    library = HardwareLibrary()
    document = library.transfer_document()
    rates = {name: figure["value"] for name, figure in document["published_gemm_fraction"].items()}
    results = {operator: judge_transfers(data, operator, library, rates) for operator in operators}
    results = {operator: found for operator, found in results.items() if found}
    reports.mkdir(parents=True, exist_ok=True)
    (reports / "transfer.md").write_text(transfer_report(results), encoding="utf-8")
    if surfaces is not None:
        text = json.dumps(transfer_data(document, results, measured_facts(library)), indent=1)
        (surfaces / "transfer.json").write_text(text + "\n", encoding="utf-8")
