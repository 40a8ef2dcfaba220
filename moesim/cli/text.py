"""What a person reads: estimates side by side, explanations, hardware, sweeps. The only home of rich."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from moesim.structure.step_graph import CATEGORIES
from moesim.units import format_quantity

if TYPE_CHECKING:
    from moesim.describe.hardware import Cluster, Device, Stack
    from moesim.describe.hardware_library import HardwareLibrary
    from moesim.estimation.loading import LoadedScenario
    from moesim.estimation.step_estimate import StepEstimate
    from moesim.structure.topology_metrics import TopologySummary
    from moesim.study.schedule_comparison import ScheduleComparison
    from moesim.study.sweep import SweepSummary

MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "other")
MINIMUM_WIDTH = 100
KINDS = ("datasheet", "fitted", "transferred", "extrapolated", "assumed")

Fact = tuple[str, Callable[["StepEstimate"], str]]


def _console() -> Console:
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, MINIMUM_WIDTH)
    return console


def seconds(value: float) -> str:
    """Seconds with a fitting prefix."""
    return format_quantity(value, "seconds")


def _table(title: str, headers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for position, header in enumerate(headers):
        table.add_column(header, justify="left" if position == 0 else "right", overflow="fold")
    return table


SUMMARY: tuple[Fact, ...] = (
    ("cluster", lambda answer: f"{answer.cluster}"),
    ("devices", lambda answer: f"{answer.num_devices} x {answer.device}"),
    ("stack", lambda answer: answer.stack),
    ("step time", lambda answer: seconds(answer.step_time_s)),
    ("  bounds", lambda answer: f"{seconds(answer.lower_s)} .. {seconds(answer.upper_s)}"),
    (
        "  90 % interval",
        lambda answer: f"{seconds(answer.interval_s.low)} .. {seconds(answer.interval_s.high)}",
    ),
    ("tokens/s", lambda answer: f"{answer.tokens_per_s:,.0f}"),
    ("  per device", lambda answer: f"{answer.tokens_per_s / answer.num_devices:,.1f}"),
    (
        "model FLOP/s per device",
        lambda answer: format_quantity(answer.model_flops_per_s_per_device, "flop_per_s"),
    ),
    ("MFU", lambda answer: f"{answer.mfu_fraction:.1%}"),
    ("HFU", lambda answer: f"{answer.hfu_fraction:.1%}"),
    (
        "parameters",
        lambda answer: f"{answer.parameters.total / 1e9:,.2f} B, {answer.parameters.active / 1e9:,.2f} B active",
    ),
    ("cost", lambda answer: _cost(answer)),
    ("  per 1e9 tokens", lambda answer: _token_cost(answer)),
)


def _cost(answer: StepEstimate) -> str:
    if answer.cost.usd_per_hour is None:
        return "no price known"
    return f"{answer.cost.usd_per_hour:,.0f} USD/h"


def _token_cost(answer: StepEstimate) -> str:
    if answer.cost.usd_per_billion_tokens is None:
        return "no price known"
    return f"{answer.cost.usd_per_billion_tokens:,.2f} USD"


def print_estimates(answers: Sequence[StepEstimate]) -> None:
    """Print one estimate, or several side by side."""
    console = _console()
    table = _table("", ["", *(answer.scenario for answer in answers)])
    for name, fact in SUMMARY:
        table.add_row(name, *(fact(answer) for answer in answers))
    console.print(table)
    _print_breakdown(console, answers)
    _print_memory(console, answers)
    _print_pipeline(console, answers)
    for answer in answers:
        _print_notes(console, answer)


def _print_breakdown(console: Console, answers: Sequence[StepEstimate]) -> None:
    table = _table("\nWhere the step goes: exposed (share), + hidden", ["", *("" for _ in answers)])
    for name in CATEGORIES:
        if all(answer.exposed_s.get(name, 0.0) + answer.hidden_s.get(name, 0.0) == 0 for answer in answers):
            continue
        table.add_row(name, *(_part(answer, name) for answer in answers))
    table.add_row("sum", *(seconds(answer.step_time_s) for answer in answers))
    console.print(table)


def _part(answer: StepEstimate, name: str) -> str:
    exposed, hidden = answer.exposed_s.get(name, 0.0), answer.hidden_s.get(name, 0.0)
    text = f"{seconds(exposed)} ({exposed / answer.step_time_s:5.1%})"
    return f"{text} + {seconds(hidden)}" if hidden else text


def _print_memory(console: Console, answers: Sequence[StepEstimate]) -> None:
    table = _table("\nMemory of the fullest device", ["", *("" for _ in answers)])
    for name in MEMORY_PARTS:
        table.add_row(name, *(format_quantity(getattr(answer.memory, name), "bytes") for answer in answers))
    table.add_row("peak", *(format_quantity(answer.memory.peak, "bytes") for answer in answers))
    table.add_row("  on stage", *(str(answer.memory.peak_stage) for answer in answers))
    table.add_row("usable", *(format_quantity(answer.memory.capacity, "bytes") for answer in answers))
    table.add_row("verdict", *(_verdict(answer) for answer in answers))
    console.print(table)


def _verdict(answer: StepEstimate) -> str:
    if answer.fits:
        return f"fits ({answer.memory.peak / answer.memory.capacity:.0%} used)"
    return f"DOES NOT FIT: {format_quantity(answer.memory.deficit, 'bytes')} missing"


def _print_pipeline(console: Console, answers: Sequence[StepEstimate]) -> None:
    staged = [answer for answer in answers if len(answer.pipeline.stage_times_s) > 1]
    if staged:
        console.print("\nPipeline: seconds of one micro-batch per stage")
    for answer in staged:
        times = " ".join(seconds(value) for value in answer.pipeline.stage_times_s)
        bubble = f"bubble {answer.pipeline.bubble_fraction:.1%} of busy time"
        console.print(f"{answer.scenario}: {times}; critical stage {answer.pipeline.critical_stage}, {bubble}")


def _print_notes(console: Console, answer: StepEstimate) -> None:
    console.print(f"\n{answer.scenario}: {answer.bottleneck.name} is the largest part ({answer.bottleneck.share:.0%}).")
    console.print(f"  What relieves it: {answer.bottleneck.relief}.")
    for warning in answer.warnings:
        console.print(f"  [{warning.code}] {warning.message}")
    if answer.assumptions:
        console.print("  Assumed by the scenario:")
        for name, why in answer.assumptions.items():
            console.print(f"    {name}: {why}")
    counts = Counter(figure.kind for figure in answer.provenance)
    console.print("  Figures behind this: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]))
    for kind in KINDS[1:]:
        names = [figure.figure for figure in answer.provenance if figure.kind == kind]
        if names:
            console.print(f"    {kind}: {', '.join(names)}")


def print_explanation(loaded: LoadedScenario) -> None:
    """Print every term's formula with its numbers put in."""
    from moesim.estimation.explanation import explain_step

    console = _console()
    console.print(f"\nHow {loaded.scenario.name} is priced: seconds each x times per step, on the critical stage")
    for term in explain_step(loaded):
        console.print(f"\n{term.category} / {term.name} ({term.phase}): {seconds(term.seconds_each)} x {term.times:g}")
        console.print(f"  {term.formula}")
        console.print(f"  = {term.substituted}")


