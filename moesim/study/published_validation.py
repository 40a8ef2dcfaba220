"""Published step times against predictions: every error, statistics by device and source, rows left out and why."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.describe.hardware import Device, Stack
from moesim.describe.hardware_library import HardwareLibrary
from moesim.errors import ScenarioError
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import load_document
from moesim.estimation.step_estimate import MemoryAnswer, StepEstimate
from moesim.study.interval_checks import IntervalCheck, RatioRow, interval_checks
from moesim.study.published_facts import PublishedRun, UnpredictableRunError, read_published_runs
from moesim.study.published_runs import recompute_variants, scenario_document

WORST_ROWS = 10
ERROR_COLUMNS = (
    "id",
    "role",
    "device",
    "source_group",
    "model",
    "tier",
    "use",
    "stack",
    "basis",
    "measured_s",
    "predicted_s",
    "error_fraction",
    "lower_s",
    "upper_s",
    "fits",
    "published_tflop_per_token",
    "model_tflop_per_token",
    "published_memory_gib",
    "predicted_memory_gib",
    "source",
)
NOTES_FILE = "worst_rows.md"
"""Reasons, written by hand, which the report carries."""
IN_STEP_RATE = "sustained_clock_fraction or gemm_compute_fraction"
FITTED_ROWS: tuple[tuple[str, str, str], ...] = (
    ("use", r"^control_dense$", IN_STEP_RATE),
    ("use", r"^overhead_control$", "launch.operation_time"),
    ("id", r"^smartmoe-pinky-.*gshard", "launch.expert_message_time"),
    ("id", r"^smartmoe-inky-.*-fastmoe-gshard(1\.2|2\.4)", "network of a cluster"),
)
"""Columns and patterns of the rows that a constant was fitted on, and the constant; all other rows judge it."""


@dataclass(frozen=True)
class RunError:
    """A published run beside its prediction.

    ``basis`` says which published figure the measured step time follows from; ``error_fraction`` is predicted over
    measured less one. ``role`` is ``fit`` where a constant of a profile was fitted on the run (``FITTED_ROWS``), else
    ``judge``. FLOPs per token and memory are compared where the source has
    them.
    """

    id: str
    role: str
    device: str
    source_group: str
    model: str
    tier: str
    use: str
    cluster: str
    stack: str
    stack_class: str
    basis: str
    measured_s: float
    predicted_s: float
    error_fraction: float
    lower_s: float
    upper_s: float
    fits: bool
    published_tflop_per_token: float | None
    model_tflop_per_token: float
    published_memory_gib: float | None
    predicted_memory_gib: float
    parameters_b: float
    published_parameters_b: float | None
    exposed_s: dict[str, float]
    hidden_s: dict[str, float]
    assumptions: dict[str, str]
    source: str

    @property
    def is_above_bounds(self) -> bool:
        """Whether the run took longer than everything modelled, one after the other: something is not modelled."""
        return self.measured_s > self.upper_s

    @property
    def is_below_bounds(self) -> bool:
        """Whether the run was faster than peak rates allow: a fact or an assumption is wrong."""
        return self.measured_s < self.lower_s


@dataclass(frozen=True)
class SkippedRun:
    """A run that was not predicted, with the field that is missing."""

    id: str
    device: str
    field: str
    why: str


@dataclass(frozen=True)
class ErrorStatistics:
    """Errors of a group of rows; ``bias_fraction`` is the geometric mean of predicted over measured, less one."""

    name: str
    rows: int
    sources: int
    median: float
    p90: float
    bias_fraction: float
    below_bounds: int
    above_bounds: int


@dataclass(frozen=True)
class PublishedReport:
    """All errors, worst first, the rows left out, and reasons written by hand."""

    errors: tuple[RunError, ...]
    skipped: tuple[SkippedRun, ...]
    notes: str = ""

    def worst(self, count: int = WORST_ROWS) -> tuple[RunError, ...]:
        """Rows of largest ratio between prediction and measurement, either way."""
        return self.errors[:count]

    def worst_of_groups(self, count: int = WORST_ROWS) -> list[RunError]:
        """The worst row of each source and model, the largest of them: rows of one group err alike."""
        first: dict[tuple[str, str], RunError] = {}
        for error in self.errors:
            first.setdefault((error.source_group, error.model), error)
        return list(first.values())[:count]

    def overall(self) -> ErrorStatistics:
        """Statistics of the rows that judge: no constant was fitted on them."""
        return error_statistics("judge", [error for error in self.errors if error.role == "judge"])

    def by(self, key: Callable[[RunError], str]) -> list[ErrorStatistics]:
        """Statistics of the rows that judge by group, in alphabetical order."""
        return _grouped([error for error in self.errors if error.role == "judge"], key)

    def by_role(self) -> list[ErrorStatistics]:
        """Statistics of the rows that a constant was fitted on, and of those that judge."""
        return _grouped(self.errors, lambda error: error.role)

    def intervals(self) -> list[IntervalCheck]:
        """Ranges of measured over predicted of the rows that judge, by class of stacks, judged on left-out groups."""
        rows = [
            RatioRow(error.measured_s / error.predicted_s, f"{error.source_group}: {error.model}", error.stack_class)
            for error in self.errors
            if error.role == "judge"
        ]
        return interval_checks(rows)

    def to_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {
            "schema_version": 1,
            "overall": asdict(self.overall()),
            "by_role": [asdict(group) for group in self.by_role()],
            "by_device": [asdict(group) for group in self.by(lambda error: error.device)],
            "by_source": [asdict(group) for group in self.by(lambda error: error.source_group)],
            "intervals": [asdict(check) for check in self.intervals()],
            "errors": [asdict(error) for error in self.errors],
            "skipped": [asdict(run) for run in self.skipped],
        }

    def to_markdown(self) -> str:
        """The report as a page: statistics, worst rows walked through, every error, rows left out."""
        return _page(self)

    def to_csv(self) -> str:
        """All errors, worst first, one row each."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(ERROR_COLUMNS)
        for error in self.errors:
            values = [getattr(error, name) for name in ERROR_COLUMNS]
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
        return stream.getvalue()


