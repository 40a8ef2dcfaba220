from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.describe.documents import (
    MAX_BYTES,
    Document,
    apply_assignments,
    parse_document,
    read_document,
)
from moesim.errors import ERROR_CODES, FormatError, Problem, ScenarioError

SCENARIO = """\
# A comment.
name: small
model:
  hidden_size: 1024
  layers:
    - {count: 24, ffn: moe}
    - count: 2
      ffn: dense
devices: 8
"""


def _problem(path: Path, content: bytes | str) -> Problem:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(FormatError) as caught:
        read_document(path)
    (problem,) = caught.value.problems
    assert problem.file == str(path)
    assert problem.code in ERROR_CODES
    assert problem.remedy
    return problem


def _check_is_complete(error: FormatError | ScenarioError, *codes: str) -> None:
    (problem,) = error.problems
    assert problem.code in codes
    assert problem.file
    assert problem.message
    assert problem.remedy


def test_every_value_knows_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(SCENARIO)
    document = read_document(path)
    assert document.file == str(path)
    assert document.data == {
        "name": "small",
        "model": {"hidden_size": 1024, "layers": [{"count": 24, "ffn": "moe"}, {"count": 2, "ffn": "dense"}]},
        "devices": 8,
    }
    assert document.lines == {
        "": 2,
        "name": 2,
        "model": 3,
        "model.hidden_size": 4,
        "model.layers": 5,
        "model.layers.0": 6,
        "model.layers.0.count": 6,
        "model.layers.0.ffn": 6,
        "model.layers.1": 7,
        "model.layers.1.count": 7,
        "model.layers.1.ffn": 8,
        "devices": 9,
    }


