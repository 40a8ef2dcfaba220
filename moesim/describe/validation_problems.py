"""Pydantic's errors as problems: dotted path, line, the value that was found, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesim.describe.field_types import (
    ExpectedType,
    Place,
    either,
    key_homes,
    legal_choices,
    locate,
    phrase,
    shown_value,
    tags,
)
from moesim.errors import MoesimError, Problem, nearest_name

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

    from moesim.describe.documents import Document

INT64_MAX = 2**63 - 1
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}
_LENGTHS = {
    "too_short": ("min_length", "at least"),
    "too_long": ("max_length", "at most"),
    "string_too_short": ("min_length", "at least"),
    "string_too_long": ("max_length", "at most"),
}


@dataclass(frozen=True, slots=True)
class _Finding:
    """What an error says, before it is put into a document."""

    code: str
    path: str
    message: str
    remedy: str


def problems_from_validation(document: Document, error: ValidationError, model: type[BaseModel]) -> tuple[Problem, ...]:
    """Turn every error of a failed validation into a problem.

    Parameters
    ----------
    document : Document
        What was validated; it gives the lines.
    error : ValidationError
        What pydantic raised.
    model : type of BaseModel
        The model that was validated.

    Returns
    -------
    tuple of Problem
        In pydantic's order. Of an untagged union only the alternative that comes closest is reported.

    Notes
    -----
    A validator may raise any `MoesimError`, such as a `ScenarioError` with several problems: their fields are then
    taken as relative to the place of the validator.
    """
    details = error.errors(include_url=False)
    places = [locate(model, detail["loc"]) for detail in details]
    findings: dict[_Finding, None] = {}
    for place, detail in _closest_alternatives(list(zip(places, details, strict=True))):
        findings.update(dict.fromkeys(_findings(place, detail, model)))
    return tuple(document.problem(found.code, found.path, found.message, found.remedy) for found in findings)


def _closest_alternatives(errors: list[tuple[Place, ErrorDetails]]) -> list[tuple[Place, ErrorDetails]]:
    """Keep, of the alternatives of each untagged union, the errors of the one that comes closest."""
    for level in range(max((len(place.alternatives) for place, _ in errors), default=0)):
        ranks: dict[str, dict[str, tuple[int, int]]] = {}
        for place, detail in errors:
            if level < len(place.alternatives):
                tried = place.alternatives[level]
                nearest, count = ranks.setdefault(tried.path, {}).get(tried.name, (4, 0))
                ranks[tried.path][tried.name] = (min(nearest, _distance(place, detail, tried.path)), count + 1)
        closest = {path: min(members, key=members.__getitem__) for path, members in ranks.items()}
        errors = [
            (place, detail)
            for place, detail in errors
            if level >= len(place.alternatives)
            or closest[place.alternatives[level].path] == place.alternatives[level].name
        ]
    return errors


def _distance(place: Place, detail: ErrorDetails, union_path: str) -> int:
    """Rank how far a value is from an alternative: wrong inside, out of range, another choice, another type."""
    if place.path != union_path:
        return 0
    kind = detail["type"]
    if kind in _BOUNDS or kind in _LENGTHS or kind in ("finite_number", "value_error"):
        return 1
    return 2 if kind in ("literal_error", "enum") else 3


def _findings(place: Place, detail: ErrorDetails, model: type[BaseModel]) -> list[_Finding]:
    """Say what one pydantic error means."""
    kind, context = detail["type"], detail.get("ctx", {})
    unions_here = (tried.union for tried in place.alternatives if tried.path == place.path)
    expected = next(unions_here, place.expected)
    if kind == "value_error" and isinstance(cause := context.get("error"), Exception):
        return _from_validator(place.path, cause)
    if kind == "extra_forbidden":
        return [_unknown_key(place, model)]
    if kind == "missing":
        remedy = f"add '{place.path.rpartition('.')[2]}', {phrase(expected)}"
        return [_Finding("E-SCN-002", place.path, "the key is missing", remedy)]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return [_wrong_tag(place, detail)]
    if kind in ("literal_error", "enum") and isinstance(detail["input"], str | int | float):
        return [_wrong_choice(place.path, detail["input"], expected)]
    if kind in _BOUNDS or kind in _LENGTHS or kind in ("finite_number", "int_parsing_size"):
        return [_out_of_range(place, detail)]
    if kind == "assertion_error":
        return [_Finding("E-SCN-011", place.path, detail["msg"], "correct the values of this part")]
    return [_wrong_type(place.path, detail, expected)]


def _from_validator(path: str, cause: Exception) -> list[_Finding]:
    """Pass on what a validator of ours raised."""
    if isinstance(cause, MoesimError):
        return [
            _Finding(one.code, ".".join(filter(None, (path, one.field))), one.message, one.remedy)
            for one in cause.problems
        ]
    message, _, remedy = str(cause).partition("; ")
    code = str(getattr(cause, "code", "E-SCN-011"))
    return [_Finding(code, path, message, remedy)]


def _unknown_key(place: Place, model: type[BaseModel]) -> _Finding:
    """Name the key that was probably meant: a similar one here, or the same one elsewhere."""
    key = place.path.rpartition(".")[2]
    legal = list(place.parent.model_fields) if place.parent is not None else []
    nearest = nearest_name(key, legal)
    home = next(key_homes(model, key), None)
    if nearest is not None:
        remedy = f"did you mean '{nearest}'?"
    elif home is not None:
        remedy = f"'{key}' belongs at {home}"
    else:
        remedy = f"remove it; the keys here are {', '.join(legal)}" if legal else "remove it"
    return _Finding("E-SCN-001", place.path, f"unknown key {shown_value(key)}", remedy)


def _wrong_tag(place: Place, detail: ErrorDetails) -> _Finding:
    """Name the legal tags of a tagged union."""
    key = place.expected.discriminator or str(detail.get("ctx", {}).get("discriminator", "kind")).strip("'")
    legal = [tag for member in place.expected.members for tag in tags(member, key)]
    path = f"{place.path}.{key}" if place.path else key
    listed = either([shown_value(tag) for tag in legal])
    found = detail["input"]
    if detail["type"] == "union_tag_not_found":
        return _Finding("E-SCN-002", path, "the key is missing", f"add '{key}', {listed}")
    value = found.get(key) if isinstance(found, Mapping) else found
    return _choice_finding(path, value, listed, legal)


def _wrong_choice(path: str, value: object, expected: ExpectedType) -> _Finding:
    """Name the legal choices and the nearest one."""
    choices = legal_choices(expected)
    if path == "schema_version":
        listed = " and ".join(shown_value(choice) for choice in choices)
        message = f"version {shown_value(value)} is not known; this moesim reads {listed}"
        return _Finding("E-FMT-009", path, message, f"write schema_version: {shown_value(choices[-1])}")
    return _choice_finding(path, value, phrase(expected), [choice for choice in choices if isinstance(choice, str)])


def _choice_finding(path: str, value: object, listed: str, legal: list[str]) -> _Finding:
    nearest = nearest_name(value, legal) if isinstance(value, str) else None
    message = f"found {shown_value(value)}, but {listed} is needed"
    remedy = f"did you mean '{nearest}'?" if nearest is not None else "write one of these"
    return _Finding("E-SCN-010", path, message, remedy)


def _out_of_range(place: Place, detail: ErrorDetails) -> _Finding:
    """Give the legal value that is nearest."""
    kind, value = detail["type"], detail["input"]
    context: Mapping[str, Any] = detail.get("ctx", {})
    found = f"found {shown_value(value)}"
    if kind == "finite_number":
        message, remedy = f"{found}, but a finite number is needed", "write a finite number"
    elif kind == "int_parsing_size" or (kind == "less_than_equal" and context["le"] == INT64_MAX):
        message, remedy = f"{found}, which is beyond 64 bits", f"use at most {INT64_MAX}"
    elif kind in _LENGTHS:
        key, words = _LENGTHS[kind]
        unit = "character" if isinstance(value, str) else "element"
        message = f"{found}, but {words} {context[key]} {unit}{' is' if context[key] == 1 else 's are'} needed"
        remedy = f"write {words} {context[key]}"
    else:
        key, words = _BOUNDS[kind]
        bound = context[key]
        message = f"{found}, but it must be {words} {_short(bound)}"
        is_count = int in place.expected.members and kind in ("greater_than", "less_than")
        nearest = {"greater_than": f"at least {_short(bound + 1)}", "less_than": f"at most {_short(bound - 1)}"}
        remedy = f"use {nearest[kind] if is_count else f'{words} {_short(bound)}'}"
    return _Finding("E-SCN-007", place.path, message, remedy)


def _short(bound: int | float) -> str:
    return str(int(bound)) if isinstance(bound, float) and bound.is_integer() and abs(bound) < 1e15 else str(bound)


def _wrong_type(path: str, detail: ErrorDetails, expected: ExpectedType) -> _Finding:
    """Say what was found and what is needed; advise the same value in the right form if there is one."""
    value = detail["input"]
    needed = phrase(expected)
    if needed == "another value":
        needed = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    kind = {str: "text", int: "a number", float: "a number"}.get(type(value))
    message = f"found {shown_value(value)}{f' ({kind})' if kind else ''}, but {needed} is needed"
    remedy = f"write {needed}"
    if int in expected.members and isinstance(value, float) and value.is_integer() and abs(value) <= INT64_MAX:
        remedy = f"write {int(value)}"
    elif isinstance(value, str) and {int, float} & set(expected.members) and _is_number(value):
        remedy = f"write {value} without quotes"
    elif isinstance(value, int | float) and str in expected.members and not isinstance(value, bool):
        remedy = f'write "{value}" in quotes'
    return _Finding("E-SCN-006", path, message, remedy)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
