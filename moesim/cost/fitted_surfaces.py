"""The surfaces of one device together, and how far off each was on shapes it had not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moesim.cost.attention_surface import AttentionTimeSurface
from moesim.cost.gemm_surface import GemmSurface
from moesim.cost.moe_surface import MoeTimeSurface

SurfaceOperator = Literal["gemm", "attention", "moe"]
SURFACE_OPERATORS: tuple[SurfaceOperator, ...] = ("gemm", "attention", "moe")
NORMAL_QUANTILE = 1.6448536269514722
"""Two-sided 90 % of a normal distribution."""


@dataclass(frozen=True)
class SurfaceRecord:
    """Where a surface's numbers come from: what an answer's provenance says of it.

    ``error_fraction`` is one relative standard deviation: the 90th percentile of the relative error on held-out shapes
    over 1.645. ``compute_fraction`` is the fraction of peak its formula starts from.
    """

    kind: str
    source: str
    compute_fraction: float
    error_fraction: float


@dataclass(frozen=True)
class FittedSurfaces:
    """Surfaces of one device; None where it has none and the four-constant forms price.

    ``records`` has one entry for each surface there is. ``attention_kernels`` are single kernels by library and pass
    (``cudnn``, ``backward``), which go before the surface where a stack names their library.
    """

    gemm: GemmSurface | None = None
    attention: AttentionTimeSurface | None = None
    moe: MoeTimeSurface | None = None
    records: tuple[tuple[SurfaceOperator, SurfaceRecord], ...] = ()
    attention_kernels: Mapping[tuple[str, str], AttentionTimeSurface] = field(default_factory=dict)


NO_SURFACES = FittedSurfaces()


def fitted_record(operator: SurfaceOperator, document: Mapping[str, Any]) -> SurfaceRecord:
    """Record of a document: held-out errors over all shapes; of the grouped GEMM, of layers a training step has."""
    provenance = document["provenance"]
    if operator == "gemm":
        held_out, constants = provenance["held_out_error"], document["core"]
    elif operator == "attention":
        held_out, constants = provenance["held_out"], document["parameters"]
    else:
        held_out, constants = provenance["formula_held_out"]["> 64 tokens per expert"], document["parameters"]
    return SurfaceRecord(
        kind=provenance.get("kind", "fitted"),
        source=provenance["source"],
        compute_fraction=float(constants["compute_fraction"]),
        error_fraction=float(held_out["p90"]) / NORMAL_QUANTILE,
    )
