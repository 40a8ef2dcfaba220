"""moesim: a simulator and cost model for Mixture-of-Experts cluster performance.

Names are resolved when first used (PEP 562), so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesim.describe.scenario import Scenario
    from moesim.estimation.estimate import estimate
    from moesim.estimation.loading import load_scenario
    from moesim.estimation.simulated_step import SimulatedStep
    from moesim.estimation.simulation import simulate
    from moesim.estimation.spaces import Space, read_space
    from moesim.estimation.step_estimate import StepEstimate
    from moesim.estimation.tables import EstimateTable, estimate_many

__version__ = "0.1.0"

__all__ = [
    "EstimateTable",
    "Scenario",
    "SimulatedStep",
    "Space",
    "StepEstimate",
    "estimate",
    "estimate_many",
    "load_scenario",
    "read_space",
    "simulate",
]

_HOMES = {
    "EstimateTable": "moesim.estimation.tables",
    "Scenario": "moesim.describe.scenario",
    "SimulatedStep": "moesim.estimation.simulated_step",
    "Space": "moesim.estimation.spaces",
    "StepEstimate": "moesim.estimation.step_estimate",
    "estimate": "moesim.estimation.estimate",
    "estimate_many": "moesim.estimation.tables",
    "load_scenario": "moesim.estimation.loading",
    "read_space": "moesim.estimation.spaces",
    "simulate": "moesim.estimation.simulation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moesim' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
