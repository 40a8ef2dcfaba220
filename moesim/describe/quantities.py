"""Field types of the description models: dimensioned values, counts and sourced figures."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from moesim.units import Dimension, parse_quantity

INT64_MAX = 2**63 - 1

Count = Annotated[int, Field(gt=0, le=INT64_MAX, strict=True)]
NonNegativeCount = Annotated[int, Field(ge=0, le=INT64_MAX, strict=True)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]

Precision = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp4", "int8"]
PRECISION_BYTES: dict[str, float] = {
    "fp64": 8.0,
    "fp32": 4.0,
    "tf32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp4": 0.5,
    "int8": 1.0,
}

FigureKind = Literal["datasheet", "fitted", "transferred", "extrapolated", "assumed"]


class Description(BaseModel):
    """Frozen, closed model from which every description derives: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=False)


def _parser(dimension: Dimension) -> BeforeValidator:
    def parse(value: Any) -> float:
        return parse_quantity(value, dimension)

    return BeforeValidator(parse)


class Figure(Description):
    """A number with its origin; ``error_fraction`` is one relative standard deviation where known."""

    value: PositiveNumber
    kind: FigureKind
    source: Annotated[str, Field(min_length=3)]
    error_fraction: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None


class NumberFigure(Figure):
    """A plain number (a count or a fraction)."""


class BytesFigure(Figure):
    """An amount of data in bytes; text such as ``"32 GiB"``."""

    value: Annotated[PositiveNumber, _parser("bytes")]


class BandwidthFigure(Figure):
    """A data rate in bytes/s; text such as ``"900 GB/s"`` or ``"100 Gb/s"``."""

    value: Annotated[PositiveNumber, _parser("bytes_per_s")]


class FlopRateFigure(Figure):
    """A rate of floating-point operations in FLOP/s; text such as ``"125 TFLOP/s"``."""

    value: Annotated[PositiveNumber, _parser("flop_per_s")]


class DurationFigure(Figure):
    """A time in seconds; text such as ``"2.5 us"``."""

    value: Annotated[float, Field(ge=0, allow_inf_nan=False), _parser("seconds")]

    @classmethod
    def fitted(cls, seconds: float, source: str, error_fraction: float | None = None) -> DurationFigure:
        """Return a fitted time given in seconds, which profiles write with a unit."""
        return cls.model_construct(value=seconds, kind="fitted", source=source, error_fraction=error_fraction)


class FrequencyFigure(Figure):
    """A frequency in Hz; text such as ``"1.53 GHz"``."""

    value: Annotated[PositiveNumber, _parser("hertz")]


class PowerFigure(Figure):
    """A power in watts; text such as ``"300 W"``."""

    value: Annotated[PositiveNumber, _parser("watts")]


class PriceFigure(Figure):
    """A price in US dollars per hour; text such as ``"3.06 USD/h"``."""

    value: Annotated[PositiveNumber, _parser("usd_per_hour")]
