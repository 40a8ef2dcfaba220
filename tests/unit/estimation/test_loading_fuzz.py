"""Whatever a scenario document holds, loading ends in an estimate or in problems, never in a traceback."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.describe.documents import Document, assign, parse_document, read_document
from moesim.describe.hardware_library import HardwareLibrary
from moesim.errors import FormatError, Problem, ScenarioError
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import load_document
from moesim.resources import find_scenario

LIBRARY = HardwareLibrary()
BASES = {
    name: read_document(find_scenario(name)) for name in ("m6t_1t_v100x480", "mixtral_8x7b", "t5_base", "deepseek_v3")
}


def leaf_paths(value: Any, path: str = "") -> Iterator[str]:
    if path:
        yield path
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, item in items:
        if "." not in str(key):
            yield from leaf_paths(item, f"{path}.{key}" if path else str(key))


PATHS = {name: sorted(leaf_paths(document.data)) for name, document in BASES.items()}
numbers = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([0, 1, 2, 2**31, 2**53, 2**63 - 1, 2**63, 10**30, -(2**63)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256, 480, 960]),
)
values = st.recursive(
    st.one_of(
        numbers,
        st.none(),
        st.booleans(),
        st.text(max_size=8),
        st.sampled_from(
            [
                "auto",
                "moe",
                "dense",
                "fp16",
                "bf16",
                "fp8",
                "full",
                "gpipe",
                "decode",
                "prefill",
                "k_top_1",
                "histogram",
            ]
        ),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)


@st.composite
def mutated_documents(draw: st.DrawFn) -> Document:
    name = draw(st.sampled_from(sorted(BASES)))
    document = BASES[name]
    for _ in range(draw(st.integers(1, 3))):
        document = assign_or_keep(document, draw(st.sampled_from(PATHS[name])), draw(values))
    return document


def assign_or_keep(document: Document, path: str, value: Any) -> Document:
    try:
        return assign(document, path, value)
    except ScenarioError:
        return document


def answer_or_problems(document: Document) -> None:
    problems: tuple[Problem, ...] = ()
    loaded = None
    try:
        loaded = load_document(document, LIBRARY)
    except (ScenarioError, FormatError) as error:
        problems = tuple(error.problems)
    assert (loaded is None) == bool(problems)
    assert all(problem.code and problem.message and problem.remedy for problem in problems)
    json.dumps([problem.to_json() for problem in problems])
    if loaded is None:
        return
    answer = estimate_loaded(loaded)
    assert math.isfinite(answer.step_time_s)
    assert answer.lower_s <= answer.step_time_s * (1 + 1e-9)
    assert answer.step_time_s <= answer.upper_s * (1 + 1e-9)
    json.dumps(answer.to_json(), allow_nan=False)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated_documents())
def test_mutated_scenarios_are_answered_or_refused_with_problems(document: Document) -> None:
    answer_or_problems(document)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_arbitrary_text_is_refused_with_problems(text: str) -> None:
    document = None
    with contextlib.suppress(FormatError):
        document = parse_document(text, "fuzz.yaml")
    if document is not None:
        answer_or_problems(document)
