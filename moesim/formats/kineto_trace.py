"""Traces of the PyTorch profiler (Kineto): matrix products, copies and additions with shapes, and NCCL's kernels."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import FormatError, Problem
from moesim.structure.step_graph import CollectiveKind
from moesim.study.link_calibration import DEFAULT_LEVEL, LinkCase
from moesim.study.measured_cases import MeasuredCase

MICRO = 1e-6
PRECISIONS = {"c10::BFloat16": "bf16", "c10::Half": "fp16", "float": "fp32"}
BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0}
NCCL_BYTES = {
    "BFloat16": 2.0,
    "Half": 2.0,
    "Float": 4.0,
    "Byte": 1.0,
    "Char": 1.0,
    "Int": 4.0,
    "Long": 8.0,
    "Double": 8.0,
}
COLLECTIVES: dict[str, CollectiveKind] = {
    "allreduce": "all_reduce",
    "_allgather_base": "all_gather",
    "allgather": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
    "all_to_allv": "all_to_all",
}
LARGEST_FILE = 2 << 30


def looks_like_trace(path: Path) -> bool:
    """Whether a file starts like a trace: a JSON object with trace events or a schema version of Kineto."""
    with _opened(path) as stream:
        head = _start(stream).decode("utf-8", errors="replace")
    return head.lstrip().startswith("{") and ("traceEvents" in head or "schemaVersion" in head)


def read_kineto_trace(path: Path, *, level: str = DEFAULT_LEVEL) -> tuple[list[MeasuredCase], list[LinkCase]]:
    """Read kernels with known shapes from a trace.

    Parameters
    ----------
    path : Path
        What ``profile(record_shapes=True).export_chrome_trace`` wrote, maybe compressed with gzip.
    level : str, optional
        Name of the links that NCCL ran over.

    Returns
    -------
    cases : list of MeasuredCase
        ``aten::mm`` and ``aten::addmm`` as GEMMs, ``aten::copy_`` and ``aten::add`` of whole tensors as memory traffic:
        medians over the calls of a shape, of the time of their kernels on the device.
    links : list of LinkCase
        NCCL's kernels that say what they moved. Of each size the shortest call: a longer one also waited for others.

    Raises
    ------
    FormatError
        If the file is no trace, was cut off, or has no kernel with a shape.
    """
    events = _events(path)
    calls: dict[tuple[Any, ...], list[float]] = {}
    kernels = _kernel_times(events)
    for event in events:
        if event.get("cat") != "cpu_op":
            continue
        arguments = _arguments(event)
        key = _operation(str(event.get("name", "")), arguments)
        time_s = kernels.get(arguments.get("External id"), 0.0)
        if key is not None and time_s > 0:
            calls.setdefault(key, []).append(time_s)
    cases = [_case(key, times) for key, times in calls.items()]
    links = _links(events, level)
    if not cases and not links:
        message = "the trace holds no matrix product, copy, addition or collective whose shape is known"
        raise FormatError([_problem(path, message, "profile with record_shapes=True and activities=[CPU, CUDA]")])
    return cases, links


def _start(stream: Any) -> bytes:
    try:
        return bytes(stream.read(4096))
    except (EOFError, OSError):  # a packed file that was cut off within its first bytes
        return b""


def _opened(path: Path) -> Any:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise FormatError([_problem(path, "the file is larger than 2 GiB", "profile fewer steps", "E-FMT-003")])
        with path.open("rb") as start:
            is_packed = start.read(2) == b"\x1f\x8b"
        return gzip.open(path, "rb") if is_packed else path.open("rb")
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise FormatError([_problem(path, message, "give a trace", "E-FMT-001")]) from None


def _events(path: Path) -> list[Mapping[str, Any]]:
    try:
        with _opened(path) as stream:
            document = json.load(stream)
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile, RecursionError) as error:
        message = f"the file is no whole JSON document: {str(error).splitlines()[0] if str(error) else 'cut off'}"
        raise FormatError([_problem(path, message, "export the trace again; a killed run leaves half of it")]) from None
    events = document.get("traceEvents") if isinstance(document, dict) else document
    if not isinstance(events, list):
        raise FormatError([_problem(path, "the file has no traceEvents", "give what export_chrome_trace wrote")])
    return [event for event in events if isinstance(event, dict)]


def _arguments(event: Mapping[str, Any]) -> Mapping[str, Any]:
    found = event.get("args")
    return found if isinstance(found, dict) else {}


def _kernel_times(events: Iterable[Mapping[str, Any]]) -> dict[Any, float]:
    """Seconds on the device of the kernels and copies that each operation started, by its external id."""
    times: dict[Any, float] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            identifier, duration = _arguments(event).get("External id"), event.get("dur")
            if identifier is not None and _is_time(duration):
                times[identifier] = times.get(identifier, 0.0) + float(duration) * MICRO  # type: ignore[arg-type]
    return times


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _operation(name: str, arguments: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What an operation is as a case: suite, operation, precision and sizes; None for any other."""
    dims, types = arguments.get("Input Dims"), arguments.get("Input type")
    if not isinstance(dims, list) or not isinstance(types, list) or len(dims) < 2 or len(types) < len(dims[:2]):
        return None
    if name in ("aten::mm", "aten::addmm"):
        first = 0 if name == "aten::mm" else 1
        left, right = (dims[first], dims[first + 1]) if len(dims) > first + 1 else ([], [])
        precision = PRECISIONS.get(types[first]) if len(types) > first else None
        if precision is None or not (_is_shape(left, 2) and _is_shape(right, 2)) or left[1] != right[0]:
            return None
        return "gemm", "gemm", precision, ("m", left[0]), ("n", right[1]), ("k", left[1])
    operation = {"aten::copy_": "copy", "aten::add": "residual_add"}.get(name)
    precision = PRECISIONS.get(types[0])
    if operation is None or precision is None or types[0] != types[1] or dims[0] != dims[1]:
        return None
    if not dims[0] or not _is_shape(dims[0], len(dims[0])):
        return None
    columns = dims[0][-1]
    return "memory_bound", operation, precision, ("rows", math.prod(dims[0][:-1])), ("columns", columns)


