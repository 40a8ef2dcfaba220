"""What a description model expects at a place: the way pydantic's error locations go through its field types."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel

_PHRASES: dict[object, str] = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}


@dataclass(frozen=True, slots=True)
class ExpectedType:
    """A field's type without what does not matter for messages.

    Parameters
    ----------
    members : tuple of object
        The alternatives of a union, else the one type; empty if the type is not known.
    is_nullable : bool
        True if null is legal too.
    discriminator : str, optional
        The key that tells the alternatives apart.
    is_converted : bool
        True if a validator reads the value first: a number that is written as text with a unit.
    """

    members: tuple[object, ...]
    is_nullable: bool = False
    discriminator: str | None = None
    is_converted: bool = False


@dataclass(frozen=True, slots=True)
class Alternative:
    """One alternative of an untagged union, which pydantic tried.

    Parameters
    ----------
    path : str
        Dotted path of the union.
    name : str
        Pydantic's name of the alternative.
    union : ExpectedType
        The type of the union.
    """

    path: str
    name: str
    union: ExpectedType


@dataclass(frozen=True, slots=True)
class Place:
    """Where an error location leads.

    Parameters
    ----------
    path : str
        Dotted path in the document.
    expected : ExpectedType
        What is expected there.
    parent : type of BaseModel, optional
        The model that the last part of the path is, or should be, a field of.
    alternatives : tuple of Alternative
        What was entered of the untagged unions on the way, outermost first.
    """

    path: str
    expected: ExpectedType
    parent: type[BaseModel] | None = None
    alternatives: tuple[Alternative, ...] = ()


UNKNOWN = ExpectedType(())


def locate(model: type[BaseModel], location: Iterable[str | int]) -> Place:
    """Follow a location of a pydantic error through a model.

    Parameters
    ----------
    model : type of BaseModel
        The model that was validated.
    location : iterable of str and int
        ``loc`` of the error: keys, indices, and between them the names of the alternatives of unions.
    """
    place = Place("", ExpectedType((model,)))
    for part in location:
        members = place.expected.members
        if len(members) > 1:
            place = _in_alternative(place, str(part))
        else:
            place = _below(place, members[0] if members else None, part)
    return place


def _in_alternative(place: Place, name: str) -> Place:
    """Enter the alternative of a union that pydantic names: by its tag, else by its type."""
    union = place.expected
    if union.discriminator is not None:
        chosen = [member for member in union.members if name in tags(member, union.discriminator)]
        return replace(place, expected=expected_type(chosen[0]) if chosen else UNKNOWN)
    words = re.split(r"\W+", name.lower())
    named = [member for member in union.members if _type_name(member) in words]
    named.sort(key=lambda member: words.index(_type_name(member)))
    expected = expected_type((named or [member for member in union.members if not is_model(member)] or [None])[0])
    entered = Alternative(place.path, name, union)
    return replace(place, expected=expected, alternatives=(*place.alternatives, entered))


def _type_name(member: object) -> str:
    """Return the name of a type as pydantic's name of an alternative of a union contains it."""
    plain = expected_type(member).members[0]
    return str(getattr(plain, "__name__", "")).lower()


def _below(place: Place, container: object, part: str | int) -> Place:
    """Go down by one key or index."""
    path = f"{place.path}.{part}" if place.path else str(part)
    if is_model(container):
        return replace(place, path=path, expected=_field_type(container, str(part)), parent=container)
    origin, arguments = get_origin(container), get_args(container)
    if isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2:
        if part == "[key]":
            return replace(place, expected=expected_type(arguments[0]), parent=None)
        return replace(place, path=path, expected=expected_type(arguments[1]), parent=None)
    if isinstance(origin, type) and issubclass(origin, Sequence | Set) and arguments:
        is_by_position = (
            origin is tuple and Ellipsis not in arguments and isinstance(part, int) and part < len(arguments)
        )
        element = arguments[int(part)] if is_by_position else arguments[0]
        return replace(place, path=path, expected=expected_type(element), parent=None)
    return replace(place, path=path, expected=UNKNOWN, parent=None)


def _field_type(model: type[BaseModel], key: str) -> ExpectedType:
    for name, field in model.model_fields.items():
        if key in (name, field.alias, field.validation_alias):
            return expected_type(field.annotation, (*field.metadata, field))
    return UNKNOWN


