"""Where profiles and scenarios lie: in a checkout (editable install) or inside the wheel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PROFILES, SCENARIOS = "hardware_profiles", "scenarios"


def data_directory(name: str) -> Path:
    """Directory of shipped data: beside the package in a checkout, else in its ``_data``.

    Raises
    ------
    FileNotFoundError
        If neither exists: the installation is damaged.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package.parent / name, package / "_data" / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"moesim's {name} are missing; install moesim again")


def find_scenario(text: str) -> Path:
    """Path of a scenario: as given, or the shipped scenario of that bare name."""
    path = Path(text)
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    shipped = data_directory(SCENARIOS) / f"{text}.yaml"
    return shipped if shipped.exists() else path


def shipped_scenarios() -> list[Path]:
    """All shipped scenarios, by name."""
    return sorted(data_directory(SCENARIOS).glob("*.yaml"))


def profile_directories(extra: Sequence[Path] = ()) -> list[Path]:
    """Directories that are searched for profiles: the user's first, then the shipped ones."""
    return [*extra, data_directory(PROFILES)]
