"""YAML 1.2 text as nodes that know their line, bounded before anything is expanded.

Scalars follow the core schema of YAML 1.2 (chapter 10.3): ``on``, ``yes`` and ``12:30`` are text, ``1e9`` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from moesim.errors import FormatError, Problem, SimulationError

if TYPE_CHECKING:
    from ruamel.yaml.events import CollectionStartEvent, Event, ScalarEvent

MAX_NODES = 20_000
MAX_DEPTH = 32
MAX_LINE_LENGTH = 65_536
"""The scanner is quadratic in the length of some tokens: 9 s for a line of 1 MiB, 0.03 s for one of 64 KiB."""
MAX_NUMBER_LENGTH = 256

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_TAGS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "null": (type(None),),
    "map": (dict,),
    "seq": (list,),
}
_TAG_PREFIX = "tag:yaml.org,2002:"

Scalar: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class YamlNode:
    """A value with its line.

    Parameters
    ----------
    value : scalar, list of YamlNode, or dict of str to (line of the key, YamlNode)
        What was read.
    line : int
        First line of the value, counted from 1.
    num_nodes : int
        Nodes, keys among them, below and including this one with every alias expanded.
    height : int
        Levels of nesting from this one down; 1 for a scalar.
    is_flow : bool
        False for a list or mapping that is laid out by indentation instead of ``[...]`` or ``{...}``.
    """

    value: Scalar | list[YamlNode] | dict[str, tuple[int, YamlNode]]
    line: int
    num_nodes: int = 1
    height: int = 1
    is_flow: bool = True


def parse_yaml(text: str, file: str) -> YamlNode | None:
    """Read one YAML document.

    Parameters
    ----------
    text : str
        The document, without byte order mark.
    file : str
        Name for messages.

    Returns
    -------
    YamlNode or None
        None if there are only comments.

    Raises
    ------
    FormatError
        For anything that is not one bounded document of plain data.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.reader import ReaderError

    _check_lines(text, file)
    builder = _Builder(file, YAML(typ="safe", pure=True).parse(text))
    try:
        return builder.document()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        _fail(
            file, line, "E-FMT-004", f"the character {_character(error.character)} is not allowed in YAML", "remove it"
        )
    except YAMLError as error:
        _fail_on_syntax(file, error)
    except (ValueError, OverflowError, AssertionError) as error:
        if isinstance(error, FormatError):
            raise
        # The scanner converts "\UFFFFFFFF" and "%YAML 1.9" unchecked; the event before them tells the line.
        message, remedy = "an escape or a directive that YAML does not have", "correct it, on this line or soon after"
        _fail(file, builder.line, "E-FMT-005", message, remedy)


def plain_data(node: YamlNode) -> object:
    """Return the value of a node as dict, list and scalars."""
    if isinstance(node.value, dict):
        return {key: plain_data(child) for key, (_, child) in node.value.items()}
    if isinstance(node.value, list):
        return [plain_data(child) for child in node.value]
    return node.value


def node_lines(node: YamlNode, path: str = "") -> Iterator[tuple[str, int]]:
    """Yield dotted path and line of everything below a node; a key's line is where the key stands."""
    prefix = f"{path}." if path else ""
    if isinstance(node.value, dict):
        for key, (line, child) in node.value.items():
            yield f"{prefix}{key}", line
            yield from node_lines(child, f"{prefix}{key}")
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            yield f"{prefix}{index}", child.line
            yield from node_lines(child, f"{prefix}{index}")


