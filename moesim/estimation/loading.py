"""Load scenarios: text, field checks, checks between fields, hardware, degrees; all problems at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesim.cost.collectives import fabric_rates
from moesim.cost.efficiency_surfaces import device_rates
from moesim.cost.fitted_surfaces import FittedSurfaces
from moesim.cost.operators import Hardware
from moesim.cost.surface_transfer import device_surfaces
from moesim.describe.consistency import Inconsistency, hardware_mismatches, inconsistencies
from moesim.describe.documents import Document, apply_assignments, problems_from_validation, read_document
from moesim.describe.hardware import Cluster, Device, Stack
from moesim.describe.hardware_library import HardwareLibrary
from moesim.describe.scenario import Scenario
from moesim.describe.stack_options import stack_with_options
from moesim.engine.analytical import System
from moesim.engine.drawn_loads import load_law
from moesim.errors import Problem, ScenarioError
from moesim.resources import find_scenario
from moesim.structure.columns import Columns, FloatArray
from moesim.structure.group_tables import group_columns_table
from moesim.structure.legality import legality_rules, resolve_columns
from moesim.structure.token_routing import max_over_mean_load

SUPPORTED_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LoadedScenario:
    """A legal scenario with its hardware, and the document it came from."""

    scenario: Scenario
    system: System
    columns: Columns
    document: Document


def load_scenario(path: str | Path, *, assignments: Sequence[str] = (), profiles: Sequence[Path] = ()) -> Scenario:
    """Read and check a scenario file (or a shipped scenario by its bare name).

    Parameters
    ----------
    path : str or Path
        File, or name of a shipped scenario.
    assignments : sequence of str
        ``PATH=VALUE`` overrides of fields.
    profiles : sequence of Path
        Directories of hardware profiles that go before the shipped ones.

    Raises
    ------
    FormatError
        If the file cannot be read as a document.
    ScenarioError
        If a field, or a combination of fields, is wrong; carries every problem found.
    """
    return load(path, assignments=assignments, library=HardwareLibrary(profiles)).scenario


def load(path: str | Path, *, assignments: Sequence[str] = (), library: HardwareLibrary) -> LoadedScenario:
    """Read a scenario, check it completely and build its system; raises as ``load_scenario``."""
    document = apply_assignments(read_document(find_scenario(str(path))), assignments)
    return load_document(document, library)


def load_document(document: Document, library: HardwareLibrary) -> LoadedScenario:
    """Check a document completely; raises as ``load_scenario``."""
    scenario = validated_scenario(document)
    problems = _located(document, inconsistencies(scenario))
    hardware, hardware_problems = _hardware(document, scenario, library)
    problems += hardware_problems
    if hardware is not None:
        device, cluster, stack = hardware
        problems += _located(document, hardware_mismatches(scenario, device, cluster, stack))
        columns = resolve_columns(group_columns_table(scenario, {}, 1))
        problems += _rule_problems(document, scenario, cluster, columns)
        if not problems:
            system = build_system(scenario, device, cluster, stack, surfaces=device_surfaces(device, library))
            return LoadedScenario(scenario, system, columns, document)
    raise ScenarioError(problems)


def validated_scenario(document: Document) -> Scenario:
    """Field checks only."""
    from pydantic import ValidationError

    version = document.data.get("schema_version")
    if isinstance(version, int) and not isinstance(version, bool) and version != SUPPORTED_SCHEMA_VERSION:
        message = f"schema_version {version} is not supported"
        remedy = f"this moesim reads schema_version {SUPPORTED_SCHEMA_VERSION}"
        raise ScenarioError([document.problem("E-FMT-009", "schema_version", message, remedy)])
    try:
        return Scenario.model_validate(document.data)
    except ValidationError as error:
        raise ScenarioError(list(problems_from_validation(document, error, Scenario))) from None


def _located(document: Document, found: Iterable[Inconsistency]) -> list[Problem]:
    return [document.problem(item.code, item.field, item.message, item.remedy) for item in found]


def _hardware(
    document: Document, scenario: Scenario, library: HardwareLibrary
) -> tuple[tuple[Device, Cluster, Stack] | None, list[Problem]]:
    """Profiles of a scenario, or the problems of those that are missing or wrong."""
    problems: list[Problem] = []
    if library.path("clusters", scenario.cluster) is None:
        problems.append(library.unknown_name("clusters", scenario.cluster, "cluster"))
    if library.path("stacks", scenario.stack) is None:
        problems.append(library.unknown_name("stacks", scenario.stack, "stack"))
    if problems:
        located = [document.problem(item.code, item.field or "", item.message, item.remedy) for item in problems]
        return None, located
    cluster = library.cluster(scenario.cluster)
    return (library.device(cluster.device), cluster, library.stack(scenario.stack)), []


def _rule_problems(document: Document, scenario: Scenario, cluster: Cluster, columns: Columns) -> list[Problem]:
    return [
        document.problem(rule.code, rule.field, rule.text(rule.message, columns, 0), rule.text(rule.remedy, columns, 0))
        for rule in legality_rules(scenario, cluster, columns)
        if rule.breaks[0]
    ]


def build_system(
    scenario: Scenario, device: Device, cluster: Cluster, stack: Stack, *, surfaces: FittedSurfaces
) -> System:
    """Join a scenario with its profiles and work out the rates everything is priced with."""
    stack = stack_with_options(stack, scenario.stack_options)
    hardware = Hardware(
        device=device_rates(device, stack, surfaces=surfaces),
        fabric=fabric_rates(cluster, device, stack),
    )
    return System(scenario, device, cluster, stack, hardware, LoadFactors(scenario))


class LoadFactors:
    """Most loaded expert rank over the mean, by expert degree; each degree is worked out once."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._known: dict[int, float] = {}

    def __call__(self, expert_degrees: FloatArray) -> FloatArray:
        """Load factors for an array of expert degrees, same shape."""
        levels, inverse = np.unique(expert_degrees, return_inverse=True)
        return np.array([self._factor(int(level)) for level in levels])[inverse].reshape(expert_degrees.shape)

    def _factor(self, ranks: int) -> float:
        if ranks not in self._known:
            self._known[ranks] = max_over_mean_load(routed_shares(self._scenario, ranks), ranks)
        return self._known[ranks]


def routed_shares(scenario: Scenario, ranks: int) -> FloatArray:
    """Shares of the experts under the scenario's imbalance, shape (n_draws, num_experts)."""
    moe = scenario.model.moe
    if moe is None:
        return np.ones((1, ranks))
    return load_law(moe.router.imbalance).expected_shares(moe.num_experts, ranks)