def _is_shape(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(isinstance(one, int) and one > 0 for one in value)


def _case(key: tuple[Any, ...], times: list[float]) -> MeasuredCase:
    suite, operation, precision, *sizes = key
    shape = dict(sizes)
    label = ",".join(f"{name}={size}" for name, size in sizes)
    passes = {"copy": 2.0, "residual_add": 3.0}.get(operation, 0.0)
    moved = passes * BYTES[precision] * math.prod(shape.values())
    quartiles = np.quantile(times, (0.25, 0.75))
    return MeasuredCase(
        case=f"{suite}/{operation}/forward/{precision}/{label}",
        suite=suite,
        operation=operation,
        pass_name="forward",
        dtype=precision,
        shape=shape,
        flops=2.0 * math.prod(shape.values()) if suite == "gemm" else 0.0,
        num_bytes=moved,
        median_s=float(np.median(times)),
        iqr_s=float(quartiles[1] - quartiles[0]),
        samples=len(times),
        timed_by="profiler",
        implementation="trace",
    )


def _links(events: Iterable[Mapping[str, Any]], level: str) -> list[LinkCase]:
    shortest: dict[tuple[CollectiveKind, int, float], float] = {}
    for event in events:
        arguments = _arguments(event)
        kind = COLLECTIVES.get(str(arguments.get("Collective name", "")).lower())
        width, ranks = NCCL_BYTES.get(str(arguments.get("dtype", ""))), arguments.get("Group size")
        sizes = [size for name in ("In msg nelems", "Out msg nelems") if isinstance(size := arguments.get(name), int)]
        if event.get("cat") != "kernel" or kind is None or width is None or not _is_time(event.get("dur")):
            continue
        if not isinstance(ranks, int) or ranks < 2 or len(sizes) < 2:
            continue
        key = (kind, ranks, max(sizes) * width)
        shortest[key] = min(shortest.get(key, math.inf), float(event["dur"]) * MICRO)
    return [LinkCase(level, *key, time_s) for key, time_s in shortest.items() if key[2] > 0]


def _problem(path: Path, message: str, remedy: str, code: str = "E-FMT-014") -> Problem:
    return Problem(code=code, message=message, remedy=remedy, file=str(path))
