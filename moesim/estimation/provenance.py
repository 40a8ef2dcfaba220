"""Which figures an answer rests on, with unit, kind and source."""

from __future__ import annotations

from collections.abc import Iterator

from moesim.cost.collectives import required_tiers
from moesim.cost.fitted_surfaces import FittedSurfaces
from moesim.describe.quantities import (
    BandwidthFigure,
    BytesFigure,
    Description,
    DurationFigure,
    Figure,
    FlopRateFigure,
    FrequencyFigure,
    PowerFigure,
    PriceFigure,
)
from moesim.engine.analytical import System
from moesim.estimation.step_estimate import SourcedFigure

UNIT_OF_FIGURE: dict[type[Figure], str] = {
    BandwidthFigure: "bytes_per_s",
    BytesFigure: "bytes",
    DurationFigure: "s",
    FlopRateFigure: "flop_per_s",
    FrequencyFigure: "hertz",
    PowerFigure: "watts",
    PriceFigure: "usd_per_hour",
}


def sourced_figures(system: System) -> list[SourcedFigure]:
    """Figures of device, cluster and stack that the estimate read, and the fitted surfaces in their place."""
    surfaces = system.hardware.device.surfaces
    replaced = _replaced(surfaces)
    tiers = required_tiers(system.cluster)
    used_precisions = {system.scenario.precision.compute, "bf16", "fp32"}
    figures = [
        SourcedFigure(
            f"device.surfaces.{operator}.compute_fraction",
            record.compute_fraction,
            "",
            record.kind,
            record.source,
            record.error_fraction,
        )
        for operator, record in surfaces.records
    ]
    for owner, profile in (("device", system.device), ("cluster", system.cluster), ("stack", system.stack)):
        for name, figure in figures_of(profile, owner):
            parts = name.split(".")
            if parts[1] == "peak_flop_rate" and parts[2] not in used_precisions:
                continue
            if parts[1] == "collectives" and parts[2] not in tiers:
                continue
            if parts[1] in ("power", "clock", "l2_cache") or name in replaced:
                continue
            figures.append(
                SourcedFigure(
                    name,
                    figure.value,
                    UNIT_OF_FIGURE.get(type(figure), ""),
                    figure.kind,
                    figure.source,
                    figure.error_fraction,
                )
            )
    return figures


def _replaced(surfaces: FittedSurfaces) -> set[str]:
    """Figures that only the four-constant GEMM reads, where a surface prices instead."""
    if surfaces.gemm is None or surfaces.moe is None:
        return set()
    names = ("compute_fraction", "memory_fraction", "prologue_length")
    return {f"device.kernels.gemm.{name}" for name in names}


def figures_of(value: object, name: str) -> Iterator[tuple[str, Figure]]:
    """All figures below a value, with dotted names."""
    if isinstance(value, Figure):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from figures_of(item, f"{name}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from figures_of(item, f"{name}.{index}")
    elif isinstance(value, Description):
        for key in type(value).model_fields:
            yield from figures_of(getattr(value, key), f"{name}.{key}")