def print_schedules(comparison: ScheduleComparison) -> None:
    """Print one scenario's pipeline schedules side by side; below, why some are not legal."""
    console = _console()
    headers = ["", "chunks per stage", "step time", "bubble", "in flight", "memory", ""]
    table = _table(f"\nPipeline schedules of {comparison.scenario} (* its own)", headers)
    for row in comparison.rows:
        name = f"{row.schedule} *" if row.is_chosen else row.schedule
        if row.step_time_s is None or row.peak_memory_bytes is None:
            table.add_row(name, str(row.virtual_stages), "-", "-", "-", "-", "not legal")
            continue
        memory = format_quantity(row.peak_memory_bytes, "bytes")
        numbers = (f"{row.bubble_fraction:.1%}", f"{row.peak_in_flight:g}", memory)
        verdict = "fits" if row.fits else "DOES NOT FIT"
        table.add_row(name, str(row.virtual_stages), seconds(row.step_time_s), *numbers, verdict)
    console.print(table)
    for row in comparison.rows:
        for reason in row.reasons:
            console.print(f"{row.schedule}: {reason}")


def print_hardware_list(library: HardwareLibrary) -> None:
    """Print names with a line each."""
    console = _console()
    devices = _table("Devices", ["", "name", "memory", "bandwidth", "best dense rate"])
    for name in library.names("devices"):
        device = library.device(name)
        precision, figure = max(device.peak_flop_rate.items(), key=lambda item: item[1].value)
        devices.add_row(
            name,
            device.name,
            format_quantity(device.memory.value, "bytes"),
            format_quantity(device.memory_bandwidth.value, "bytes_per_s"),
            f"{format_quantity(figure.value, 'flop_per_s')} {precision}",
        )
    console.print(devices)
    clusters = _table("\nClusters", ["", "device", "devices", "fabric"])
    for name in library.names("clusters"):
        cluster = library.cluster(name)
        clusters.add_row(name, cluster.device, str(cluster.device_count), cluster.fabric.kind)
    console.print(clusters)
    stacks = _table("\nSoftware stacks", ["", "name"])
    for name in library.names("stacks"):
        stacks.add_row(name, library.stack(name).name)
    console.print(stacks)


