"""Results of ``moesim measure``: one JSON object per line, read with every problem of the file at once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.errors import FormatError, Problem
from moesim.study.measured_cases import PASSES, MeasuredCase, Measurements

SCHEMA_VERSION = 1
RECORDS = ("session", "result", "skip", "end")
TEXTS = ("session", "case", "suite", "operation", "pass", "dtype", "implementation", "timed_by")
NUMBERS = ("flops", "bytes", "median_s", "iqr_s", "samples")
MAX_PROBLEMS = 20
LARGEST_FILE = 1 << 30


def read_measurements(path: Path) -> Measurements:
    """Read a file of records.

    Parameters
    ----------
    path : Path
        JSON lines as ``moesim measure`` appends them.

    Returns
    -------
    Measurements
        Cases in the order of the file; of a case that was measured again, the last.

    Raises
    ------
    FormatError
        If the file cannot be read, was cut off, is another tool's, or holds a record that is no measurement. All
        problems are listed, up to 20, each with its line.
    """
    problems: list[Problem] = []
    cases: dict[str, MeasuredCase] = {}
    skipped: dict[str, str] = {}
    fingerprints: list[Mapping[str, Any]] = []
    text = _text(path)
    if not text.strip():
        raise FormatError([_problem(path, None, "the file is empty", "measure first: moesim measure SUITE --out FILE")])
    for line, record in _records(path, text, problems):
        match record["record"]:
            case "session":
                if record.get("schema_version") != SCHEMA_VERSION:
                    found = f"schema_version is {record.get('schema_version')!r}"
                    problems.append(_problem(path, line, found, f"this moesim reads {SCHEMA_VERSION}", "E-FMT-009"))
                fingerprints.append(_mapping(record.get("fingerprint")))
            case "skip":
                skipped[str(record.get("case", ""))] = str(record.get("reason", ""))
            case "result":
                case_ = _case(path, line, record, problems)
                if case_ is not None:
                    cases[case_.case] = case_
            case _:
                pass
    if problems:
        raise FormatError(problems[:MAX_PROBLEMS])
    if not cases:
        remedy = "measure first, or give a file with result records"
        raise FormatError([_problem(path, None, "the file holds no result", remedy)])
    return Measurements(tuple(cases.values()), tuple(skipped.items()), tuple(fingerprints))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise FormatError([_problem(path, None, "the file is larger than 1 GiB", "split it", "E-FMT-003")])
        return path.read_text(encoding="utf-8")
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise FormatError(
            [_problem(path, None, message, "give a file that moesim measure wrote", "E-FMT-001")]
        ) from None
    except UnicodeDecodeError:
        remedy = "give a file that moesim measure wrote"
        raise FormatError([_problem(path, None, "the file is not UTF-8 text", remedy, "E-FMT-004")]) from None


def _records(path: Path, text: str, problems: list[Problem]) -> list[tuple[int, dict[str, Any]]]:
    """Records with their lines; a line that is none becomes a problem, once for a file that is no such file at all."""
    found: list[tuple[int, dict[str, Any]]] = []
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    for number, line in lines:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            record = None
        if isinstance(record, dict) and record.get("record") in RECORDS:
            found.append((number, record))
        elif (number, line) == lines[-1] and found and not text.endswith("\n"):
            message = f"the last record is cut off after {len(line)} characters"
            remedy = (
                f"remove line {number}; the {len(found)} records before it are whole; moesim measure does it itself"
            )
            problems.append(_problem(path, number, message, remedy))
        elif not found and not problems:
            message = "line is no record of moesim measure"
            remedy = "give its --out file; logs of nccl-tests and traces of the profiler go to moesim calibrate"
            raise FormatError([_problem(path, number, message, remedy)])
        else:
            problems.append(_problem(path, number, "line is no record", "remove it, or measure again"))
    return found


def _case(path: Path, line: int, record: Mapping[str, Any], problems: list[Problem]) -> MeasuredCase | None:
    before = len(problems)
    for name in TEXTS:
        if not isinstance(record.get(name), str) or not record[name]:
            problems.append(_wrong(path, line, record, name, "must be text"))
    for name in NUMBERS:
        if not _is_amount(record.get(name), may_be_zero=name not in ("median_s", "samples")):
            problems.append(_wrong(path, line, record, name, "must be a finite number, times above 0"))
    shape, loads = record.get("shape"), record.get("loads") or []
    if not isinstance(shape, dict) or not all(isinstance(value, int | float | str) for value in shape.values()):
        problems.append(_wrong(path, line, record, "shape", "must name sizes"))
    if not isinstance(loads, list) or not all(isinstance(load, int) and load >= 0 for load in loads):
        problems.append(_wrong(path, line, record, "loads", "must be rows of each expert"))
    if isinstance(record.get("pass"), str) and record["pass"] not in PASSES:
        problems.append(_wrong(path, line, record, "pass", f"must be one of {', '.join(PASSES)}"))
    if len(problems) > before:
        return None
    return MeasuredCase(
        case=record["case"],
        suite=record["suite"],
        operation=record["operation"],
        pass_name=record["pass"],
        dtype=record["dtype"],
        shape=_mapping(shape),
        flops=float(record["flops"]),
        num_bytes=float(record["bytes"]),
        median_s=float(record["median_s"]),
        iqr_s=float(record["iqr_s"]),
        samples=int(record["samples"]),
        timed_by=record["timed_by"],
        implementation=record["implementation"],
        loads=tuple(loads),
        line=line,
        peak_bytes=float(record["peak_bytes"]) if _is_amount(record.get("peak_bytes"), may_be_zero=False) else None,
        min_s=float(record["min_s"]) if _is_amount(record.get("min_s"), may_be_zero=False) else None,
    )


def _is_amount(value: Any, *, may_be_zero: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return value > 0 or (may_be_zero and value == 0)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _wrong(path: Path, line: int, record: Mapping[str, Any], name: str, why: str) -> Problem:
    """Problem of one key of a record."""
    found = repr(record.get(name)) if name in record else "missing"
    message = f"{name} of case {record.get('case', '?')} is {found} and {why}"
    return Problem("E-FMT-014", message, "remove the record, and measure the case again", str(path), line, name)


def _problem(path: Path, line: int | None, message: str, remedy: str, code: str = "E-FMT-014") -> Problem:
    return Problem(code=code, message=message, remedy=remedy, file=str(path), line=line)
