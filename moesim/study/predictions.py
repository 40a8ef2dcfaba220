"""Predict kernel times for the rows of a CSV file: what ``moesim predict`` does.

A device with a fitted surface answers from it (``fitted``; ``extrapolated`` outside the domain it was fitted in, for
another precision or pass). Any other device answers from a surface carried over from a measured one (``transferred``),
with the interval that predicting measured devices from each other has shown; GEMMs and attention on one that surfaces
do not suit (TPU) from the plain form that also prices its steps.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
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
from moesim.cost.efficiency_surfaces import device_rates
from moesim.cost.fitted_surfaces import FittedSurfaces
from moesim.cost.kernel_times import CAUSAL_SHARE, attention_core_s
from moesim.cost.moe_rank_loads import (
    UNGATED_KERNEL,
    MoeShapes,
    power_law_exponent,
    rank_load_of_distributions,
    select_moe_shapes,
    select_rank_loads,
)
from moesim.cost.moe_surface import is_in_moe_domain, moe_half_widths, moe_time_s
from moesim.cost.operators import gemm_cost
from moesim.cost.surface_transfer import (
    SurfaceOrigin,
    attention_surface_at,
    attention_surface_for,
    gemm_surface_for,
    kernel_machine,
    moe_surface_at,
    moe_surface_for,
    takes_surfaces,
)
from moesim.describe.hardware import Device
from moesim.describe.hardware_library import HardwareLibrary
from moesim.describe.quantities import PRECISION_BYTES
from moesim.errors import FormatError, Problem, ScenarioError
from moesim.structure.columns import FloatArray
from moesim.structure.lowering_layers import FLASH_BACKWARD_MATMULS_OVER_FORWARD
from moesim.structure.step_graph import AttentionCore, Gemm, Phase, linear_extents

OPERATORS = ("gemm", "moe", "attention")
NEEDED: dict[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "moe": ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"),
    "attention": ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim"),
}
ADDED = ("predicted_us", "low_us", "high_us", "source")
PASSES: dict[str, tuple[str, ...]] = {
    "gemm": ("forward", "dgrad", "wgrad"),
    "moe": ("forward", "backward"),
    "attention": ("forward", "backward"),
}
PHASE_OF_PASS: dict[str, Phase] = {
    "forward": "forward",
    "dgrad": "activation_gradient",
    "wgrad": "weight_gradient",
}
GEMM_BACKWARD = 2.0
"""The same of a linear layer: gradients of activations and of weights."""
EXTRAPOLATION_FACTOR = 2.0
"""Times the half width outside what was fitted: no held-out error speaks for it."""
MAX_PROBLEMS = 20
MOST_EXPERTS = 1_000_000
MOST_ELEMENTS = 2.0**53
"""Sizes above which a file is wrong rather than a kernel large."""
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
    for index, (_, row) in enumerate(rows):
        numbers = (prediction.time_s[index], low[index], high[index])
        added = [f"{value / MICRO:.9g}" for value in numbers]
        writer.writerow([*row.values(), *added, prediction.source[index]])
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
        "moe": _predict_moe,
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
        at_pass = columns["pass"] == name
        for size, of_phase in zip((rows, width, inner), by_phase[phase], strict=True):
            size[at_pass] = np.asarray(of_phase)[at_pass]
    surface, origin = gemm_surface_for(device, library)
    rates = device_rates(device, surfaces=FittedSurfaces(gemm=surface) if takes_surfaces(device) else None)
    time_s = np.empty(len(rows))
    for precision, part in _by_precision(columns):
        ones, operand_bytes = np.ones(part.sum()), PRECISION_BYTES[precision]
        work = Gemm(rows[part], width[part], inner[part], ones, precision, operand_bytes, output_bytes=2.0)
        time_s[part] = gemm_cost(work, rates)[0]
    inside = surface.is_inside_domain(rows, width, inner)
    is_aligned = (width % ALIGNMENT == 0) & (inner % ALIGNMENT == 0)
    return _prediction(time_s, surface.half_width(time_s, is_aligned), inside & _is_as_fitted(columns), origin)


def _predict_attention(
    device: Device, columns: Mapping[str, npt.NDArray[Any]], library: HardwareLibrary
) -> KernelPrediction:
    """Causal prefill as fitted; without a mask twice the pairs; backward 2.5 times the forward products."""
    shapes = AttentionShapes(*(columns[name] for name in NEEDED["attention"]))
    surface, origin = attention_surface_for(device, library)
    time_s = np.empty(len(shapes.batch))
    for precision, part in _by_precision(columns):
        some = AttentionShapes(*(column[part] for column in astuple(shapes)))
        if takes_surfaces(device):
            at = attention_surface_at(surface, kernel_machine(device, precision))
            time_s[part] = attention_time_s(at, some)
        else:
            time_s[part] = _plain_attention_s(device, some, precision)
    is_masked = columns["is_causal"] == "true"
    inside = is_in_attention_domain(surface, shapes) & _is_as_fitted(columns) & is_masked
    factor = np.where(columns["pass"] == "backward", FLASH_BACKWARD_MATMULS_OVER_FORWARD, 1.0) * np.where(
        is_masked, 1.0, 2.0
    )
    return _prediction(time_s * factor, attention_half_widths(surface, time_s), inside, origin)


def _plain_attention_s(device: Device, shapes: AttentionShapes, precision: str) -> FloatArray:
    """Causal prefill as a step of a device without surfaces prices it; keys, values, queries and outputs moved once."""
    rates, time_s = device_rates(device), np.empty(len(shapes.batch))
    for head_size in np.unique(shapes.head_size):
        part = shapes.head_size == head_size
        tokens, heads = (shapes.batch * shapes.sequence)[part], shapes.heads[part]
        work = AttentionCore(
            pairs=tokens * shapes.sequence[part],
            heads=heads,
            matmul_width=2.0 * float(head_size),
            visible_fraction=CAUSAL_SHARE,
            io_elements=2.0 * tokens * float(head_size) * (heads + shapes.kv_heads[part]),
            precision=precision,
            element_bytes=PRECISION_BYTES[precision],
        )
        time_s[part] = attention_core_s(work, rates, kernels=1)
    return time_s


def _predict_moe(device: Device, columns: Mapping[str, npt.NDArray[Any]], library: HardwareLibrary) -> KernelPrediction:
    """Fused layer on the timed rank: the first of a balanced router, the most loaded one of a power law's draws."""
    projections = np.where(columns["kernel_source"] == UNGATED_KERNEL, 2.0, 3.0)
    shapes = MoeShapes(*[*(columns[name] for name in NEEDED["moe"]), projections])
    surface, origin = moe_surface_for(device, library)
    load = rank_load_of_distributions(shapes, columns["distribution"].astype(np.str_), remainder=surface.remainder)
    time_s = np.empty(len(shapes.tokens))
    for precision, part in _by_precision(columns):
        at = moe_surface_at(surface, kernel_machine(device, precision))
        time_s[part] = moe_time_s(at, select_moe_shapes(shapes, part), select_rank_loads(load, part))
    inside = is_in_moe_domain(surface, shapes) & _is_as_fitted(columns)
    factor = np.where(columns["pass"] == "backward", GEMM_BACKWARD, 1.0)
    return _prediction(time_s * factor, moe_half_widths(surface, time_s), inside, origin)


