from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from moesim.describe.documents import apply_assignments, parse_document, problems_from_validation
from moesim.errors import ERROR_CODES, Problem, ScenarioError
from moesim.units import parse_quantity


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dense(Closed):
    kind: Literal["dense"]
    size: Annotated[int, Field(gt=0, le=2**63 - 1, strict=True)]


class Histogram(Closed):
    kind: Literal["histogram"]
    histogram: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class Experts(Closed):
    kind: Literal["moe", "k_moe"]
    num_experts: Annotated[int, Field(gt=0, strict=True)]
    load: Annotated[Histogram | Dense, Field(discriminator="kind")] | None = None


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Degrees(Closed):
    tensor: int = 1
    data: int = 1

    @model_validator(mode="after")
    def _check(self) -> Degrees:
        problems = []
        if self.tensor * self.data != 8:
            problems.append(Problem("E-SCN-003", f"{self.tensor} x {self.data} is not 8", "set data = 8", field="data"))
        if self.tensor == 3:
            problems.append(Problem("E-SCN-004", "3 does not divide 8", "set tensor = 4", field="tensor"))
        if problems:
            raise ScenarioError(problems)
        return self


Rate = Annotated[float, BeforeValidator(lambda value: parse_quantity(value, "bytes_per_s"))]


class Whole(Closed):
    schema_version: Literal[1] = 1
    layers: Annotated[list[Annotated[Dense | Experts, Field(discriminator="kind")]], Field(min_length=1, max_length=3)]
    degrees: Degrees | None = None
    data: Annotated[int, Field(gt=0, strict=True)] | Literal["auto"] = "auto"
    ffn: Literal["dense", "moe"] | list[Literal["dense", "moe"]] | Degrees = "dense"
    nested: bool | list[int | Literal["auto"]] = False
    bandwidth: Rate = 1.0
    colour: Colour = Colour.RED
    name: Annotated[str, Field(min_length=2)] = "ab"
    is_big: Annotated[bool, Field(strict=True)] = False
    notes: dict[str, str] = {}
    step: Annotated[int, Field(multiple_of=8)] = 8
    share: Annotated[float, Field(lt=1)] = 0.5
    even: int = 2

    @field_validator("even")
    @classmethod
    def _check_even(cls, value: int) -> int:
        if value == 1:
            raise ValueError("1 is odd; use 2")
        assert value != 3, "three is odd"
        return value


VALID = """\
layers:
  - kind: dense
    size: 8
  - kind: moe
    num_experts: 4
degrees:
  tensor: 1
  data: 8
"""


def _problems(text: str, *assignments: str) -> tuple[Problem, ...]:
    document = apply_assignments(parse_document(text, "a.yaml"), assignments)
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate(document.data)
    problems = problems_from_validation(document, caught.value, Whole)
    assert problems
    assert all(problem.code in ERROR_CODES for problem in problems)
    return problems


def test_the_valid_document_is_valid() -> None:
    Whole.model_validate(parse_document(VALID, "a.yaml").data)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("size: 8", "sized: 8", "a.yaml:3: layers.0.sized: unknown key 'sized'; did you mean 'size'?"),
        ("size: 8", "sized: 8", "a.yaml:2: layers.0.size: the key is missing; add 'size', an integer"),
        ("num_experts: 4", "size: 4", "layers.1.size: unknown key 'size'; 'size' belongs at layers.size"),
        ("tensor: 1", "zzz: 1", "a.yaml:7: degrees.zzz: unknown key 'zzz'; remove it; the keys here are tensor, data"),
        ("size: 8", "size: 0", "a.yaml:3: layers.0.size: found 0, but it must be greater than 0; use at least 1"),
        ("size: 8", "size: 1e3", "layers.0.size: found 1000.0 (a number), but an integer is needed; write 1000"),
        ("size: 8", "size: '8'", "found '8' (text), but an integer is needed; write 8 without quotes"),
        ("size: 8", "size: true", "layers.0.size: found true, but an integer is needed; write an integer"),
        ("size: 8", "size: null", "layers.0.size: found null, but an integer is needed"),
        ("size: 8", "size: [1, 2]", "layers.0.size: found a list of 2, but an integer is needed"),
        ("size: 8", "size: 9223372036854775808", "which is beyond 64 bits; use at most 9223372036854775807"),
        ("kind: moe", "kind: mo", "a.yaml:4: layers.1.kind: found 'mo', but 'dense', 'moe' or 'k_moe' is needed;"),
        ("kind: moe", "kind: k_mo", "did you mean 'k_moe'?"),
        ("kind: moe", "kind: 3", "layers.1.kind: found 3, but 'dense', 'moe' or 'k_moe' is needed; write one of these"),
        ("kind: moe\n    ", "", "a.yaml:4: layers.1.kind: the key is missing; add 'kind', 'dense', 'moe' or 'k_moe'"),
        (
            "  - kind: dense\n    size: 8",
            "  - 7",
            "a.yaml:2: layers.0: found 7 (a number), but a mapping is needed; write a mapping",
        ),
        (VALID, "layers: []", "a.yaml:1: layers: found a list of 0, but at least 1 element is needed"),
        (VALID, "layers: [1, 2, 3, 4]", "found a list of 4, but at most 3 elements are needed; write at most 3"),
        (VALID, "name: abc", "a.yaml:1: layers: the key is missing; add 'layers', a list"),
        (VALID, "layers: 3", "a.yaml:1: layers: found 3 (a number), but a list is needed; write a list"),
        ("data: 8", "data: 3", "a.yaml:8: degrees.data: 1 x 3 is not 8; set data = 8"),
    ],
)
def test_each_problem_names_place_value_and_remedy(old: str, new: str, sentence: str) -> None:
    assert old in VALID
    found = [problem.sentence() for problem in _problems(VALID.replace(old, new))]
    assert any(sentence in one for one in found), found


