"""Judge kernel-time models on shapes they were not fitted on, and write the error tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moesim.cost.gemm_surface import GemmSurface
from moesim.study.fit_gemm import (
    CrossValidation,
    GemmTable,
    fit_and_judge,
    gemm_table,
    machine_of_device,
    surface_document,
    write_surface,
)
from moesim.study.kernel_tables import (
    GEMM_COLUMNS,
    BoolArray,
    ErrorStatistics,
    FloatArray,
    IntArray,
    conformal_half_widths,
    coverage,
    error_statistics,
    kernel_table_paths,
    read_kernel_table,
)

LEVEL = 0.9
WORST_SHAPES = 10
GEMM_TARGETS: dict[str, dict[str, tuple[float, float]]] = {
    "a100_sxm": {"all": (0.055, 0.18), "m, n, k >= 512": (0.035, 0.12)},
    "h100_sxm": {"all": (0.04, 0.11)},
    "h200_sxm": {"all": (0.04, 0.11)},
    "b200_sxm": {"all": (0.055, 0.15)},
    "gb200": {"all": (0.055, 0.15)},
    "l40s": {"all": (0.12, 0.35)},
}
"""Median and 90th percentile of the error that a device's rows must stay within; others are only reported."""
COVERAGE_TARGET = (0.85, 0.95)


@dataclass(frozen=True)
class WorstShape:
    """A held-out shape and the median of its rows' absolute errors.

    ``row`` names the row with the largest error, ``measured_us`` and ``predicted_us`` are its times.
    """

    shape: str
    median_error: float
    rows: int
    row: str
    measured_us: float
    predicted_us: float


@dataclass(frozen=True)
class DeviceValidation:
    """Held-out errors of one device: ``errors`` and ``coverages`` by regime, in the order they are printed."""

    device: str
    errors: Mapping[str, ErrorStatistics]
    coverages: Mapping[str, float]
    worst_shapes: Sequence[WorstShape]
    targets: Mapping[str, tuple[float, float]]

    @property
    def failures(self) -> list[str]:
        """Targets that were missed, one sentence each."""
        found = []
        for regime, (median, p90) in self.targets.items():
            error = self.errors[regime]
            if error.count and (error.median > median or error.p90 > p90):
                found.append(f"{self.device}, {regime}: {error} exceeds {median:.1%} / {p90:.1%}")
        covered = self.coverages["all"]
        if not COVERAGE_TARGET[0] <= covered <= COVERAGE_TARGET[1]:
            found.append(f"{self.device}: the {LEVEL:.0%} interval covers {covered:.1%} of the rows")
        return found


@dataclass(frozen=True)
class KernelValidation:
    """Held-out errors of one operator on all devices that have a table."""

    operator: str
    shape_key: str
    method: str
    seed: int
    folds: int
    devices: Sequence[DeviceValidation]

    @property
    def failures(self) -> list[str]:
        """Targets that were missed on any device."""
        return [failure for device in self.devices for failure in device.failures]


def validate_device(
    device: str,
    *,
    predicted_s: FloatArray,
    measured_s: FloatArray,
    folds: IntArray,
    regimes: Mapping[str, BoolArray],
    shapes: Sequence[str],
    rows: Sequence[str],
    targets: Mapping[str, tuple[float, float]],
    groups: npt.ArrayLike | None = None,
) -> DeviceValidation:
    """Judge held-out predictions of one device; serves every operator.

    Parameters
    ----------
    device : str
        Device id.
    predicted_s, measured_s : ndarray of shape (n_rows,)
        Held-out prediction and measurement.
    folds : ndarray of shape (n_rows,)
        Fold of every row; intervals are calibrated on the others.
    regimes : mapping of str to ndarray of shape (n_rows,)
        Which rows each line of the report counts; ``all`` must be among them.
    shapes, rows : sequence of n_rows str
        Name of the held-out shape of every row, and of what varies within it.
    targets : mapping of str to pair of float
        Median and 90th percentile that a regime must stay within.
    groups : array_like of shape (n_rows,), optional
        Rows of one group are calibrated on rows of that group only.

    Returns
    -------
    DeviceValidation
        Errors, coverage and the worst shapes.
    """
    log_errors = np.log(measured_s / predicted_s)
    widths = conformal_half_widths(log_errors, folds, sizes=predicted_s, groups=groups, level=LEVEL)
    return DeviceValidation(
        device=device,
        errors={name: error_statistics(predicted_s[kept], measured_s[kept]) for name, kept in regimes.items()},
        coverages={name: coverage(log_errors[kept], widths[kept]) for name, kept in regimes.items()},
        worst_shapes=_worst_shapes(predicted_s, measured_s, shapes, rows),
        targets=targets,
    )