def _grouped(errors: Sequence[RunError], key: Callable[[RunError], str]) -> list[ErrorStatistics]:
    names = sorted({key(error) for error in errors})
    return [error_statistics(name, [error for error in errors if key(error) == name]) for name in names]


def error_statistics(name: str, errors: Sequence[RunError]) -> ErrorStatistics:
    """Median and 90th percentile of the absolute error, and bias, of some rows (at least one)."""
    absolute = np.abs([error.error_fraction for error in errors])
    logarithms = np.log([error.predicted_s / error.measured_s for error in errors])
    return ErrorStatistics(
        name=name,
        rows=len(errors),
        sources=len({(error.source_group, error.model) for error in errors}),
        median=float(np.median(absolute)),
        p90=float(np.quantile(absolute, 0.9)),
        bias_fraction=float(np.expm1(np.mean(logarithms))),
        below_bounds=sum(error.is_below_bounds for error in errors),
        above_bounds=sum(error.is_above_bounds for error in errors),
    )


def run_published_validation(data: Path, out: Path | None = None) -> PublishedReport:
    """Predict every published run that can be predicted.

    Parameters
    ----------
    data : Path
        A table of published runs, or a folder that holds one: ``validation/published`` of a checkout.
    out : Path or None
        Folder for ``report.md`` and ``errors.csv``; nothing is written if None.

    Returns
    -------
    PublishedReport
        Errors by falling size and the rows left out.

    Raises
    ------
    FormatError
        If there is no such table.
    """
    library = HardwareLibrary()
    errors: list[RunError] = []
    skipped: list[SkippedRun] = []
    for run in read_published_runs(data):
        try:
            errors.append(_predicted(run, library))
        except UnpredictableRunError as problem:
            skipped.append(SkippedRun(run.id, run.text("device"), problem.field, problem.why))
        except ScenarioError as problem:
            first = problem.problems[0]
            skipped.append(SkippedRun(run.id, run.text("device"), first.field or "scenario", first.message))
    errors.sort(key=lambda error: -abs(np.log(error.predicted_s / error.measured_s)))
    notes = data / NOTES_FILE
    written = notes.read_text(encoding="utf-8") if notes.exists() else ""
    report = PublishedReport(tuple(errors), tuple(skipped), written)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text(report.to_markdown(), encoding="utf-8")
        (out / "errors.csv").write_text(report.to_csv(), encoding="utf-8")
    return report


def _fitting_answer(run: PublishedRun, library: HardwareLibrary) -> StepEstimate:
    """Estimate of a run; where its source says nothing of recompute, with the least that fits, else with none."""
    first: StepEstimate | None = None
    for document in recompute_variants(scenario_document(run, library)):
        answer = estimate_loaded(load_document(document, library))
        first = first or answer
        if answer.fits:
            return answer
    assert first is not None
    return first