@pytest.mark.parametrize(
    ("assignment", "code", "sentence"),
    [
        ("schema_version=2", "E-FMT-009", "version 2 is not known; this moesim reads 1; write schema_version: 1"),
        ("data=0", "E-SCN-007", "data: found 0, but it must be greater than 0; use at least 1"),
        ("data=aut", "E-SCN-010", "data: found 'aut', but an integer or 'auto' is needed; did you mean 'auto'?"),
        ("data={}", "E-SCN-006", "data: found a mapping, but an integer or 'auto' is needed"),
        ("ffn=mo", "E-SCN-010", "ffn: found 'mo', but 'dense', 'moe', a list or a mapping is needed; did you mean"),
        ("ffn=[moe, dens]", "E-SCN-010", "ffn.1: found 'dens', but 'dense' or 'moe' is needed; did you mean 'dense'?"),
        ("ffn={tensr: 8}", "E-SCN-001", "ffn.tensr: unknown key 'tensr'; did you mean 'tensor'?"),
        ("bandwidth=900 GB", "E-SCN-005", "bandwidth: '900 GB' is an amount of data, a rate such as '900 GB/s'"),
        ("bandwidth=-1 GB/s", "E-SCN-007", "bandwidth: '-1 GB/s' is negative"),
        ("bandwidth=null", "E-SCN-006", "bandwidth: found null, but a rate of data is needed"),
        ("colour=rd", "E-SCN-010", "colour: found 'rd', but 'red' or 'blue' is needed; did you mean 'red'?"),
        ("name=a", "E-SCN-007", "name: found 'a', but at least 2 characters are needed"),
        ("name=3", "E-SCN-006", 'name: found 3 (a number), but text is needed; write "3" in quotes'),
        ("is_big=yes", "E-SCN-006", "is_big: found 'yes' (text), but true or false is needed"),
        ("notes.a=3", "E-SCN-006", "notes.a: found 3 (a number), but text is needed"),
        ("step=9", "E-SCN-007", "step: found 9, but it must be a multiple of 8"),
        ("share=1", "E-SCN-007", "share: found 1, but it must be less than 1; use less than 1"),
        ("share=.nan", "E-SCN-007", "share: found nan, but it must be less than 1"),
        ("even=1", "E-SCN-011", "even: 1 is odd; use 2"),
        ("even=3", "E-SCN-011", "three is odd"),
        ("layers.1.load={kind: histogram, histogram: [1, .inf]}", "E-SCN-007", "layers.1.load.histogram.1: found inf"),
        ("layers.1.load={kind: histogram, hist: [1]}", "E-SCN-001", "layers.1.load.hist: unknown key 'hist'"),
        ("layers.1.load={kind: histogramm}", "E-SCN-010", "layers.1.load.kind: found 'histogramm'"),
        ("degrees=3", "E-SCN-006", "degrees: found 3 (a number), but a mapping or null is needed"),
    ],
)
def test_each_kind_of_problem_has_its_code_and_stands_on_the_command_line(
    assignment: str, code: str, sentence: str
) -> None:
    problems = _problems(VALID, assignment)
    matching = [problem for problem in problems if sentence in problem.sentence()]
    assert matching, [problem.sentence() for problem in problems]
    assert matching[0].code == code
    assert (matching[0].file, matching[0].line) == ("--set", None)


def test_every_problem_is_reported_together() -> None:
    problems = _problems(VALID, "layers.0.size=0", "share=2", "nme=a", "degrees.data=2", "degrees.tensor=3")
    assert [problem.code for problem in problems] == [
        "E-SCN-007",
        "E-SCN-003",
        "E-SCN-004",
        "E-SCN-007",
        "E-SCN-001",
    ]


def test_only_the_closest_alternative_of_a_union_is_reported() -> None:
    assert len(_problems(VALID, "ffn=[moe, dens]")) == 1
    assert len(_problems(VALID, "data=0")) == 1
    assert len(_problems(VALID, "ffn=3")) == 1
    (inner,) = _problems(VALID, "nested=[1, {}]")
    assert (
        inner.sentence()
        == "--set: nested.1: found a mapping, but an integer or 'auto' is needed; write an integer or 'auto'"
    )
    (inner,) = _problems(VALID, "nested=[atuo, 2]")
    assert inner.sentence() == "--set: nested.0: found 'atuo', but an integer or 'auto' is needed; did you mean 'auto'?"
    assert len(_problems(VALID, "nested=3")) == 1


def test_an_unknown_annotation_still_gives_a_problem() -> None:
    class Loose(BaseModel):
        when: complex
        pairs: tuple[int, str] = (1, "a")
        whatever: dict[str, Any] = {}

    document = parse_document("when: x\npairs: [1, 2]\n", "a.yaml")
    with pytest.raises(ValidationError) as caught:
        Loose.model_validate(document.data)
    when, pairs = problems_from_validation(document, caught.value, Loose)
    assert (when.field, when.code) == ("when", "E-SCN-006")
    assert pairs.sentence() == 'a.yaml:2: pairs.1: found 2 (a number), but text is needed; write "2" in quotes'


def test_long_values_are_cut_in_messages() -> None:
    (problem,) = _problems(VALID, f"is_big={'x' * 5000}")
    assert len(problem.sentence()) < 200