@pytest.mark.parametrize(
    ("path", "line"), [("model.layers.1.ffn", 8), ("model.layers.1.attention", 7), ("model.moe.router", 3), ("x", 2)]
)
def test_a_missing_value_has_the_place_of_its_nearest_ancestor(path: str, line: int) -> None:
    assert parse_document(SCENARIO, "a.yaml").place(path) == ("a.yaml", line)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("100 Gb/s", "100 Gb/s"),
        ("1e9", 1e9),
        ("-1.5E-3", -1.5e-3),
        (".5", 0.5),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("+3", 3),
        ("9223372036854775808", 2**63),
        ("~", None),
        ("Null", None),
        ("", None),
        ("TRUE", True),
        ("false", False),
        ("tRUE", "tRUE"),
        ("-.INF", -math.inf),
        (".inf", math.inf),
        ("1e999", math.inf),
        ("'1'", "1"),
        ('"null"', "null"),
        ("!!str 1", "1"),
        ("! 1", "1"),
        ("!!float 1", 1.0),
        ("!!int '5'", 5),
        ("!!seq [1]", [1]),
        ('"\\u00e9"', "\u00e9"),
        ("|\n  a\n  b\n", "a\nb\n"),
        ("<<", "<<"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_document(f"key: {text}", "a.yaml").data["key"]
    assert read == value
    assert type(read) is type(value)


def test_nan_is_read_for_the_schema_to_refuse() -> None:
    assert math.isnan(parse_document("a: .NaN", "a.yaml").data["a"])


def test_the_core_schema_holds_under_an_older_directive_too() -> None:
    assert parse_document("%YAML 1.1\n---\na: yes\n", "a.yaml").data == {"a": "yes"}


def test_an_alias_stands_for_its_value_and_its_lines() -> None:
    document = parse_document("a: &x\n  - b: 1\nc: *x\nd: [*x, *x]\n", "a.yaml")
    assert document.data == {"a": [{"b": 1}], "c": [{"b": 1}], "d": [[{"b": 1}]] * 2}
    assert document.place("c") == ("a.yaml", 3)
    assert document.place("c.0.b") == ("a.yaml", 2)


def test_a_byte_order_mark_and_carriage_returns_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("\ufeffname: \u00fcber\r\ndevices: 8\r\n".encode())
    document = read_document(path)
    assert document.data == {"name": "\u00fcber", "devices": 8}
    assert document.lines["devices"] == 2


DEEP = "a: " + "[" * 40 + "]" * 40
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "code", "line", "message"),
    [
        ("", "E-FMT-002", None, "no content"),
        ("# only\n\n# comments\n", "E-FMT-002", None, "no content"),
        ("---\n...\n", "E-FMT-002", None, "no content"),
        (b"a: 1\nb: \0\n", "E-FMT-004", None, "binary data"),
        ("a: 1".encode("utf-16"), "E-FMT-004", None, "UTF-16"),
        (b"a: 1\nb: \xe9\n", "E-FMT-004", 2, "0xe9 is not UTF-8"),
        (b"\xed\xa0\x80: 1", "E-FMT-004", 1, "is not UTF-8"),
        ("a: 1\nb: \x01\n", "E-FMT-004", 2, "'\\x01' is not allowed"),
        ("a: 1\nb: [1, 2\n", "E-FMT-005", 3, "not valid YAML"),
        ("a: 1\n b: 2\n", "E-FMT-005", 2, "mapping values are not allowed"),
        ("a: 1\n\tb: 2\n", "E-FMT-005", 2, "cannot start any token"),
        ("a: 'x\n", "E-FMT-005", 2, "end of stream"),
        ("a: 1\nb: *x\n", "E-FMT-005", 2, "the alias *x has no anchor &x"),
        ('a: 1\nb: "\\UFFFFFFFF"\n', "E-FMT-005", 2, "an escape or a directive"),
        ('a: "\\U00110000"\n', "E-FMT-005", 1, "an escape or a directive"),
        ("%YAML 1.9\n---\na: 1\n", "E-FMT-005", 1, "an escape or a directive"),
        ("%YAML 3.0\n---\na: 1\n", "E-FMT-005", 1, "incompatible YAML document"),
        (BOMB, "E-FMT-006", 5, "more than 20000 keys and values"),
        ("a: [" + "1," * 20_001 + "]", "E-FMT-006", 1, "more than 20000 keys and values"),
        ("a: &a [*a]", "E-FMT-006", 1, "stands inside its own anchor"),
        ("a: &a\n  b:\n    c: *a", "E-FMT-006", 3, "stands inside its own anchor"),
        (DEEP, "E-FMT-006", 1, "more than 32 levels"),
        ("- " * 100_000, "E-FMT-003", 1, "a line of 200000 characters"),
        ("- " * 1_000, "E-FMT-006", 1, "more than 32 levels"),
        (f"a: &a {'[' * 20}{']' * 20}\nb: {'[' * 15}*a{']' * 15}", "E-FMT-006", 2, "more than 32 levels"),
        ("a: 1\nb: 2\na: 3\n", "E-FMT-007", 3, "the key 'a' is given twice, first on line 1"),
        ("a: {b: 1,\n b: 1}", "E-FMT-007", 2, "given twice, first on line 1"),
        ("- a\n- b\n", "E-FMT-008", 1, "the top level is a list"),
        ("# x\nhello\n", "E-FMT-008", 2, "the top level is a single value"),
        ("~", "E-FMT-008", 1, "the top level is a single value"),
        ("a: !!python/object:os.system {}\n", "E-FMT-010", 1, "the tag !!python/object:os.system is not supported"),
        ("a: !mine 1\n", "E-FMT-010", 1, "the tag !mine is not supported"),
        ("a: !!binary aGk=\n", "E-FMT-010", 1, "the tag !!binary is not supported"),
        ("a: !!int x\n", "E-FMT-010", 1, "not what its tag !!int says"),
        ("a: !!map [1]\n", "E-FMT-010", 1, "not what its tag !!map says"),
        ("a: !!int true\n", "E-FMT-010", 1, "not what its tag !!int says"),
        ("a: 1\n2: 3\n", "E-FMT-011", 2, "the key 2 is not text"),
        ("1: 3\n", "E-FMT-011", 1, "the key 1 is not text"),
        ("true: 3\n", "E-FMT-011", 1, "the key true is not text"),
        (": 3\n", "E-FMT-011", 1, "the key null is not text"),
        ("? [a]\n: 1\n", "E-FMT-011", 1, "a key is a mapping or a list"),
        ('"\\e[31m": 1\n', "E-FMT-011", 1, "not printable"),
        ("a: 1\n---\nb: 1\n", "E-FMT-012", 2, "a second document begins here"),
        ('a: "\\ud800"\n', "E-FMT-013", 1, "a character that is not text"),
        ('a: "\\0"\n', "E-FMT-013", 1, "a character that is not text"),
        ("a: " + "9" * 5000, "E-FMT-013", 1, "a number of 5000 characters"),
        ("a: 0x" + "f" * 5000, "E-FMT-013", 1, "a number of 5002 characters"),
    ],
)
def test_what_is_not_one_bounded_mapping_is_refused_with_code_and_line(
    tmp_path: Path, content: bytes | str, code: str, line: int | None, message: str
) -> None:
    problem = _problem(tmp_path / "a.yaml", content)
    assert (problem.code, problem.line) == (code, line)
    assert message in problem.message


