"""Logs of nccl-tests and rccl-tests: their tables of sizes and times, read as measured collectives."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from moesim.errors import FormatError, Problem
from moesim.structure.step_graph import CollectiveKind
from moesim.study.link_calibration import DEFAULT_LEVEL, LinkCase

PROGRAMS: dict[str, CollectiveKind] = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "sendrecv": "point_to_point",
}
"""``NAME_perf`` programs that moesim has a collective for."""
UNSUPPORTED = ("broadcast", "reduce", "gather", "scatter", "hypercube", "alltoallv")
LEADING = ("size", "count", "type")
"""Columns that every table starts with; operation and root follow where a release prints them."""
PROGRAM = re.compile(r"\b([a-z_]+)_perf\b")
RANK = re.compile(r"^#\s+Rank\s+(\d+)\b")
MICRO = 1e-6
MAX_PROBLEMS = 20


def looks_like_nccl_tests(text: str) -> bool:
    """Whether a text is a log of these tools: it says how it was started, or has the head of their tables."""
    return "minBytes" in text[:20_000] or "out-of-place" in text[:20_000]


def read_nccl_tests_log(
    path: Path, *, kind: CollectiveKind | None = None, level: str = DEFAULT_LEVEL
) -> list[LinkCase]:
    """Read the out-of-place times of a log.

    Parameters
    ----------
    path : Path
        What ``all_reduce_perf`` and its siblings print, of one program.
    kind : str, optional
        The collective, where the log does not name the program: only newer releases do, or the command line above the
        table.
    level : str, optional
        Name of the links it ran over.

    Returns
    -------
    list of LinkCase
        One per row with a time. Sizes are the tool's: the larger of send and receive buffer.

    Raises
    ------
    FormatError
        If it is no such log, the collective cannot be told, the ranks are not listed, or a row is broken; all problems
        at once.
    """
    text = _text(path)
    if not looks_like_nccl_tests(text):
        raise FormatError([_problem(path, 1, "the file is no log of nccl-tests", "give what all_reduce_perf printed")])
    ranks = len({int(found[1]) for line in text.splitlines() if (found := RANK.match(line))})
    kind = kind or _kind(path, text)
    problems: list[Problem] = []
    cases: list[LinkCase] = []
    if ranks < 2:
        message = f"the log lists {ranks} ranks" if ranks else "the log lists no ranks"
        problems.append(_problem(path, None, message, "keep the lines '#  Rank ...' of the log; two ranks at least"))
    for number, row, place in _rows(text):
        measured = _row_time(path, number, row, place, problems)
        if measured is not None:
            cases.append(LinkCase(level, kind, max(ranks, 2), *measured))
    if not cases and not problems:
        problems.append(_problem(path, None, "the log holds no row with a time", "let the program run to its end"))
    if problems:
        raise FormatError(problems[:MAX_PROBLEMS])
    return cases


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise FormatError([_problem(path, None, message, "give a log file", "E-FMT-001")]) from None


def _kind(path: Path, text: str) -> CollectiveKind:
    named = {found[1] for line in text.splitlines() for found in PROGRAM.finditer(line)}
    known = [PROGRAMS[name] for name in PROGRAMS if name in named]
    if len(known) == 1:
        return known[0]
    if known:
        message = f"the log names several programs: {', '.join(sorted(named))}"
        raise FormatError([_problem(path, None, message, "give one log per program")])
    unsupported = sorted(named & set(UNSUPPORTED))
    message = f"{unsupported[0]}_perf is no collective that is fitted" if unsupported else "the log names no program"
    remedy = f"say which with --collective: {', '.join(sorted(set(PROGRAMS.values())))}"
    raise FormatError([_problem(path, None, message, remedy)])


def _rows(text: str) -> Iterator[tuple[int, list[str], int]]:
    """Rows below the head of a table, each with its line and the place of its out-of-place time."""
    place = 0
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if fields[:1] == ["#"] and tuple(fields[1:4]) == LEADING and "time" in fields:
            place = fields.index("time") - 1
        elif place and fields and fields[0].isdigit():
            yield number, fields, place


def _row_time(
    path: Path, number: int, row: list[str], place: int, problems: list[Problem]
) -> tuple[float, float] | None:
    """Bytes and seconds of a row; None for messages of no bytes, which time the start of a program."""
    if len(row) < place + 3:
        problems.append(_problem(path, number, "the row has no bandwidth", "the log was cut off here: remove the row"))
        return None
    try:
        num_bytes, time_us = float(row[0]), float(row[place])
    except ValueError:
        problems.append(_problem(path, number, f"the time is {row[place]!r}", "remove the row, or run again"))
        return None
    if not (math.isfinite(time_us) and time_us >= 0):
        problems.append(_problem(path, number, f"the time is {row[place]}", "remove the row, or run again"))
        return None
    return (num_bytes, time_us * MICRO) if num_bytes > 0 and time_us > 0 else None


def _problem(path: Path, line: int | None, message: str, remedy: str, code: str = "E-FMT-014") -> Problem:
    return Problem(code=code, message=message, remedy=remedy, file=str(path), line=line)