def _predicted(run: PublishedRun, library: HardwareLibrary) -> RunError:
    answer = _fitting_answer(run, library)
    measured_s, basis = measured_step_time_s(run, answer)
    tokens, flops = run.number("tokens_per_s_per_device"), run.number("tflops_per_device")
    step_s = run.number("step_time_s")
    if flops and not tokens and step_s:
        tokens = answer.tokens_per_step / step_s / run.count("n_devices")
    return RunError(
        id=run.id,
        role="fit" if _is_fitted_on(run, library.device(answer.device), library.stack(answer.stack)) else "judge",
        device=answer.device,
        source_group=run.text("source_group"),
        model=run.text("model"),
        tier=run.text("tier"),
        use=run.text("use"),
        cluster=answer.cluster,
        stack=answer.stack,
        stack_class=ratio.stack_class if (ratio := library.stack(answer.stack).step_ratio) else "none",
        basis=basis,
        measured_s=measured_s,
        predicted_s=answer.step_time_s,
        error_fraction=answer.step_time_s / measured_s - 1.0,
        lower_s=answer.lower_s,
        upper_s=answer.upper_s,
        fits=answer.fits,
        published_tflop_per_token=flops / tokens if flops and tokens else None,
        model_tflop_per_token=answer.model_flops_per_step / answer.tokens_per_step / 1e12,
        published_memory_gib=run.number("peak_mem_gib_per_device"),
        predicted_memory_gib=allocated_bytes(answer.memory) / 2**30,
        parameters_b=answer.parameters.total / 1e9,
        published_parameters_b=run.number("total_params_b"),
        exposed_s=answer.exposed_s,
        hidden_s=answer.hidden_s,
        assumptions=dict(answer.assumptions),
        source=run.text("source"),
    )


def _is_fitted_on(run: PublishedRun, device: Device, stack: Stack) -> bool:
    """Whether a constant was fitted on this row; dense runs whose rate in a step was not fitted on them judge."""
    constants = [constant for column, pattern, constant in FITTED_ROWS if re.search(pattern, run.text(column))]
    if constants == [IN_STEP_RATE]:
        figures = (device.sustained_clock_fraction, stack.gemm_compute_fraction)
        return any(figure.kind == "fitted" for figure in figures) and "deepspeed" not in run.software
    return bool(constants)


def allocated_bytes(memory: MemoryAnswer) -> float:
    """Bytes of tensors, as PyTorch's allocator counts its peak: without context, library buffers and fragmentation."""
    return float(memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.buffers)


def measured_step_time_s(run: PublishedRun, answer: StepEstimate) -> tuple[float, str]:
    """Measured step time and the published figure it follows from.

    Raises
    ------
    UnpredictableRunError
        If no published figure gives one.

    Notes
    -----
    In order: the step time; tokens per second and device over the step's tokens; examples per second over the step's
    sequences; FLOP/s over this model's own FLOP count, in the convention of the source. MFU alone is refused: its
    count of FLOPs is not published.
    """
    published = run.count("n_devices")
    if (step_s := run.number("step_time_s")) is not None:
        return step_s, "step time"
    if (tokens := run.number("tokens_per_s_per_device")) is not None:
        return answer.tokens_per_step / (tokens * published), "tokens per second"
    if run.text("other_metric_name").startswith("examples_per_s"):
        examples = run.number("other_metric_value") or np.nan
        return run.count("global_batch") / examples, "examples per second"
    if (teraflops := run.number("tflops_per_device")) is not None:
        return answer.model_flops_per_step / (teraflops * 1e12 * published), "FLOP/s"
    raise UnpredictableRunError("step_time_s", "no step time, throughput or FLOP/s; MFU alone does not say its FLOPs")