def print_profile(profile: Device | Cluster | Stack, kind: str) -> None:
    """Print every field of a profile; figures with kind and source."""
    from moesim.describe.quantities import Figure
    from moesim.estimation.provenance import UNIT_OF_FIGURE, figures_of

    console = _console()
    console.print(f"{profile.id} ({kind[:-1]}): {profile.name}")
    figures: list[tuple[str, Figure]] = list(figures_of(profile, ""))
    table = _table("", ["figure", "value", "kind", "source"])
    for column in table.columns[2:]:
        column.justify = "left"
    for name, figure in figures:
        table.add_row(name.lstrip("."), _figure_text(figure, UNIT_OF_FIGURE), figure.kind, figure.source)
    console.print(table)
    for name in type(profile).model_fields:
        value = getattr(profile, name)
        if isinstance(value, str | int | bool | float) and name not in ("schema_version", "id", "name"):
            console.print(f"{name}: {value}")


def _figure_text(figure: Any, units: dict[Any, str]) -> str:
    dimension = {"s": "seconds"}.get(units.get(type(figure), ""), units.get(type(figure), ""))
    text = format_quantity(figure.value, dimension) if dimension else f"{figure.value:g}"  # type: ignore[arg-type]
    return f"{text} +- {figure.error_fraction:.0%}" if figure.error_fraction else text


@contextmanager
def sweep_progress() -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time left, on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("sweep", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_sweep(summary: SweepSummary) -> None:
    """Print the funnel, why rows fell out, and the best rows."""
    console = _console()
    rate = f"{summary.configurations_per_s:,.0f} configurations/s"
    resumed = f", {summary.resumed_rows} of them from an interrupted run" if summary.resumed_rows else ""
    console.print(f"{summary.rows} rows in {summary.output}{resumed}; {rate}, writing included")
    console.print("  ".join(f"{name} {count}" for name, count in summary.funnel.items()))
    for reason, count in summary.reasons.items():
        specimen = ", ".join(f"{path}={value}" for path, value in summary.specimens[reason].items())
        console.print(f"  {count} x {reason}, such as {specimen}")
    if not summary.best:
        return
    table = _table("\nBest that fit, by tokens/s", ["", *(f"#{rank + 1}" for rank in range(len(summary.best)))])
    for name in summary.best[0]:
        if name not in ("verdict", "reason", "lower_s", "upper_s"):
            table.add_row(name, *(_swept_text(name, row[name]) for row in summary.best))
    console.print(table)


def _swept_text(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if name == "step_time_s":
        return seconds(value)
    if name == "memory_peak_bytes":
        return format_quantity(value, "bytes")
    return f"{value:,.0f}" if value > 1000 else f"{value:.3g}"


def print_topology(name: str, summary: TopologySummary, assumptions: Sequence[str]) -> None:
    """Print the figures of a network."""
    console = _console()
    console.print(name)
    least, most = summary.degree
    rows = [
        *((f"{kind} vertices" if kind != "device" else "devices", f"{n:,}") for kind, n in summary.vertices.items()),
        ("links of a device", f"{least}" if least == most else f"{least} to {most}"),
        ("diameter", f"{summary.diameter} hops"),
        (
            "bisection bandwidth" if summary.is_halved else "bandwidth of the most even cut",
            f"{format_quantity(summary.bisection_bandwidth, 'bytes_per_s')} one direction",
        ),
    ]
    table = _table("", ["", ""])
    for row in rows:
        table.add_row(*row)
    console.print(table)
    links = _table("\nLinks (one direction each)", ["", "links", "slowest", "fastest", "together"])
    for tier in summary.tiers:
        rates = (tier.least_bandwidth, tier.largest_bandwidth, tier.total_bandwidth)
        links.add_row(tier.tier, f"{tier.num_links:,}", *(format_quantity(rate, "bytes_per_s") for rate in rates))
    console.print(links)
    if assumptions:
        console.print("\nAssumed")
        for sentence in assumptions:
            console.print(f"  {sentence}")
