from __future__ import annotations

import pickle
import re

import pytest

from moesim import errors
from moesim.errors import (
    ERROR_CODES,
    DomainError,
    FormatError,
    InfeasibleError,
    MoesimError,
    Problem,
    ScenarioError,
    SimulationError,
    UnitError,
    nearest_name,
)

UNKNOWN_KEY = Problem("E-SCN-001", "unknown key 'exprt'", "did you mean 'expert'?", "a.yaml", 7, "parallelism.exprt")
TWICE = Problem("E-FMT-007", "the key 'a' is given twice", "keep one of the two", file="a.yaml", line=2)
RAISED: list[tuple[MoesimError, type[Exception], str]] = [
    (MoesimError("no", "do", "E-DOM-001"), Exception, "no; do"),
    (ScenarioError([UNKNOWN_KEY]), ValueError, UNKNOWN_KEY.sentence()),
    (
        ScenarioError([UNKNOWN_KEY, TWICE]),
        ValueError,
        f"2 problems:\n  {UNKNOWN_KEY.sentence()}\n  a.yaml:2: the key 'a' is given twice; keep one of the two",
    ),
    (FormatError([TWICE]), ValueError, TWICE.sentence()),
    (InfeasibleError("40 GiB of 32 GiB", "use 2 stages"), ValueError, "40 GiB of 32 GiB; use 2 stages"),
    (DomainError("m = 3 is below 16"), ValueError, "m = 3 is below 16"),
    (UnitError("'5' has no unit", "add one", "E-SCN-005"), ValueError, "'5' has no unit; add one"),
    (
        SimulationError("flow 3 is negative", seed=17),
        RuntimeError,
        "flow 3 is negative; this is a defect of moesim: please report it with the scenario and this message, seed 17",
    ),
]


@pytest.mark.parametrize(("error", "builtin", "text"), RAISED, ids=lambda value: type(value).__name__)
def test_every_error_has_its_text_and_survives_pickling(
    error: MoesimError, builtin: type[Exception], text: str
) -> None:
    assert str(error) == text
    assert isinstance(error, MoesimError)
    assert isinstance(error, builtin)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == text
    assert copy.problems == error.problems
    assert copy.code == error.code


def test_every_public_class_of_the_tree_is_pickled_above() -> None:
    public = {item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, MoesimError)}
    assert {type(error) for error, _, _ in RAISED} == {item for item in public if not item.__name__.startswith("_")}


def test_every_class_has_a_default_code_that_is_listed() -> None:
    for error, _, _ in RAISED:
        assert type(error).default_code in ERROR_CODES
        assert all(problem.code in ERROR_CODES for problem in error.problems)


def test_codes_have_one_form_and_a_meaning_of_one_line() -> None:
    for code, meaning in ERROR_CODES.items():
        assert re.fullmatch(r"E-[A-Z]{3}-[0-9]{3}", code)
        assert meaning.isprintable()
        assert len(meaning) > 10
    assert len(set(ERROR_CODES.values())) == len(ERROR_CODES)


def test_a_problem_has_the_keys_of_the_contract() -> None:
    assert UNKNOWN_KEY.to_json() == {
        "code": "E-SCN-001",
        "file": "a.yaml",
        "line": 7,
        "field": "parallelism.exprt",
        "message": "unknown key 'exprt'",
        "remedy": "did you mean 'expert'?",
    }
    assert list(UNKNOWN_KEY.to_json()) == ["code", "file", "line", "field", "message", "remedy"]


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (UNKNOWN_KEY, "a.yaml:7: parallelism.exprt: unknown key 'exprt'; did you mean 'expert'?"),
        (Problem("E-SCN-012", "no '='", "write PATH=VALUE", file="--set"), "--set: no '='; write PATH=VALUE"),
        (Problem("E-SCN-002", "the key is missing", "", field="devices"), "devices: the key is missing"),
        (Problem("E-DOM-001", "too small", "", line=3), "too small"),
    ],
)
def test_a_sentence_leaves_out_what_is_not_known(problem: Problem, sentence: str) -> None:
    assert problem.sentence() == sentence


def test_an_error_without_problems_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="ScenarioError needs at least one problem"):
        ScenarioError([])


@pytest.mark.parametrize(
    ("found", "nearest"),
    [("exprt", "expert"), ("EXPERT", "expert"), ("expert_tensr", "expert_tensor"), ("zzz", None), ("", None)],
)
def test_the_nearest_name_is_a_similar_one_or_none(found: str, nearest: str | None) -> None:
    assert nearest_name(found, ["data", "expert", "expert_tensor"]) == nearest


def test_the_nearest_of_no_names_is_none() -> None:
    assert nearest_name("expert", []) is None
