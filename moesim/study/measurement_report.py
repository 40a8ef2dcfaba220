"""A comparison as Markdown: errors by suite and by operation, worst cases first, what has no prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moesim.study.compared_cases import ComparedCase, ErrorStatistics, MemoryCase
from moesim.study.measured_cases import MeasuredCase
from moesim.study.measurement_comparison import Comparison

WORST_CASES = 40
WORST_OF_SUITE = 5
MICRO = 1e-6
GIB = 2.0**30
HEAD = "| cases | median error | 90th percentile | bias | in the 90 % interval |"
RULE = "| ---: | ---: | ---: | ---: | ---: |"


def comparison_markdown(comparison: Comparison, *, source: str) -> str:
    """Report of a comparison.

    Parameters
    ----------
    comparison : Comparison
        What to report.
    source : str
        Name of the file of measurements.
    """
    named = ", ".join(comparison.device_names) or "an unnamed device"
    lines = [
        f"# Predicted against measured: {source}",
        "",
        f"Measured on {named}; predicted for `{comparison.device}` under `{comparison.stack}`. "
        f"{len(comparison.compared)} cases compared, {len(comparison.unmapped)} without a prediction, "
        f"{len(comparison.skipped)} skipped when measuring. Written by `moesim compare`.",
        "",
        "An error is |predicted / measured - 1|; the bias is the median of predicted / measured - 1: below 0, the "
        "model is too fast. Kernels are priced alone, layers and blocks in a step: at the sustained clock of the "
        "device and with the switches of the stack, without host time, as CUDA graphs run them.",
        "",
        "## By suite",
        "",
        "| suite " + HEAD,
        "| --- " + RULE,
        *(f"| {suite} {_cells(errors)}" for suite, errors in comparison.by_suite().items()),
        "",
        "## By operation and pass",
        "",
        "| suite | operation | pass " + HEAD,
        "| --- | --- | --- " + RULE,
        *(f"| {' | '.join(key)} {_cells(errors)}" for key, errors in comparison.by_operation().items()),
        "",
        f"## Worst {min(WORST_CASES, len(comparison.compared))} cases",
        "",
        *_case_table(comparison.worst()[:WORST_CASES]),
        "",
        f"## Worst {WORST_OF_SUITE} cases of each suite",
        "",
        *_case_table(_worst_of_suites(comparison)),
        "",
        *_memory_table(comparison.memory),
        *_without_prediction(comparison.unmapped, comparison.skipped),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _cells(errors: ErrorStatistics) -> str:
    return (
        f"| {errors.num_cases} | {errors.median:.1%} | {errors.p90:.1%} | {errors.bias:+.1%} | {errors.coverage:.0%} |"
    )


def _worst_of_suites(comparison: Comparison) -> list[ComparedCase]:
    parts = comparison.groups(lambda case: (case.suite,))
    return [
        one for some in parts.values() for one in sorted(some, key=lambda one: -abs(one.log_ratio))[:WORST_OF_SUITE]
    ]


def _case_table(cases: Sequence[ComparedCase]) -> list[str]:
    rows = [
        f"| `{one.case.case}` | {one.case.implementation} | {one.case.median_s / MICRO:.2f} "
        f"| {one.predicted_s / MICRO:.2f} | {one.error:+.1%} |"
        for one in cases
    ]
    head = "| case | implementation | measured us | predicted us | error |"
    return [head, "| --- | --- | ---: | ---: | ---: |", *rows]


def _memory_table(cases: Sequence[MemoryCase]) -> list[str]:
    if not cases:
        return []
    errors = sorted(abs(one.error) for one in cases)
    rows = [
        f"| `{one.case.case}` | {one.measured_bytes / GIB:.2f} | {one.predicted_bytes / GIB:.2f} | {one.error:+.1%} |"
        for one in sorted(cases, key=lambda one: -abs(one.error))
    ]
    head = [
        "## Memory",
        "",
        f"Tensors at the peak of a step; median error {errors[len(errors) // 2]:.1%}.",
        "",
        "| case | measured GiB | predicted GiB | error |",
        "| --- | ---: | ---: | ---: |",
    ]
    return [*head, *rows, ""]


def _without_prediction(unmapped: Sequence[tuple[MeasuredCase, str]], skipped: Sequence[tuple[str, str]]) -> list[str]:
    if not unmapped and not skipped:
        return []
    counts = Counter((case.suite, case.operation, reason) for case, reason in unmapped)
    rows = [f"- {suite}, {operation}: {count} cases; {reason}" for (suite, operation, reason), count in counts.items()]
    rows += [f"- `{case}`: skipped when measuring; {reason}" for case, reason in skipped]
    return ["## Without a prediction", "", *rows]
