"""Predict kernel times for the rows of a CSV file: what ``moesim predict`` does.

A device with a fitted surface answers from it (``fitted``; ``extrapolated`` outside the domain it was fitted in, for
another precision or pass). Any other device answers from the explicit forms with its own figures (``transferred``),
with the interval that those figures' errors give.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.attention_surface import (
    AttentionShapes,
    attention_half_widths,
    attention_time_s,
    is_in_attention_domain,
)
from moesim.cost.efficiency_surfaces import DeviceRates, device_rates
from moesim.cost.operators import attention_cost, gemm_cost
from moesim.cost.uncertainty import NORMAL_QUANTILE, figure_error
from moesim.describe.hardware import Device
from moesim.describe.hardware_library import HardwareLibrary
from moesim.describe.quantities import PRECISION_BYTES
from moesim.errors import FormatError, Problem, ScenarioError
from moesim.estimation.loading import device_surfaces
from moesim.structure.columns import FloatArray
from moesim.structure.lowering_layers import FLASH_BACKWARD_MATMULS_OVER_FORWARD
from moesim.structure.step_graph import AttentionCore, Gemm, Phase, linear_extents

OPERATORS = ("gemm", "attention")
NEEDED: dict[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "attention": ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim"),
}
ADDED = ("predicted_us", "low_us", "high_us", "source")
PASSES: dict[str, tuple[str, ...]] = {
    "gemm": ("forward", "dgrad", "wgrad"),
    "attention": ("forward", "backward"),
}
PHASE_OF_PASS: dict[str, Phase] = {
    "forward": "forward",
    "dgrad": "activation_gradient",
    "wgrad": "weight_gradient",
}
EXTRAPOLATION_FACTOR = 2.0
"""Times the half width outside what was fitted: no held-out error speaks for it."""
MAX_PROBLEMS = 20
ALIGNMENT = 64
"""Elements that n and k are whole multiples of in an aligned GEMM."""
MICRO = 1e-6


@dataclass(frozen=True)
class KernelPrediction:
    """Seconds with a 90 % interval, and where each came from; shape (n_rows,)."""

    time_s: FloatArray
    half_width: FloatArray
    source: list[str]


def predict_file(operator: str, device_name: str, source: Path, target: Path, *, library: HardwareLibrary) -> int:
    """Predict every row of a CSV file and write it with four more columns.

    Parameters
    ----------
    operator : str
        One of ``OPERATORS``.
    device_name : str
        Device id.
    source, target : Path
        CSV files; unknown columns are kept in order.
    library : HardwareLibrary
        Where devices and surfaces come from.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    FormatError
        If the input lacks a column or a row is wrong; nothing is written then.
    ScenarioError
        If the device is unknown.
    """
    device = library.device(device_name)
    header, rows = _read_rows(operator, source)
    columns = _columns(operator, source, header, rows)
    prediction = predict(operator, device, columns, library)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*header, *ADDED])
    low, high = prediction.time_s * np.exp(-prediction.half_width), prediction.time_s * np.exp(prediction.half_width)
    for index, row in enumerate(rows):
        numbers = (prediction.time_s[index], low[index], high[index])
        added = [f"{value / MICRO:.6g}" for value in numbers]
        writer.writerow([*(row[name] for name in header), *added, prediction.source[index]])
    pending = target.with_name(target.name + ".partial")
    pending.write_text(text.getvalue(), encoding="utf-8")
    pending.replace(target)
    return len(rows)


def predict(
    operator: str, device: Device, columns: Mapping[str, npt.NDArray[Any]], library: HardwareLibrary
) -> KernelPrediction:
    """Predict kernel times of rows given as columns."""
    predictors: dict[str, Callable[[Device, Mapping[str, npt.NDArray[Any]], HardwareLibrary], KernelPrediction]] = {
        "gemm": _predict_gemm,
        "attention": _predict_attention,
    }
    if operator not in predictors:
        message = f"no predictor is called {operator!r}"
        raise ScenarioError([Problem(code="E-SCN-010", message=message, remedy=f"there are {', '.join(OPERATORS)}")])
    return predictors[operator](device, columns, library)


def _predict_gemm(
    device: Device, columns: Mapping[str, npt.NDArray[Any]], library: HardwareLibrary
) -> KernelPrediction:
    """A[m, k] W[n, k]^T and its gradients, priced as a step prices them but for the stack's slow-down."""
    shape: list[FloatArray] = [columns[name] for name in NEEDED["gemm"]]
    by_phase = linear_extents(*shape)
    rows, width, inner = (np.zeros_like(size) for size in shape)
    for name, phase in PHASE_OF_PASS.items():
        part = columns["pass"] == name
        for size, of_phase in zip((rows, width, inner), by_phase[phase], strict=True):
            size[part] = np.asarray(of_phase)[part]
    surfaces = device_surfaces(device, library)
    if surfaces.gemm is None:
        return _transferred_gemm(device, (rows, width, inner), columns["precision"])
    rates = device_rates(device, surfaces=surfaces)
    time_s = np.empty(len(rows))
    for precision in map(str, np.unique(columns["precision"])):
        part = columns["precision"] == precision
        ones, operand_bytes = np.ones(part.sum()), PRECISION_BYTES[precision]
        work = Gemm(rows[part], width[part], inner[part], ones, precision, operand_bytes, output_bytes=2.0)
        time_s[part] = gemm_cost(work, rates)[0]
    inside = surfaces.gemm.is_inside_domain(rows, width, inner) & (columns["precision"] == "bf16")
    inside &= columns["pass"] == "forward"
    is_aligned = (width % ALIGNMENT == 0) & (inner % ALIGNMENT == 0)
    half_width = surfaces.gemm.half_width(time_s, is_aligned) * np.where(inside, 1.0, EXTRAPOLATION_FACTOR)
    return KernelPrediction(time_s, half_width, _sources(inside))


