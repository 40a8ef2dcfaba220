"""Facts of published training runs: a row of the table, what is missing in it, what was assumed."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moesim.errors import FormatError, Problem

RUNS_FILES = ("runs.csv", "published_runs.csv")
"""Names a table has in a folder, the one carried into ``validation/published`` first."""
DEVICES_PER_PUBLISHED: dict[str, int] = {"TPU v3": 2}
"""The table counts chips; moesim counts what the framework calls a device."""


class UnpredictableRunError(LookupError):
    """A run that cannot be turned into a scenario: the field, and why."""

    def __init__(self, field_name: str, why: str) -> None:
        super().__init__(field_name, why)
        self.field, self.why = field_name, why


@dataclass(frozen=True)
class PublishedRun:
    """Facts of one published run, as text under the names of the table's columns."""

    facts: Mapping[str, str]

    @property
    def id(self) -> str:
        """Name of the row."""
        return self.facts["id"]

    def text(self, name: str) -> str:
        """Text of a column, empty where the source says nothing."""
        return (self.facts.get(name) or "").strip()

    def number(self, name: str) -> float | None:
        """Number in a column; None if empty or no number."""
        try:
            return float(self.text(name))
        except ValueError:
            return None

    def count(self, name: str, default: int | None = None) -> int:
        """Whole number in a column; zero counts as missing where there is no default.

        Raises
        ------
        UnpredictableRunError
            If it is missing and there is no default.
        """
        value = self.number(name)
        if value is not None and (value > 0 or default is not None):
            return int(value)
        if default is None:
            raise UnpredictableRunError(name, "not published")
        return default

    @property
    def devices(self) -> int:
        """Devices as moesim counts them."""
        return self.count("n_devices") * DEVICES_PER_PUBLISHED.get(self.text("device"), 1)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether model or attention is described as encoder-decoder."""
        return re.search(r"enc-dec|decoder adds", self.text("model") + self.text("attention")) is not None

    @property
    def is_tpu(self) -> bool:
        """Whether the run is on TPU, where one compiled program fixes other defaults."""
        return self.text("device").startswith("TPU")

    @property
    def software(self) -> str:
        """Framework, version and options in lower case, for patterns."""
        return " ".join(self.text(name) for name in ("framework", "date_or_version", "other_opts")).lower()


def read_published_runs(data: Path) -> list[PublishedRun]:
    """Read a table of runs, or the one in a folder (``RUNS_FILES``); rows of tier D (known bad) are left out.

    Raises
    ------
    FormatError
        If the file cannot be read or lacks a column.
    """
    inside = [data / name for name in RUNS_FILES]
    path = data if data.is_file() else next((one for one in inside if one.is_file()), inside[0])
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        return [PublishedRun(row) for row in rows if row["id"] and row["tier"] != "D"]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        problem = Problem(
            code="E-FMT-014",
            message=f"not a table of published runs: {type(error).__name__} {error}",
            remedy="write one with scripts/carry_published_runs.py",
            file=str(path),
        )
        raise FormatError([problem]) from None


@dataclass
class Assumptions:
    """What was filled in, by dotted path of the scenario."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, why: str) -> None:
        """Note why a field has the value it has."""
        self.reasons[path] = why
