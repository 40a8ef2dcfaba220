"""Documents: plain data from a YAML file or from the command line, with the place each value came from."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast

from moesim.describe.field_types import shown_value
from moesim.describe.validation_problems import problems_from_validation
from moesim.describe.yaml_nodes import MAX_DEPTH, YamlNode, node_lines, parse_yaml, plain_data
from moesim.errors import FormatError, Problem, ScenarioError, nearest_name
from moesim.units import format_quantity

__all__ = [
    "MAX_BYTES",
    "Document",
    "apply_assignments",
    "assign",
    "parse_document",
    "problems_from_validation",
    "read_document",
]

MAX_BYTES = 2**20
ASSIGNED = "--set"
"""What stands for the file where a value was given on the command line."""


@dataclass(frozen=True, slots=True)
class Document:
    """Plain data with the place of every value.

    Parameters
    ----------
    file : str
        The file as the user named it.
    data : dict
        Dicts with text as keys, lists, and scalars of YAML 1.2. Not to be changed in place.
    lines : mapping of str to int
        Line, from 1, of every dotted path such as ``model.layers.0.count``; ``""`` is the document itself.
    assigned : frozenset of str
        Dotted paths given on the command line; they and what is below them have no line.
    """

    file: str
    data: dict[str, Any]
    lines: Mapping[str, int]
    assigned: frozenset[str] = frozenset()

    def place(self, path: str) -> tuple[str, int | None]:
        """Return file and line of a dotted path, or of its nearest ancestor that exists."""
        while True:
            if path in self.assigned:
                return ASSIGNED, None
            if path in self.lines:
                return self.file, self.lines[path]
            if not path:
                return self.file, None
            path = path.rpartition(".")[0]

    def problem(self, code: str, path: str, message: str, remedy: str) -> Problem:
        """Return a problem of the value at a dotted path."""
        file, line = self.place(path)
        return Problem(code, message, remedy, file=file, line=line, field=path or None)


def read_document(path: Path, *, max_bytes: int = MAX_BYTES) -> Document:
    """Read a YAML 1.2 file that holds one mapping.

    Parameters
    ----------
    path : Path
        A regular file with UTF-8 text.
    max_bytes : int
        A larger file is refused before it is read.

    Returns
    -------
    Document
        Its ``file`` is ``path`` as given.

    Raises
    ------
    FormatError
        For every file that is not such a mapping; nothing else is raised.
    """
    return parse_document(_read_text(path, max_bytes), str(path))


def parse_document(text: str, file: str) -> Document:
    r"""Parse YAML 1.2 text that holds one mapping.

    Parameters
    ----------
    text : str
        The document.
    file : str
        Name for messages.

    Raises
    ------
    FormatError
        For every text that is not such a mapping.

    Examples
    --------
    >>> document = parse_document("model:\n  hidden_size: 1e3\n", "a.yaml")
    >>> document.data, document.place("model.hidden_size")
    ({'model': {'hidden_size': 1000.0}}, ('a.yaml', 2))
    """
    root = parse_yaml(text, file)
    if root is None:
        _refuse(file, "E-FMT-002", "the file has no content", "write a mapping, one 'key: value' on a line")
    if not isinstance(root.value, dict):
        found = "a list" if isinstance(root.value, list) else "a single value"
        _refuse(file, "E-FMT-008", f"the top level is {found}, not a mapping", "write 'key: value' lines", root.line)
    lines = {"": root.line, **dict(node_lines(root))}
    return Document(file, cast("dict[str, Any]", plain_data(root)), MappingProxyType(lines))


def apply_assignments(document: Document, assignments: Sequence[str]) -> Document:
    """Set values from the command line; the last assignment to a path wins.

    Parameters
    ----------
    document : Document
        Left as it is.
    assignments : sequence of str
        ``PATH=VALUE`` with list elements by index; the value is a YAML scalar, ``[...]`` or ``{...}``. Mappings that
        are missing on the path are created: the schema will say whether they may be there.

    Returns
    -------
    Document
        The values that were set have no line, and ``--set`` for a file.

    Raises
    ------
    ScenarioError
        With one problem (E-SCN-012) for each malformed assignment.

    Examples
    --------
    >>> document = parse_document("parallelism: {expert: 8}", "a.yaml")
    >>> apply_assignments(document, ["parallelism.expert=64"]).data
    {'parallelism': {'expert': 64}}
    """
    problems: list[Problem] = []
    for assignment in assignments:
        try:
            document = _assigned(document, assignment)
        except ScenarioError as error:
            problems.extend(error.problems)
    if problems:
        raise ScenarioError(problems)
    return document


def _assigned(document: Document, assignment: str) -> Document:
    """Apply one assignment."""
    path, equals, text = assignment.partition("=")
    if not equals:
        _reject(None, f"{_quoted(assignment)} has no '='", "write PATH=VALUE, such as parallelism.expert=64")
    keys = path.split(".")
    if len(keys) > MAX_DEPTH or not all(key and key.isprintable() and key == key.strip() for key in keys):
        message = f"{_quoted(path)} is not a dotted path"
        _reject(None, message, "write keys with dots between, such as parallelism.expert=64")
    return assign(document, path, plain_data(_assigned_value(path, text)))


def assign(document: Document, path: str, value: object) -> Document:
    """Return a document with one value set at a dotted path, as ``apply_assignments`` would.

    Raises
    ------
    ScenarioError
        If the path leads through something that has no parts.
    """
    data, changed = _with_value(document.data, path.split("."), value, 0)
    below = f"{changed}."
    lines = {known: line for known, line in document.lines.items() if known != changed and not known.startswith(below)}
    assigned = document.assigned | {changed}
    return replace(document, data=data, lines=MappingProxyType(lines), assigned=assigned)


def _assigned_value(path: str, text: str) -> YamlNode:
    """Parse the value of an assignment."""
    if not text.strip():
        _reject(path, "there is no value after '='", f"write {path}=null for no value, {path}='\"\"' for empty text")
    if "\n" in text or "\r" in text:
        _reject(path, "the value has more than one line", "write it on one line, with [...] and {...}")
    try:
        node = parse_yaml(text, ASSIGNED)
    except FormatError as error:
        _reject(path, f"{_quoted(text)}: {error.problems[0].message}", "put text with special characters in quotes")
    if node is None or not node.is_flow:
        _reject(
            path, f"{_quoted(text)} is not a scalar, [...] or {{...}}", "put text that holds ': ' or '- ' in quotes"
        )
    return node


def _with_value(container: Any, keys: list[str], value: object, depth: int) -> tuple[Any, str]:
    """Return a copy of the container with one value set, and the topmost path that is new or replaced."""
    path = ".".join(keys[:depth])
    rest = keys[depth:]
    if not rest:
        return value, path
    if isinstance(container, list):
        index = _list_index(container, rest[0], ".".join(keys), path)
        copied: Any = list(container)
        copied[index], changed = _with_value(container[index], keys, value, depth + 1)
        return copied, changed
    if isinstance(container, dict):
        joined = ".".join(rest)
        if joined in container:  # keys of `assumed` hold dots themselves
            return {**container, joined: value}, ".".join(keys)
        child, changed = _with_value(container.get(rest[0]), keys, value, depth + 1)
        is_new = rest[0] not in container
        return {**container, rest[0]: child}, ".".join(keys[: depth + 1]) if is_new else changed
    if container is None:
        child, _ = _with_value(None, keys, value, depth + 1)
        return {rest[0]: child}, path
    message = f"{path} is {shown_value(container)}, which has no parts"
    _reject(".".join(keys), message, f"set {path} as a whole, such as {path}={{{'.'.join(rest)}: ...}}")


def _list_index(container: list[Any], key: str, path: str, parent: str) -> int:
    """Return the index that a key of a path names."""
    if key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(container):
        return int(key)
    size = len(container)
    indices = f"use an index from 0 to {size - 1} or " if size else ""
    message = f"{parent} is a list of {size}, {_quoted(key)} is not an index into it"
    _reject(path, message, f"{indices}set {parent} as a whole")


def _read_text(path: Path, max_bytes: int) -> str:
    """Read a regular file of bounded size as UTF-8."""
    file = str(path)
    try:
        _check_is_regular(path.stat().st_mode, file)
        # Without waiting, should a pipe have taken the place of the file meanwhile.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            content = stream.read(max_bytes + 1) if size <= max_bytes else b""
    except FileNotFoundError:
        _refuse(file, "E-FMT-001", "there is no such file", _similar_file(path))
    except OSError as error:
        reason = (error.strerror or "unknown reason").lower()
        _refuse(file, "E-FMT-001", f"the file cannot be read: {reason}", "check its path and its permissions")
    except FormatError:
        raise
    except ValueError:  # a NUL or a lone surrogate in the name
        _refuse(repr(file), "E-FMT-001", "this is not the name of a file", "check the path")
    if max(size, len(content)) > max_bytes:
        found, limit = (format_quantity(number, "bytes") for number in (max(size, len(content)), max_bytes))
        message = f"the file has {found}, at most {limit} are read"
        _refuse(file, "E-FMT-003", message, "check that this is the file you mean; keep tables in CSV")
    return _decoded(content, file)


def _check_is_regular(mode: int, file: str) -> None:
    if stat.S_ISDIR(mode):
        _refuse(file, "E-FMT-001", "this is a folder, not a file", "name a file in it")
    if not stat.S_ISREG(mode):
        _refuse(file, "E-FMT-001", "this is a pipe or a device, not a regular file", "save it to a file first")


def _decoded(content: bytes, file: str) -> str:
    """Decode UTF-8 with or without byte order mark."""
    if b"\0" in content:
        encoding = "UTF-16 or UTF-32 text" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "binary data"
        _refuse(file, "E-FMT-004", f"the file holds {encoding}, not UTF-8 text", "save it as UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"the byte 0x{content[error.start]:02x} is not UTF-8 text"
        _refuse(file, "E-FMT-004", message, "save the file as UTF-8", line)


def _similar_file(path: Path) -> str:
    """Advise the file beside a missing one that was probably meant."""
    try:
        names = [entry.name for entry in os.scandir(path.parent)]
    except OSError:
        return f"check the path: there is no folder {str(path.parent)!r}"
    nearest = nearest_name(path.name, names)
    return "check the path" if nearest is None else f"did you mean {str(path.parent / nearest)!r}?"


def _quoted(text: str) -> str:
    """Return text as it can stand in a sentence."""
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}..."


def _refuse(file: str, code: str, message: str, remedy: str, line: int | None = None) -> NoReturn:
    raise FormatError([Problem(code, message, remedy, file=file, line=line)])


def _reject(path: str | None, message: str, remedy: str) -> NoReturn:
    raise ScenarioError([Problem("E-SCN-012", message, remedy, file=ASSIGNED, field=path)])