def _worst_shapes(
    predicted_s: FloatArray, measured_s: FloatArray, shapes: Sequence[str], rows: Sequence[str]
) -> list[WorstShape]:
    names, shape_of_row = np.unique(np.asarray(shapes), return_inverse=True)
    error = np.abs(predicted_s / measured_s - 1.0)
    medians = np.array([np.median(error[shape_of_row == index]) for index in range(names.size)])
    worst = []
    for index in np.argsort(-medians, kind="stable")[:WORST_SHAPES]:
        members = np.flatnonzero(shape_of_row == index)
        row = members[np.argmax(error[members])]
        times = (float(measured_s[row] * 1e6), float(predicted_s[row] * 1e6))
        worst.append(WorstShape(str(names[index]), float(medians[index]), members.size, rows[row], *times))
    return worst


@dataclass(frozen=True)
class FittedGemm:
    """A device's GEMM table, the surface fitted on all of it, and its held-out predictions."""

    device: str
    table: GemmTable
    surface: GemmSurface
    held_out: CrossValidation


def fit_gemm_tables(
    directory: Path, *, seed: int = 0, devices: Sequence[str] | None = None, folds: int = 5
) -> list[FittedGemm]:
    """Fit and cross-validate the GEMM surface of every device that has a table.

    Parameters
    ----------
    directory : Path
        Folder of the kernel tables.
    seed : int, optional
        Seed of folds and fits.
    devices : sequence of str, optional
        Only these.
    folds : int, optional
        Folds of whole shapes.

    Returns
    -------
    list of FittedGemm
        By device, sorted.
    """
    fitted = []
    for device, path in kernel_table_paths(directory, "gemm").items():
        if devices is None or device in devices:
            table = gemm_table(read_kernel_table(path, GEMM_COLUMNS))
            surface, held_out = fit_and_judge(table, machine_of_device(device), seed=seed, folds=folds)
            fitted.append(FittedGemm(device, table, surface, held_out))
    return fitted


def validate_gemm(directory: Path, *, seed: int = 0, fitted: Sequence[FittedGemm] | None = None) -> KernelValidation:
    """Held-out errors of the GEMM surfaces, five folds by (n, k).

    Parameters
    ----------
    directory : Path
        Folder of the kernel tables.
    seed : int, optional
        Seed of folds and fits.
    fitted : sequence of FittedGemm, optional
        What :func:`fit_gemm_tables` returned for the same folder and seed, if it has been run already.

    Returns
    -------
    KernelValidation
        Errors by device and regime.
    """
    results = fit_gemm_tables(directory, seed=seed) if fitted is None else fitted
    return KernelValidation(
        operator="gemm",
        shape_key="(n, k)",
        method=(
            "One formula with 14 constants per device (tile choice, waves, latency of the main loop, split of k, "
            "prologue, HBM and L2 traffic, launch floor) times a grid of 200 residuals, kept monotone. Formula, grid "
            "and misalignment are refitted for every fold without the shapes it is judged on."
        ),
        seed=seed,
        folds=max(int(result.held_out.folds.max()) + 1 for result in results),
        devices=[_validate_gemm_device(result) for result in results],
    )


