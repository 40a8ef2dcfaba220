"""The suites: each lists its cases, the most valuable first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from moesim.measurement.cases import Case, Target
from moesim.measurement.suites import (
    attentions,
    decodes,
    dispatches,
    eight_bit,
    gemms,
    grouped_gemms,
    launches,
    memory_bound,
    moe_layers,
    optimizer_steps,
    routers,
    transformer_blocks,
)

SUITES: Mapping[str, Callable[[Target], list[Case]]] = MappingProxyType(
    {
        "gemm": gemms.cases,
        "grouped_gemm": grouped_gemms.cases,
        "attention": attentions.cases,
        "memory_bound": memory_bound.cases,
        "dispatch": dispatches.cases,
        "router": routers.cases,
        "optimizer": optimizer_steps.cases,
        "launch": launches.cases,
        "eight_bit": eight_bit.cases,
        "decode": decodes.cases,
        "moe_layer": moe_layers.cases,
        "transformer_block": transformer_blocks.cases,
    }
)
"""Names as the command line takes them."""
