"""Shipped scenarios, loaded once per set of overrides."""

from collections.abc import Callable
from functools import cache

import pytest

from moesim.describe.hardware_library import HardwareLibrary
from moesim.estimation.loading import LoadedScenario, load


@pytest.fixture(scope="session")
def shipped() -> Callable[..., LoadedScenario]:
    """``shipped(name, *assignments)``: a shipped scenario with ``PATH=VALUE`` overrides."""
    library = HardwareLibrary()

    @cache
    def loaded(name: str, *assignments: str) -> LoadedScenario:
        return load(name, assignments=assignments, library=library)

    return loaded