def _by_precision(columns: Mapping[str, npt.NDArray[Any]]) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    for precision in np.unique(columns["precision"].astype(np.str_)):
        yield str(precision), columns["precision"] == precision


def _is_as_fitted(columns: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.bool_]:
    """Rows of what the tables hold: forward passes in bf16, or in fp16, which runs at the same rates."""
    is_wide = (columns["precision"] == "bf16") | (columns["precision"] == "fp16")
    return np.asarray(is_wide & (columns["pass"] == "forward"))


def _prediction(
    time_s: FloatArray, half_width: FloatArray, inside: npt.NDArray[np.bool_], origin: SurfaceOrigin
) -> KernelPrediction:
    widened = half_width * np.where(inside, 1.0, EXTRAPOLATION_FACTOR)
    outside = "extrapolated" if origin.is_own else origin.kind
    return KernelPrediction(time_s, widened, [origin.kind if one else outside for one in inside.tolist()])


def _read_rows(operator: str, path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Header, and rows with their lines, of a CSV file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(reader, [])]
            texts = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _wrong(path, None, f"cannot be read as CSV: {error}", "give a CSV file with a header") from None
    problems = _header_problems(operator, path, header)
    for line, row in texts:
        if len(row) != len(header):
            message = f"{len(row)} values under a header of {len(header)}"
            problems += _wrong(path, line, message, "give every row one value per column").problems
    if problems:
        raise FormatError(problems[:MAX_PROBLEMS])
    return header, [(line, dict(zip(header, row, strict=True))) for line, row in texts]


