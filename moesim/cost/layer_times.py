"""Sum operation costs into the times of a layer or an end of the model, by phase and category."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moesim.cost.operators import Hardware, OperationCost, price_all
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import HostWork, Operation, OperationTable

FORWARD, BACKWARD = "forward", "backward"
COMMUNICATION_STREAMS: tuple[str, ...] = (
    "tensor_parallel",
    "expert_tensor_parallel",
    "context_parallel",
    "all_to_all",
)
REPORTED_AS: dict[str, str] = {"expert_tensor_parallel": "tensor_parallel"}
"""Streams that an answer counts with another."""


@dataclass
class PhaseTimes:
    """Times of one phase of one table, arrays (n_cases,).

    ``compute_s`` and ``communication_s`` by category at mean load; ``imbalance_s`` what the fullest rank adds;
    ``weight_gradient_s`` what weight gradients take of both; ``ideal_*`` at peak rates; ``kernels`` launched, ``host``
    what the host issues.
    """

    compute_s: dict[str, FloatArray] = field(default_factory=dict)
    communication_s: dict[str, FloatArray] = field(default_factory=dict)
    imbalance_s: FloatArray | float = 0.0
    weight_gradient_s: FloatArray | float = 0.0
    ideal_compute_s: FloatArray | float = 0.0
    ideal_communication_s: dict[str, FloatArray] = field(default_factory=dict)
    flops: FloatArray | float = 0.0
    kernels: int = 0
    host: HostWork = field(default_factory=HostWork)

    def add(self, operation: Operation, cost: OperationCost) -> None:
        """Add one operation."""
        stream = operation.stream
        if stream == "compute":
            _add(self.compute_s, operation.category, cost.time_s)
            self.ideal_compute_s = self.ideal_compute_s + cost.ideal_s
        else:
            _add(self.communication_s, stream, cost.time_s)
            _add(self.ideal_communication_s, stream, cost.ideal_s)
        if operation.load_factor is not None:
            self.imbalance_s = self.imbalance_s + cost.extra_s
        if operation.phase == "weight_gradient" and stream == "compute":
            extra_s = 0.0 if operation.load_factor is None else cost.extra_s
            self.weight_gradient_s = self.weight_gradient_s + cost.time_s + extra_s
        self.flops = self.flops + cost.flops
        self.kernels += operation.kernels


@dataclass
class PricedTable:
    """Phases of one operation table, and the forward work that selective recompute repeats.

    ``operations`` are those of the table with the cost of each.
    """

    name: str
    forward: PhaseTimes
    backward: PhaseTimes
    selective: PhaseTimes
    operations: tuple[tuple[Operation, OperationCost], ...] = ()


def _add(totals: dict[str, FloatArray], key: str, value: FloatArray) -> None:
    totals[key] = totals[key] + value if key in totals else value


def price_table(table: OperationTable, hardware: Hardware) -> PricedTable:
    """Price every operation of a table once per case; without a backward pass the host issues none."""
    has_backward = any(operation.phase != "forward" for operation in table.operations)
    backward = PhaseTimes(host=table.backward_host if has_backward else HostWork())
    operations = tuple(zip(table.operations, price_all(table.operations, hardware), strict=True))
    priced = PricedTable(table.name, PhaseTimes(host=table.forward_host), backward, PhaseTimes(), operations)
    for operation, cost in operations:
        phase = priced.forward if operation.phase == "forward" else priced.backward
        phase.add(operation, cost)
        if operation.is_recomputed_selectively:
            priced.selective.add(operation, cost)
    return priced


def total_s(times: dict[str, FloatArray]) -> FloatArray | float:
    """Sum over categories or streams."""
    total: FloatArray | float = 0.0
    for value in times.values():
        total = np.add(total, value)
    return total