def test_a_missing_file_is_refused_with_the_name_of_a_similar_one(tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_text(SCENARIO)
    with pytest.raises(FormatError, match=r"there is no such file; did you mean '.*scenario\.yaml'") as caught:
        read_document(tmp_path / "scenaro.yaml")
    assert caught.value.code == "E-FMT-001"
    with pytest.raises(FormatError, match="there is no folder"):
        read_document(tmp_path / "nowhere" / "a.yaml")


def test_a_folder_is_not_a_document(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="this is a folder"):
        read_document(tmp_path)


def test_names_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 5000, "\ud800"):
        with pytest.raises(FormatError) as caught:
            read_document(tmp_path / name)
        assert caught.value.code == "E-FMT-001"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no named pipes")
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="a pipe or a device"):
        read_document(tmp_path / "pipe")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this platform has no /dev/zero")
def test_a_device_file_is_refused() -> None:
    with pytest.raises(FormatError, match="a pipe or a device"):
        read_document(Path("/dev/zero"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read every file")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(SCENARIO)
    path.chmod(0)
    with pytest.raises(FormatError, match="permission denied"):
        read_document(path)


def test_a_large_file_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\n" * (MAX_BYTES // 5 + 1))
    monkeypatch.setitem(sys.modules, "ruamel.yaml", None)  # parsing would raise ImportError
    with pytest.raises(FormatError, match="the file has 1 MiB, at most 1 MiB are read") as caught:
        read_document(path)
    assert caught.value.code == "E-FMT-003"
    with pytest.raises(FormatError, match="at most 10 B are read"):
        read_document(path, max_bytes=10)


PLAIN_TEXT = st.text(
    st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("\n\t\u00e9\u4e2d"), max_size=9
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PLAIN_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc._ 01", min_size=1), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(
    data=st.dictionaries(st.text("abcdef_", min_size=1), ANY_JSON, min_size=1, max_size=4),
    indent=st.none() | st.just(2),
)
def test_json_is_read_back_since_it_is_yaml_1_2(data: dict[str, Any], indent: int | None) -> None:
    document = parse_document(json.dumps(data, ensure_ascii=False, indent=indent), "a.yaml")
    assert repr(document.data) == repr(data)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.text(":-?[]{},&*!|>'\"%@`#\n \\ab01.~<\t\r", max_size=60).map(str.encode)
)
def test_any_bytes_are_a_document_or_a_format_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    try:
        document = read_document(path)
    except FormatError as error:
        _check_is_complete(error, *ERROR_CODES)
    else:
        assert isinstance(document.data, dict)


def _document() -> Document:
    return parse_document(SCENARIO, "a.yaml")


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("devices=16", ("devices",), 16),
        ("name=a=b", ("name",), "a=b"),
        ("name='16'", ("name",), "16"),
        ("name=100 Gb/s", ("name",), "100 Gb/s"),
        ("devices=null", ("devices",), None),
        ("model.layers.1.count=3", ("model", "layers", 1, "count"), 3),
        ("model.layers.0=[1, {a: b}]", ("model", "layers", 0), [1, {"a": "b"}]),
        ("model.moe.router.kind=top_k", ("model", "moe", "router", "kind"), "top_k"),
        ("new={a: 1e9}", ("new", "a"), 1e9),
    ],
)
def test_an_assignment_sets_one_value_and_nothing_else(assignment: str, path: tuple[Any, ...], value: object) -> None:
    before = _document()
    after = apply_assignments(before, [assignment])
    found: Any = after.data
    for key in path:
        found = found[key]
    assert found == value
    assert before.data == _document().data
    dotted = assignment.partition("=")[0]
    assert after.place(dotted) == ("--set", None)
    assert after.place(f"{dotted}.below") == ("--set", None)
    assert after.place("model.hidden_size") == ("a.yaml", 4)


