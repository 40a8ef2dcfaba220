"""The charts of a scenario, each written to one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from plotly import graph_objects as go

from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario
from moesim.estimation.simulated_step import SimulatedStep
from moesim.estimation.step_estimate import StepEstimate
from moesim.report.figures import breakdown_figure, memory_figure, scaling_figure
from moesim.report.numbers import memory_scale, percent, significant, time_scale
from moesim.report.pages import Fact, Note, write_chart
from moesim.report.scaling_figures import has_point_that_does_not_fit, legal_devices
from moesim.report.styles import STEP_CATEGORIES
from moesim.report.timeline_figures import MAX_RANKS, timeline_figure
from moesim.structure.columns import IntArray
from moesim.structure.placement import rank_ranges
from moesim.study.scaling import Scaling, scaling_from

MAX_LISTED = 7


def write_breakdown_chart(loaded: LoadedScenario, path: str | Path) -> None:
    """Write where the time of a step goes.

    Parameters
    ----------
    loaded : LoadedScenario
        What to estimate.
    path : str or Path
        The HTML file.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    estimate = estimate_loaded(loaded)
    _write(loaded, estimate, breakdown_figure(estimate), path, "where a step goes", [_bottleneck(estimate)])


def write_memory_chart(loaded: LoadedScenario, path: str | Path) -> None:
    """Write the memory of the fullest device against what is usable; as ``write_breakdown_chart``."""
    estimate = estimate_loaded(loaded)
    _write(loaded, estimate, memory_figure(estimate), path, "memory of the fullest device")


def write_scaling_chart(loaded: LoadedScenario, path: str | Path) -> None:
    """Write step time, throughput and cost on fewer and on more devices; as ``write_breakdown_chart``."""
    scaling = scaling_from(loaded)
    notes = [Note("About this chart", _scaling_remarks(scaling)), Note("Left out: not legal", _illegal_points(scaling))]
    _write(loaded, scaling.base, scaling_figure(scaling), path, "scaling with the number of devices", notes)


def write_timeline_chart(loaded: LoadedScenario, answer: SimulatedStep, path: str | Path) -> None:
    """Write what the recorded ranks of a simulation did in its first draw; as ``write_breakdown_chart``.

    Raises
    ------
    ValueError
        If nothing was recorded.
    """
    if answer.recording is None:
        raise ValueError("nothing was recorded")
    figure = timeline_figure(
        answer.recording.timeline,
        memory=answer.recording.memory,
        capacity_bytes=answer.estimate.memory.capacity,
        stage_of_rank={rank.rank: rank.stage for rank in answer.ranks},
    )
    notes = [Note("About this chart", _timeline_remarks(answer))]
    _write(loaded, answer.estimate, figure, path, "a simulated step", notes)


def _timeline_remarks(answer: SimulatedStep) -> list[tuple[str, str]]:
    first_s = answer.recorded_step_time_s
    remarks = [
        ("", "Forward passes are lighter than what follows them. Drag along a panel to enlarge a part of it."),
        (
            "",
            "With many operations, the first panel shows what takes most of each short interval,"
            " fainter where it takes little.",
        ),
    ]
    if answer.contention is not None:
        added_s = answer.contention.contention_s
        text = (
            f"collectives have links of their own here; {time_scale(added_s).text(added_s)} of sharing is in the header"
        )
        remarks.append(("shared links", text))
    if answer.draws > 1:
        text = (
            f"this is the first of {answer.draws} draws, {time_scale(first_s).text(first_s)}; the header has the mean"
        )
        remarks.append((f"seed {answer.seed}", text))
    if len(answer.ranks) > MAX_RANKS:
        remarks.append(("", f"The first {MAX_RANKS} of {len(answer.ranks)} recorded ranks are drawn."))
    remarks += [
        (f"rank {rank.rank}", f"stands for ranks {rank_ranges(rank.stands_for)}, which do the same")
        for rank in answer.ranks[:MAX_RANKS]
        if len(rank.stands_for) > 1
    ]
    return remarks


def _write(
    loaded: LoadedScenario,
    estimate: StepEstimate,
    figure: go.Figure,
    path: str | Path,
    subject: str,
    notes: Sequence[Note] = (),
) -> None:
    shared = [
        Note("Warnings", [(warning.code, warning.message) for warning in estimate.warnings]),
        Note("Assumed in the scenario", list(estimate.assumptions.items())),
    ]
    write_chart(
        figure,
        path,
        title=f"{estimate.scenario}: {subject}",
        subtitle=loaded.scenario.description,
        facts=header_facts(estimate),
        alarm=_alarm(estimate),
        notes=[*notes, *shared],
    )