class _Builder:
    """Nodes from parser events; the bounds hold while reading, so that a bomb is never built."""

    def __init__(self, file: str, events: Iterator[Event]) -> None:
        self.file = file
        self.line = 1
        self._events = events
        self._num_nodes = 0
        self._anchors: dict[str, YamlNode | None] = {}

    def document(self) -> YamlNode | None:
        """Return the root of the only document, or None if there is none or an empty one."""
        from ruamel.yaml.events import DocumentStartEvent, ScalarEvent, StreamEndEvent

        self._next()
        if not isinstance(self._next(), DocumentStartEvent):
            return None
        start = self._next()
        root = self._node(start, MAX_DEPTH)
        self._next()
        if not isinstance(self._next(), StreamEndEvent):
            self._fail("E-FMT-012", "a second document begins here", "keep one document in a file: remove '---' lines")
        return None if isinstance(start, ScalarEvent) and start.implicit[0] and start.value == "" else root

    def _next(self) -> Event:
        event = next(self._events)
        self.line = event.start_mark.line + 1
        return event

    def _node(self, event: Event, depth: int) -> YamlNode:
        """Build the node that an event begins; ``depth`` levels of nesting are left."""
        from ruamel.yaml.events import AliasEvent, MappingStartEvent, ScalarEvent, SequenceStartEvent

        if isinstance(event, AliasEvent):
            return self._aliased(event.anchor, depth)
        if not isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent):
            raise SimulationError(f"the YAML parser sent {event!r} where a value begins")
        self._count(1)
        if depth == 0:
            self._fail("E-FMT-006", f"more than {MAX_DEPTH} levels of nesting", "write a flatter document")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        if isinstance(event, ScalarEvent):
            node = self._scalar(event)
        elif isinstance(event, SequenceStartEvent):
            node = self._sequence(event, depth)
        else:
            node = self._mapping(event, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _aliased(self, anchor: str, depth: int) -> YamlNode:
        if anchor not in self._anchors:
            self._fail("E-FMT-005", f"the alias *{anchor} has no anchor &{anchor} above it", "write the value itself")
        node = self._anchors[anchor]
        if node is None:
            self._fail("E-FMT-006", f"the alias *{anchor} stands inside its own anchor", "write the value itself")
        self._count(node.num_nodes)
        if node.height > depth:
            self._fail("E-FMT-006", f"more than {MAX_DEPTH} levels of nesting", "write a flatter document")
        return node

    def _count(self, num_nodes: int) -> None:
        self._num_nodes += num_nodes
        if self._num_nodes > MAX_NODES:
            message = f"more than {MAX_NODES} keys and values, aliases expanded"
            self._fail("E-FMT-006", message, "keep tables in CSV or JSON, and use fewer aliases")

    def _scalar(self, event: ScalarEvent) -> YamlNode:
        line = self.line
        text: str = event.value
        tag: str | None = event.tag
        if any("\ud800" <= character <= "\udfff" or character == "\0" for character in text):
            self._fail("E-FMT-013", f"{text[:40]!r} holds a character that is not text", "remove the escape")
        is_plain = event.implicit[0] and tag is None
        value = self._resolved(text) if is_plain or (tag and tag not in ("!", _TAG_PREFIX + "str")) else text
        self._check_tag(tag, value)
        if isinstance(value, int) and tag == _TAG_PREFIX + "float":
            value = float(value)
        return YamlNode(value, line)

    def _resolved(self, text: str) -> Scalar:
        """Return the value of a plain scalar in the core schema."""
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        is_integer = _INTEGER.fullmatch(text) is not None
        if not is_integer and not _FLOAT.fullmatch(text):
            return text
        if len(text) > MAX_NUMBER_LENGTH:
            message = f"a number of {len(text)} characters"
            self._fail("E-FMT-013", message, f"write it with at most {MAX_NUMBER_LENGTH}, such as 1e9, or in quotes")
        if is_integer:
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        return float(text.replace(".i", "i").replace(".I", "I").replace(".n", "n").replace(".N", "N"))

    def _sequence(self, event: CollectionStartEvent, depth: int) -> YamlNode:
        from ruamel.yaml.events import SequenceEndEvent

        line = self.line
        self._check_tag(event.tag, [])
        children: list[YamlNode] = []
        while not isinstance(following := self._next(), SequenceEndEvent):
            children.append(self._node(following, depth - 1))
        return _collection(children, children, line, event)

    def _mapping(self, event: CollectionStartEvent, depth: int) -> YamlNode:
        from ruamel.yaml.events import MappingEndEvent

        line = self.line
        self._check_tag(event.tag, {})
        members: dict[str, tuple[int, YamlNode]] = {}
        while not isinstance(following := self._next(), MappingEndEvent):
            key_line = self.line
            key = self._key(self._node(following, depth - 1))
            if key in members:
                message = f"the key {key!r} is given twice, first on line {members[key][0]}"
                self._fail("E-FMT-007", message, "keep one of the two", line=key_line)
            members[key] = (key_line, self._node(self._next(), depth - 1))
        return _collection(members, [child for _, child in members.values()], line, event)

    def _key(self, node: YamlNode) -> str:
        key = node.value
        if isinstance(key, str) and key.isprintable() and 0 < len(key) <= MAX_NUMBER_LENGTH:
            return key
        if isinstance(key, dict | list):
            self._fail("E-FMT-011", "a key is a mapping or a list", "use text as keys", line=node.line)
        if isinstance(key, str):
            message = f"the key {key[:40]!r} is empty, longer than {MAX_NUMBER_LENGTH} characters or not printable"
            self._fail("E-FMT-011", message, "use short plain text as keys", line=node.line)
        shown = "null" if key is None else str(key).lower()
        self._fail("E-FMT-011", f"the key {shown} is not text", f'write "{shown}" in quotes', line=node.line)

    def _check_tag(self, tag: str | None, value: object) -> None:
        """Refuse every tag that is not a plain data type, and a plain one that its value is not."""
        if tag is None or tag == "!":
            return
        short = tag.removeprefix(_TAG_PREFIX)
        shown = f"!!{short}" if short != tag else tag
        if short not in _TAGS or short == tag:
            self._fail("E-FMT-010", f"the tag {shown[:60]} is not supported", "remove it: only plain data is read")
        if type(value) not in _TAGS[short]:
            self._fail(
                "E-FMT-010", f"the value is not what its tag {shown} says", "remove the tag or correct the value"
            )

    def _fail(self, code: str, message: str, remedy: str, *, line: int | None = None) -> NoReturn:
        _fail(self.file, self.line if line is None else line, code, message, remedy)


def _collection(
    value: list[YamlNode] | dict[str, tuple[int, YamlNode]],
    children: list[YamlNode],
    line: int,
    event: CollectionStartEvent,
) -> YamlNode:
    """Return the node of a list or mapping with the size of what it holds."""
    num_nodes = 1 + sum(child.num_nodes for child in children)
    height = 1 + max((child.height for child in children), default=0)
    return YamlNode(value, line, num_nodes, height, is_flow=bool(event.flow_style))


def _check_lines(text: str, file: str) -> None:
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > MAX_LINE_LENGTH:
            message = f"a line of {len(line)} characters; at most {MAX_LINE_LENGTH} are read"
            _fail(file, number, "E-FMT-003", message, "break the line")


def _character(found: object) -> str:
    """Return a character as it can stand in a sentence; the reader gives its number."""
    return repr(chr(found)) if isinstance(found, int) else repr(found)


def _fail_on_syntax(file: str, error: Exception) -> NoReturn:
    """Report the parser's complaint at the place where it arose."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    context = getattr(error, "context", None)
    remedies = {
        "mapping values are not allowed here": "check the indentation, and put text that holds ': ' in quotes",
        "cannot start any token": "indent with spaces, and put text that begins with %, @, ` or a tab in quotes",
    }
    remedy = next(
        (text for part, text in remedies.items() if part in problem), "correct the YAML on or above this line"
    )
    message = f"not valid YAML: {f'{context}, ' if context else ''}{problem}"
    _fail(file, None if mark is None else mark.line + 1, "E-FMT-005", message.strip(), remedy)


def _fail(file: str, line: int | None, code: str, message: str, remedy: str) -> NoReturn:
    raise FormatError([Problem(code, message, remedy, file=file, line=line)])
