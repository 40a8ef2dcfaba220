"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
ProfilesOption = Annotated[
    list[Path] | None,
    typer.Option("--profiles", metavar="DIR", help="Folder of hardware profiles that go before the shipped ones."),
]
SampleOption = Annotated[
    Literal["median", "minimum"],
    typer.Option("--time", help="Of the samples of a case; minimum where other programs disturbed them."),
]