def _available(precision: str, rates: DeviceRates) -> str:
    """The precision itself, or fp16 where a device has no bf16 (V100, T4): the other 16-bit format of its time."""
    return "fp16" if precision == "bf16" and "bf16" not in rates.peak and "fp16" in rates.peak else precision


def _transferred_gemm(
    device: Device, sizes: tuple[FloatArray, FloatArray, FloatArray], precisions: npt.NDArray[Any]
) -> KernelPrediction:
    rates = device_rates(device)
    time_s = np.empty(len(sizes[0]))
    for precision in np.unique(precisions):
        part = precisions == precision
        rows, width, inner = (size[part] for size in sizes)
        work = Gemm(rows, width, inner, np.ones_like(rows), _available(str(precision), rates), 2.0, 2.0)
        time_s[part] = gemm_cost(work, rates)[0]
    gemm = device.kernels.gemm
    error = math.hypot(figure_error(gemm.compute_fraction), figure_error(gemm.fixed_time))
    return _plain(time_s, error)


def _predict_attention(
    device: Device, columns: Mapping[str, npt.NDArray[Any]], library: HardwareLibrary
) -> KernelPrediction:
    """Causal prefill as fitted; without a mask twice the pairs; backward 2.5 times the forward products."""
    shapes = AttentionShapes(*(columns[name] for name in NEEDED["attention"]))
    is_backward, is_masked = columns["pass"] == "backward", columns["is_causal"] == "true"
    factor = np.where(is_backward, FLASH_BACKWARD_MATMULS_OVER_FORWARD, 1.0) * np.where(is_masked, 1.0, 2.0)
    surface = device_surfaces(device, library).attention
    if surface is None:
        return _transferred_attention(device, shapes, factor, columns["precision"])
    time_s = attention_time_s(surface, shapes)
    inside = is_in_attention_domain(surface, shapes) & (factor == 1.0) & (columns["precision"] == "bf16")
    half_width = attention_half_widths(surface, time_s) * np.where(inside, 1.0, EXTRAPOLATION_FACTOR)
    return KernelPrediction(time_s * factor, half_width, _sources(inside))