def expected_type(annotation: object, metadata: Iterable[object] = ()) -> ExpectedType:
    """Reduce an annotation to its alternatives.

    Parameters
    ----------
    annotation : object
        A type, with ``Annotated``, ``Optional``, unions and type aliases around it or not.
    metadata : iterable of object
        What pydantic took off the annotation of a field.
    """
    discriminator: str | None = None
    is_converted = is_nullable = False
    notes = list(metadata)
    while True:
        for note in notes:
            found = getattr(note, "discriminator", None)
            discriminator = found if isinstance(found, str) else discriminator
            is_converted |= type(note).__name__ in ("BeforeValidator", "PlainValidator", "WrapValidator")
        notes = []
        if hasattr(annotation, "__value__"):
            annotation = annotation.__value__
        elif get_origin(annotation) is Annotated:
            annotation, *notes = get_args(annotation)
        elif get_origin(annotation) in (Union, types.UnionType):
            alternatives = get_args(annotation)
            is_nullable |= type(None) in alternatives
            members = tuple(member for member in alternatives if member is not type(None))
            if len(members) != 1:
                return ExpectedType(members, is_nullable, discriminator, is_converted)
            annotation = members[0]
        else:
            return ExpectedType((annotation,), is_nullable, discriminator, is_converted)


def is_model(candidate: object) -> TypeGuard[type[BaseModel]]:
    """Say whether something is a pydantic model class."""
    return isinstance(candidate, type) and hasattr(candidate, "model_fields")


def legal_choices(expected: ExpectedType) -> list[object]:
    """Return the values of every ``Literal`` and ``Enum`` among the alternatives, in their order."""
    choices: list[object] = []
    for member in expected.members:
        (plain,) = expected_type(member).members[:1]
        if get_origin(plain) is Literal:
            choices.extend(get_args(plain))
        elif isinstance(plain, type) and issubclass(plain, Enum):
            choices.extend(item.value for item in plain)
    return choices


def tags(member: object, discriminator: str) -> list[str]:
    """Return the tags that choose one alternative of a tagged union."""
    for note in get_args(member)[1:]:
        if isinstance(tag := getattr(note, "tag", None), str):
            return [tag]
    found: list[str] = []
    for plain in expected_type(member).members:
        if is_model(plain):
            found.extend(str(choice) for choice in legal_choices(_field_type(plain, discriminator)))
        elif plain is not member:
            found.extend(tags(plain, discriminator))
    return found


def phrase(expected: ExpectedType) -> str:
    """Say what is expected, such as ``an integer or 'auto'``."""
    if expected.is_converted and expected.members == (float,):
        phrases = ["a quantity with its unit in quotes"]
    else:
        phrases = [words for member in expected.members for words in _member_phrases(member)]
    phrases += ["null"] if expected.is_nullable else []
    return either(list(dict.fromkeys(phrases))) or "another value"


def either(phrases: Sequence[str]) -> str:
    """Join alternatives.

    Examples
    --------
    >>> either(["a", "b", "c"])
    'a, b or c'
    """
    *first, last = phrases or [""]
    return f"{', '.join(first)} or {last}" if first else last


def _member_phrases(member: object) -> list[str]:
    plain = expected_type(member)
    if len(plain.members) != 1 or plain.is_nullable:
        return [phrase(plain)]
    if choices := legal_choices(plain):
        return [shown_value(choice) for choice in choices]
    if is_model(plain.members[0]):
        return ["a mapping"]
    origin: Any = get_origin(plain.members[0]) or plain.members[0]
    is_list = isinstance(origin, type) and issubclass(origin, Sequence | Set)
    return [_PHRASES.get(origin, "a list" if is_list else "another value")]


def shown_value(value: object) -> str:
    """Return a value as it can stand in a sentence, in YAML's words and bounded in length."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"'{value}'" if len(value) <= 60 and value.isprintable() else f"{value[:60]!r}..."
        case dict():
            return "a mapping"
        case list() | tuple():
            return f"a list of {len(value)}"
        case _:
            text = str(value)
            return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def key_homes(model: type[BaseModel], key: str) -> Iterator[str]:
    """Yield the dotted paths, list indices left out, under which a model knows a key."""
    pending: list[tuple[str, type[BaseModel]]] = [("", model)]
    seen: set[type[BaseModel]] = set()
    while pending:
        path, current = pending.pop(0)
        if current in seen:
            continue
        seen.add(current)
        if key in current.model_fields:
            yield f"{path}{key}"
        for name, field in current.model_fields.items():
            pending.extend((f"{path}{name}.", child) for child in _models_in(field.annotation))


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if is_model(annotation):
        yield annotation
    elif hasattr(annotation, "__value__"):
        yield from _models_in(annotation.__value__)
    else:
        for argument in get_args(annotation):
            yield from _models_in(argument)
