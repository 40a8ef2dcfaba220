"""The suites over several ranks: each lists its cases, the most valuable first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from moesim.measurement.cases import Case
from moesim.measurement.distributed.suites import collectives, expert_layers, overlaps, train_steps
from moesim.measurement.distributed.targets import DistributedTarget

DISTRIBUTED_SUITES: Mapping[str, Callable[[DistributedTarget], list[Case]]] = MappingProxyType(
    {
        "collectives": collectives.cases,
        "overlap": overlaps.cases,
        "moe_layer": expert_layers.cases,
        "train_step": train_steps.cases,
        "memory": train_steps.memory_cases,
    }
)
"""Names as the command line takes them."""

NEEDS_SEVERAL = ("collectives", "overlap")
"""Suites that say nothing about a rank alone."""