def header_facts(estimate: StepEstimate) -> list[Fact]:
    """What every chart says on top: the machine, the step time with its bounds, and the throughput."""
    scale = time_scale(estimate.step_time_s)
    interval = estimate.interval_s
    bounds = f"bounds {scale.number(estimate.lower_s)} – {scale.text(estimate.upper_s)}"
    spread = f"{interval.level * 100:g} % interval {scale.number(interval.low)} – {scale.text(interval.high)}"
    return [
        Fact("Cluster", estimate.cluster),
        Fact("Devices", f"{estimate.num_devices:,} × {estimate.device}"),
        Fact("Stack", estimate.stack),
        Fact(f"Step time ({estimate.kind})", scale.text(estimate.step_time_s), f"{bounds}\n{spread}"),
        Fact("Throughput", f"{significant(estimate.tokens_per_s)} tokens/s", f"MFU {percent(estimate.mfu_fraction)}"),
    ]


def _alarm(estimate: StepEstimate) -> str:
    if estimate.fits:
        return ""
    scale = memory_scale(estimate.memory.peak)
    missing, usable = scale.text(estimate.memory.deficit), scale.text(estimate.memory.capacity)
    return (
        f"Does not fit: the fullest device needs {missing} more than the {usable} it can use. "
        "Times are those of a device with enough memory."
    )


def _bottleneck(estimate: StepEstimate) -> Note:
    name = STEP_CATEGORIES[estimate.bottleneck.name].name
    relief = f"{percent(estimate.bottleneck.share)} of the step; relief: {estimate.bottleneck.relief}"
    return Note("Largest part", [("", f"{name}, {relief}")])


def _scaling_remarks(scaling: Scaling) -> list[tuple[str, str]]:
    remarks = [
        "Tensor, context, pipeline and expert-tensor degrees are kept; the data degree follows the number of devices. "
        "The expert degree is kept too, until a stage has too few devices for it; then it shrinks with them.",
        f"The dashed lines start at the scenario's own {scaling.base.num_devices:,} devices, printed bold.",
    ]
    if has_point_that_does_not_fit(scaling):
        remarks.append("Hollow points do not fit in memory; their times are those of devices with enough of it.")
    if len(legal_devices(scaling)) == 1:
        remarks.append("No other number of devices is legal with these degrees on this cluster, so there is no curve.")
    first, *others = [("", remark) for remark in remarks]
    return [first, *_smaller_expert_degrees(scaling), *others]


def _smaller_expert_degrees(scaling: Scaling) -> list[tuple[str, str]]:
    """Legal numbers of devices whose expert degree is not the scenario's, in one entry, or none."""
    curve = scaling.weak  # degrees are the same for both
    own = int(curve.expert_degrees[curve.devices == scaling.base.num_devices][0])
    differs = np.isin(curve.devices, legal_devices(scaling)) & (curve.expert_degrees != own)
    if not differs.any():
        return []
    degrees = _listed(curve.expert_degrees[differs])
    return [(f"{_listed(curve.devices[differs])} devices", f"expert degree {degrees} instead of {own}")]


def _listed(doubling: IntArray) -> str:
    """Numbers of which each is twice the one before; the middle of a long list goes without saying."""
    numbers = [str(number) for number in doubling]
    return ", ".join(numbers if len(numbers) <= MAX_LISTED else [*numbers[:3], "…", numbers[-1]])


def _illegal_points(scaling: Scaling) -> list[tuple[str, str]]:
    """Illegal points by the rule they break, with the reason of the one nearest to the scenario."""
    rows_of: dict[tuple[str, str, bool], list[int]] = {}
    for curve in scaling.curves:
        for row, point in enumerate(curve.points):
            if point.verdict == "illegal":
                is_larger = bool(curve.devices[row] > scaling.base.num_devices)
                rows_of.setdefault((curve.mode, point.rule, is_larger), []).append(row)
    modes_of: dict[tuple[str, str], list[str]] = {}
    for (mode, _, is_larger), rows in rows_of.items():
        curve = scaling.weak if mode == "weak" else scaling.strong
        reason = curve.points[rows[0 if is_larger else -1]].reason
        counts = ", ".join(f"{int(curve.devices[row])}" for row in rows)
        modes_of.setdefault((counts, reason), []).append(mode)
    return [(f"{counts} devices, {' and '.join(modes)}", reason) for (counts, reason), modes in modes_of.items()]