def test_the_last_assignment_to_a_path_wins() -> None:
    after = apply_assignments(_document(), ["devices=1", "devices=2"])
    assert after.data["devices"] == 2


def test_an_assignment_below_null_or_nothing_makes_mappings_that_stand_on_the_command_line() -> None:
    after = apply_assignments(parse_document("moe: null\n", "a.yaml"), ["moe.router.kind=top_k", "x.y=1"])
    assert after.data == {"moe": {"router": {"kind": "top_k"}}, "x": {"y": 1}}
    assert after.place("moe.num_experts") == ("--set", None)
    assert after.place("x.z") == ("--set", None)


def test_a_key_with_dots_can_be_assigned() -> None:
    document = parse_document("assumed: {model.layers: guess}\n", "a.yaml")
    after = apply_assignments(document, ["assumed.model.layers=known"])
    assert after.data == {"assumed": {"model.layers": "known"}}


def test_an_aliased_value_is_set_in_one_place_only() -> None:
    document = parse_document("a: &x {b: 1}\nc: *x\n", "a.yaml")
    assert apply_assignments(document, ["c.b=2"]).data == {"a": {"b": 1}, "c": {"b": 2}}


def test_no_assignment_changes_nothing() -> None:
    assert apply_assignments(_document(), []) == _document()


@pytest.mark.parametrize(
    ("assignment", "field", "message"),
    [
        ("devices", None, "'devices' has no '='"),
        ("", None, "'' has no '='"),
        ("=3", None, "'' is not a dotted path"),
        ("a..b=3", None, "'a..b' is not a dotted path"),
        (" a=3", None, "' a' is not a dotted path"),
        ("a." * 40 + "b=3", None, "is not a dotted path"),
        ("devices=", "devices", "there is no value after '='"),
        ("devices=# 3", "devices", "is not a scalar"),
        ("name=a\nb", "name", "more than one line"),
        ("name=a: b", "name", "is not a scalar"),
        ("name=- b", "name", "is not a scalar"),
        ("name={a", "name", "not valid YAML"),
        ("name=*a", "name", "has no anchor"),
        ("name=!!python/none x", "name", "is not supported"),
        ("model.layers.2.count=1", "model.layers.2.count", "model.layers is a list of 2, '2' is not an index"),
        ("model.layers.-1.count=1", "model.layers.-1.count", "'-1' is not an index"),
        ("model.layers.x=1", "model.layers.x", "use an index from 0 to 1"),
        ("name.x=1", "name.x", "name is 'small', which has no parts"),
    ],
)
def test_a_malformed_assignment_is_refused_with_its_own_sentence(
    assignment: str, field: str | None, message: str
) -> None:
    with pytest.raises(ScenarioError) as caught:
        apply_assignments(_document(), [assignment])
    (problem,) = caught.value.problems
    assert (problem.code, problem.file, problem.line, problem.field) == ("E-SCN-012", "--set", None, field)
    assert message in problem.sentence()
    assert problem.remedy


def test_all_malformed_assignments_are_reported_together() -> None:
    with pytest.raises(ScenarioError, match="2 problems"):
        apply_assignments(_document(), ["a", "devices=2", "=b"])


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.from_regex(r"(name|model\.layers\.[0-9]|[a-c.]{1,5})=[^\n]{0,20}", fullmatch=True))
def test_any_assignment_is_applied_or_refused(assignment: str) -> None:
    try:
        after = apply_assignments(_document(), [assignment])
    except ScenarioError as error:
        _check_is_complete(error, "E-SCN-012")
    else:
        assert after.assigned