def _header_problems(operator: str, path: Path, header: Sequence[str]) -> list[Problem]:
    problems: list[Problem] = []
    missing = [name for name in NEEDED[operator] if name not in header]
    if missing:
        text = f"column{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing"
        problems += _wrong(path, 1, text, f"{operator} needs {', '.join(NEEDED[operator])}").problems
    for name in dict.fromkeys(header):
        if name in ADDED:
            problems += _wrong(path, 1, f"column {name} is there already", "leave predicted columns out").problems
        if header.count(name) > 1:
            problems += _wrong(path, 1, f"column {name} is given twice", "keep one").problems
    return problems


def _columns(
    operator: str, path: Path, header: Sequence[str], rows: Sequence[tuple[int, Mapping[str, str]]]
) -> dict[str, npt.NDArray[Any]]:
    """Columns of the rows: sizes as numbers, options as text with their defaults; all problems at once."""
    problems: list[Problem] = []
    columns: dict[str, npt.NDArray[Any]] = {}
    for name in NEEDED[operator]:
        sizes = [_size(path, name, row[name], line, problems) for line, row in rows]
        columns[name] = np.array(sizes, dtype=np.float64)
    choices = {
        "precision": ("bf16", ("bf16", "fp16", "fp8", "fp4", "fp32", "tf32", "int8")),
        "is_causal": ("true", ("true", "false")),
        "pass": ("forward", PASSES[operator]),
    }
    for name, (default, legal) in choices.items():
        texts = [(row.get(name, "").strip() or default).lower() for _, row in rows]
        for (line, _), text in zip(rows, texts, strict=True):
            if text not in legal:
                problems += _wrong(path, line, f"{name} is {text!r}", f"choose {', '.join(legal)}").problems
        columns[name] = np.array(texts, dtype=object)
    if operator == "moe":
        columns |= _moe_options(path, columns, rows, problems)
    if problems:
        raise FormatError(problems[:MAX_PROBLEMS])
    return columns


def _moe_options(
    path: Path,
    columns: Mapping[str, npt.NDArray[Any]],
    rows: Sequence[tuple[int, Mapping[str, str]]],
    problems: list[Problem],
) -> dict[str, npt.NDArray[Any]]:
    """Router and kernel of each row; whether its experts can be chosen and spread as it says."""
    distributions = [row.get("distribution", "").strip() or "balanced" for _, row in rows]
    for (line, _), name in zip(rows, distributions, strict=True):
        try:
            power_law_exponent(name)
        except ValueError as error:
            problems += _wrong(path, line, str(error), "write balanced or power_law_1.2").problems
    experts, chosen, ranks = (columns[name] for name in ("num_experts", "topk", "moe_ep_size"))
    for wrong, message, remedy in (
        (experts > MOST_EXPERTS, f"num_experts is above {MOST_EXPERTS}", "write fewer experts"),
        (chosen > experts, "topk is above num_experts", "choose no more experts than there are"),
        (experts % ranks != 0, "num_experts is no multiple of moe_ep_size", "spread experts evenly"),
    ):
        for index in np.flatnonzero(wrong).tolist():
            problems += _wrong(path, rows[index][0], message, remedy).problems
    kernels = [row.get("kernel_source", "").strip() for _, row in rows]
    return {"distribution": np.array(distributions, dtype=object), "kernel_source": np.array(kernels, dtype=object)}


def _size(path: Path, name: str, text: str, line: int, problems: list[Problem]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (1 <= value < MOST_ELEMENTS and value == math.floor(value)):
        problems += _wrong(path, line, f"{name} is {text!r}", "write a whole number of at least 1").problems
        return 1.0
    return value


def _wrong(path: Path, line: int | None, message: str, remedy: str) -> FormatError:
    return FormatError([Problem(code="E-FMT-014", message=message, remedy=remedy, file=str(path), line=line)])