def _validate_gemm_device(fitted: FittedGemm) -> DeviceValidation:
    table = fitted.table
    sizes = np.stack([table.m, table.n, table.k]).astype(np.int64)
    return validate_device(
        fitted.device,
        predicted_s=fitted.held_out.predicted_s,
        measured_s=table.time_s,
        folds=fitted.held_out.folds,
        regimes=gemm_regimes(table),
        shapes=[f"n {n}, k {k}" for _, n, k in sizes.T],
        rows=[f"m {m}" for m in sizes[0]],
        targets=GEMM_TARGETS.get(fitted.device, {}),
        groups=table.is_aligned,
    )


def gemm_regimes(table: GemmTable) -> dict[str, BoolArray]:
    """Rows of each line of the GEMM report."""
    is_any = np.ones(table.m.shape, dtype=np.bool_)
    return {
        "all": is_any,
        "at least 1 GFLOP": table.flops >= 1e9,
        "m, n, k >= 512": np.minimum(np.minimum(table.m, table.n), table.k) >= 512,
        "m <= 64": table.m <= 64,
        "n or k not a multiple of 64": ~table.is_aligned,
    }


def write_gemm_surfaces(fitted: Sequence[FittedGemm], folder: Path, *, seed: int) -> list[Path]:
    """Write the surface of each device to ``gemm_<device>.json`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in fitted:
        path = folder / f"gemm_{result.device}.json"
        write_surface(path, surface_document(result.device, result.surface, result.table, result.held_out, seed=seed))
        paths.append(path)
    return paths


def write_kernel_report(validation: KernelValidation, folder: Path) -> list[Path]:
    """Write ``<operator>.md`` and ``<operator>.csv`` to a folder.

    Parameters
    ----------
    validation : KernelValidation
        What to write.
    folder : Path
        Where; made if there is none.

    Returns
    -------
    list of Path
        The two files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{validation.operator}.md", folder / f"{validation.operator}.csv"]
    paths[0].write_text(kernel_report(validation), encoding="utf-8")
    paths[1].write_text(_summary_csv(validation), encoding="utf-8")
    return paths


def kernel_report(validation: KernelValidation) -> str:
    """Report as Markdown: errors by device and regime, then each device's worst shapes."""
    lines = [
        f"# {validation.operator}: times of shapes not fitted on",
        "",
        f"{validation.folds} folds by {validation.shape_key}, seed {validation.seed}. Median and 90th percentile of "
        f"|predicted / measured − 1|, bias the median signed error. The {LEVEL:.0%} interval is split conformal, "
        "calibrated on the other folds by predicted time.",
        "",
        validation.method,
        "",
        "| device | rows | count | median | p90 | bias | covered | target |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for device in validation.devices:
        for regime, error in device.errors.items():
            target = device.targets.get(regime)
            verdict = "" if target is None else f"{target[0]:.1%} / {target[1]:.1%}"
            lines.append(
                f"| {device.device} | {regime} | {error.count} | {error.median:.1%} | {error.p90:.1%} | "
                f"{error.bias:+.1%} | {device.coverages[regime]:.1%} | {verdict} |"
            )
    lines += ["", "Missed targets: " + ("; ".join(validation.failures) or "none") + "."]
    for device in validation.devices:
        lines += ["", f"## {device.device}: worst shapes", ""]
        lines += ["| shape | median error | rows | worst row | measured us | predicted us |"]
        lines += ["| --- | ---: | ---: | --- | ---: | ---: |"]
        lines += [
            f"| {worst.shape} | {worst.median_error:.1%} | {worst.rows} | {worst.row} | "
            f"{worst.measured_us:.1f} | {worst.predicted_us:.1f} |"
            for worst in device.worst_shapes
        ]
    return "\n".join(lines) + "\n"


def _summary_csv(validation: KernelValidation) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["device", "rows", "count", "median", "p90", "bias", "covered"])
    for device in validation.devices:
        for regime, error in device.errors.items():
            numbers = (error.median, error.p90, error.bias, device.coverages[regime])
            writer.writerow([device.device, regime, error.count, *(f"{number:.4f}" for number in numbers)])
    return stream.getvalue()