def _page(report: PublishedReport) -> str:
    sections = [
        "# Published runs, predicted\n",
        "Predicted as they are, nothing tuned to a row. Rows that a constant of a profile was fitted on are marked fit "
        "(dense runs: rate of a device in a step; tiny ones: host; some of FastMoE: exchange, a network); the rest "
        "judges. Error: predicted over measured step time, less one; median and "
        "90th percentile of its size; bias: geometric mean of predicted over measured, less one; below: runs faster "
        "than `lower_s`, so a fact or an assumption is wrong; above: runs slower than `upper_s`, so something is not "
        "modelled. Rows of one source and model share hardware, software and bias: a median over rows is one over few "
        "independent things. Routers of every kind are predicted with equal loads.\n",
        _statistics_table("By role: fitted on, and judged", report.by_role()),
        _statistics_table("By device, judged rows", report.by(lambda error: error.device)),
        _statistics_table("By source, judged rows", report.by(lambda error: error.source_group)),
        _statistics_table("By use, judged rows", report.by(lambda error: error.use)),
        _statistics_table("By stack, judged rows", report.by(lambda error: error.stack)),
        _statistics_table(
            "By source and model, judged rows", report.by(lambda error: f"{error.source_group}: {error.model}")
        ),
        _interval_table(report.intervals()),
        _memory_text(report.errors),
        "## The ten worst rows\n",
        *[walk_text(error) for error in report.worst()],
        "## The worst rows of the ten worst groups\n",
        *[walk_text(error) for error in report.worst_of_groups()],
        *([report.notes.rstrip() + "\n"] if report.notes else []),
        "## Every error, worst first\n",
        "| run | device | basis | measured s | predicted s | error | fits |",
        "| --- | --- | --- | --: | --: | --: | --- |",
        *[
            f"| {error.id} | {error.device} | {error.basis} | {error.measured_s:.4g} | {error.predicted_s:.4g} | "
            f"{error.error_fraction:+.1%} | {'yes' if error.fits else 'no'} |"
            for error in report.errors
        ],
        "\n## Rows left out\n",
        "| run | device | field | why |\n| --- | --- | --- | --- |",
        *[f"| {run.id} | {run.device} | {run.field} | {run.why} |" for run in report.skipped],
    ]
    return "\n".join(sections) + "\n"


def _statistics_table(title: str, groups: Sequence[ErrorStatistics]) -> str:
    lines = [
        f"## {title}\n",
        "| group | rows | sources × models | median | p90 | bias | below | above |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for group in groups:
        lines.append(
            f"| {group.name} | {group.rows} | {group.sources} | {group.median:.1%} | {group.p90:.1%} | "
            f"{group.bias_fraction:+.1%} | {group.below_bounds} | {group.above_bounds} |"
        )
    return "\n".join(lines) + "\n"


def _interval_table(checks: Sequence[IntervalCheck]) -> str:
    lines = [
        "## Intervals, judged on groups left out\n",
        "Measured over predicted, 5th to 95th percentile of the judged rows of a class of stacks, every source and "
        "model weighing the same (what stacks carry as `step_ratio`); coverage: share of the rows of a left-out source "
        "and model inside the range that the others make, mean over them.\n",
        "| class of stacks | sources × models | rows | low | high | coverage |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for check in checks:
        lines.append(
            f"| {check.stack_class} | {check.groups} | {check.rows} | {check.low:.2f} | {check.high:.2f} | "
            f"{check.coverage:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _memory_text(errors: Sequence[RunError]) -> str:
    """Allocated bytes predicted over published, and how many runs that ran are said not to fit."""
    ratios = [error.predicted_memory_gib / error.published_memory_gib for error in errors if error.published_memory_gib]
    short = sum(not error.fits for error in errors)
    low, middle, high = np.quantile(ratios or [np.nan], [0.1, 0.5, 0.9])
    return (
        "## Memory\n\n"
        f"Predicted peak of tensors over the published peak of the allocator, {len(ratios)} runs: median {middle:.2f}, "
        f"10th to 90th percentile {low:.2f} to {high:.2f}. Of {len(errors)} runs, all of which ran, {short} are said "
        "not to fit.\n"
    )


def walk_text(error: RunError) -> str:
    """One row from parameters to step, in numbers."""
    parts = sorted(error.exposed_s.items(), key=lambda item: -item[1])
    exposed = ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts if seconds > 0.01 * error.predicted_s)
    hidden = ", ".join(f"{name} {seconds:.3g}" for name, seconds in error.hidden_s.items() if seconds > 0)
    published = f" (published {error.published_parameters_b:g})" if error.published_parameters_b else ""
    flops = f" (published {error.published_tflop_per_token:.4g})" if error.published_tflop_per_token else ""
    memory = f" (published {error.published_memory_gib:.3g})" if error.published_memory_gib else ""
    return (
        f"**{error.id}** ({error.stack}): measured {error.measured_s:.4g} s, predicted {error.predicted_s:.4g} s, "
        f"{error.error_fraction:+.0%}.\n"
        f"Parameters {error.parameters_b:.4g} B{published}; TFLOP per token {error.model_tflop_per_token:.4g}{flops}; "
        f"peak memory {error.predicted_memory_gib:.3g} GiB{memory}. Exposed seconds: {exposed}. "
        f"Hidden: {hidden or 'none'}. Bounds {error.lower_s:.3g} to {error.upper_s:.3g} s.\n"
    )
