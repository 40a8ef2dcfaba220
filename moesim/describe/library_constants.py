"""Fitted constants of communication libraries: JSON files that a stack's tiers name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesim.errors import FormatError, Problem, nearest_name

LIBRARIES = "libraries"
NAMES = ("library", "all_to_all_library")


def expanded_stack(data: Any, directories: Sequence[Path], path: Path) -> Any:
    """A stack's document with the constants of the libraries its tiers name; the tier's own keys go before.

    An ``all_to_all_library`` replaces what ``library`` says of all-to-alls, its quick protocol too.

    Parameters
    ----------
    data : any
        Document of a stack as read.
    directories : sequence of Path
        Directories of profiles, the user's first.
    path : Path
        The stack's file, for messages.

    Returns
    -------
    any
        The document; unchanged where no tier names a library, or where it is not of the form of a stack.

    Raises
    ------
    FormatError
        If a library does not exist or cannot be read.
    """
    tiers = data.get("collectives") if isinstance(data, dict) else None
    if not isinstance(tiers, dict):
        return data
    expanded = {}
    for tier, stated in tiers.items():
        if not isinstance(stated, dict):
            return data
        constants: dict[str, Any] = {}
        for key in NAMES:
            if isinstance(stated.get(key), str):
                if key == "all_to_all_library":
                    constants.pop("quick_all_to_all", None)
                constants.update(library_figures(stated[key], directories, path, f"collectives.{tier}.{key}"))
        expanded[tier] = {**constants, **stated}
    return {**data, "collectives": expanded}


def library_figures(name: str, directories: Sequence[Path], path: Path, field: str) -> dict[str, Any]:
    """Constants of a library as figures, in the keys of a tier; raises as ``expanded_stack``."""
    folders = [directory / LIBRARIES for directory in directories]
    found = next((folder / f"{name}.json" for folder in folders if (folder / f"{name}.json").is_file()), None)
    if found is None:
        near = nearest_name(name, sorted(file.stem for folder in folders for file in folder.glob("*.json")))
        remedy = f"did you mean {near!r}?" if near else "see hardware_profiles/libraries"
        message = f"no communication library is called {name!r}"
        raise FormatError([Problem(code="E-SCN-009", message=message, remedy=remedy, file=str(path), field=field)])
    try:
        document = json.loads(found.read_text(encoding="utf-8"))
        return _figures(document["constants"], document)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"not a communication library: {type(error).__name__} {error}"
        remedy = "see hardware_profiles/README.md for the keys of a library"
        raise FormatError([Problem(code="E-FMT-014", message=message, remedy=remedy, file=str(found))]) from None


def _figures(constants: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Each constant with the library's kind, source and error: latencies have another error than fractions."""
    figures: dict[str, Any] = {}
    for key, value in constants.items():
        if isinstance(value, dict):
            figures[key] = _figures(value, document)
        else:
            error = (
                document["latency_error_fraction"] if isinstance(value, str) else document["fraction_error_fraction"]
            )
            kind, source = document["kind"], document["source"]
            figures[key] = {"value": value, "kind": kind, "source": source, "error_fraction": error}
    return figures