def _transferred_attention(
    device: Device, shapes: AttentionShapes, factor: FloatArray, precisions: npt.NDArray[Any]
) -> KernelPrediction:
    rates = device_rates(device)
    tokens = shapes.batch * shapes.sequence
    elements = tokens * shapes.head_size * 2.0 * (shapes.heads + shapes.kv_heads)
    time_s = np.empty(len(tokens))
    for precision in np.unique(precisions):
        for size in np.unique(shapes.head_size):
            part = (precisions == precision) & (shapes.head_size == size)
            work = AttentionCore(
                pairs=(tokens * shapes.sequence)[part],
                heads=shapes.heads[part],
                matmul_width=2.0 * float(size),
                visible_fraction=0.5,
                io_elements=elements[part],
                precision=_available(str(precision), rates),
                element_bytes=2.0,
            )
            time_s[part] = attention_cost(work, rates, 1)[0]
    return _plain(time_s * factor, figure_error(device.kernels.attention.compute_fraction))


def _plain(time_s: FloatArray, error: float) -> KernelPrediction:
    """Transferred times with the interval of a log-normal error."""
    half_width = np.full(len(time_s), NORMAL_QUANTILE * error)
    return KernelPrediction(time_s, half_width, ["transferred"] * len(time_s))


def _sources(inside: npt.NDArray[np.bool_]) -> list[str]:
    return ["fitted" if one else "extrapolated" for one in inside.tolist()]


def _read_rows(operator: str, path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a CSV file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            rows = [dict(row) for row in reader]
            header = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _wrong(path, None, f"cannot be read as CSV: {error}", "give a CSV file with a header") from None
    missing = [name for name in NEEDED[operator] if name not in header]
    if missing:
        text = f"column{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing"
        raise _wrong(path, 1, text, f"{operator} needs {', '.join(NEEDED[operator])}")
    taken = [name for name in ADDED if name in header]
    if taken:
        raise _wrong(path, 1, f"column {taken[0]} is there already", "leave the predicted columns out")
    return header, rows


def _columns(
    operator: str, path: Path, header: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Columns of the rows: sizes as numbers, options as text with their defaults; all problems at once."""
    problems: list[Problem] = []
    columns: dict[str, npt.NDArray[Any]] = {}
    for name in NEEDED[operator]:
        columns[name] = np.array([_size(path, name, row, line, problems) for line, row in enumerate(rows, 2)])
    choices = {
        "precision": ("bf16", ("bf16", "fp16", "fp8", "fp4", "fp32", "tf32", "int8")),
        "is_causal": ("true", ("true", "false")),
        "pass": ("forward", PASSES[operator]),
    }
    for name, (default, legal) in choices.items():
        texts = [str(row.get(name) or default).lower() if name in header else default for row in rows]
        for line, text in enumerate(texts, 2):
            if text not in legal:
                problems += _wrong(path, line, f"{name} is {text!r}", f"choose {', '.join(legal)}").problems
        columns[name] = np.array(texts, dtype=object)
    if problems:
        raise FormatError(problems[:MAX_PROBLEMS])
    return columns


def _size(path: Path, name: str, row: Mapping[str, Any], line: int, problems: list[Problem]) -> float:
    text = row.get(name)
    try:
        value = float(str(text))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1 and value == int(value)):
        problems += _wrong(path, line, f"{name} is {text!r}", "write a whole number of at least 1").problems
        return 1.0
    return value


def _wrong(path: Path, line: int | None, message: str, remedy: str) -> FormatError:
    return FormatError([Problem(code="E-FMT-014", message=message, remedy=remedy, file=str(path), line=line)])
