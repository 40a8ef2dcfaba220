from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.describe.hardware_library import HardwareLibrary
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario, load
from moesim.estimation.step_estimate import CostAnswer, StepEstimate
from moesim.report.breakdown_figures import breakdown_rows
from moesim.report.figures import breakdown_figure, memory_figure, scaling_figure
from moesim.report.memory_figures import MISSING_ROW
from moesim.report.numbers import GIB, time_scale
from moesim.report.scaling_figures import HOLLOW, device_labels, log_ticks, tick_texts
from moesim.report.styles import BLUE, FAMILIES, MEMORY_CATEGORIES, SMALL_FONT_SIZE, STEP_CATEGORIES, VERMILION
from moesim.structure import memory_footprint, step_graph
from moesim.study.scaling import scaling_from

NAMES = ["m6t_1t_v100x480", "deepseek_v3", "gshard_600b_2048e_36l", "megatron_moe_mixtral_8xh100"]


def loaded_scenario(name: str, *assignments: str) -> LoadedScenario:
    return load(name, assignments=assignments, library=HardwareLibrary())


@pytest.fixture(scope="module", params=NAMES)
def answer(request: pytest.FixtureRequest) -> StepEstimate:
    return estimate_loaded(loaded_scenario(request.param))


@pytest.fixture(scope="module")
def too_large() -> LoadedScenario:
    return loaded_scenario("m6t_1t_v100x480", "optimizer.kind=adam", "precision.parameters=fp32")


@pytest.fixture(scope="module")
def breakdown(answer: StepEstimate) -> Any:
    return breakdown_figure(answer)


def traces(figure: Any, meta: str) -> list[Any]:
    return [trace for trace in figure.data if trace.meta == meta]


def texts(figure: Any) -> str:
    return " ".join(str(annotation.text) for annotation in figure.layout.annotations)


def test_every_category_has_a_name_and_a_colour() -> None:
    assert set(STEP_CATEGORIES) == set(step_graph.CATEGORIES)
    assert tuple(MEMORY_CATEGORIES) == memory_footprint.CATEGORIES
    assert len({style.name for style in STEP_CATEGORIES.values()}) == len(STEP_CATEGORIES)
    assert {style.family for style in STEP_CATEGORIES.values()} == set(FAMILIES)


def test_exposed_bars_sum_to_the_step(answer: StepEstimate, breakdown: Any) -> None:
    size = time_scale(answer.step_time_s).size
    for meta in ("exposed", "family"):
        total = sum(value for trace in traces(breakdown, meta) for value in trace.x)
        assert total * size == pytest.approx(answer.step_time_s, rel=1e-8)


def test_bars_are_the_categories_of_the_estimate(answer: StepEstimate, breakdown: Any) -> None:
    size = time_scale(answer.step_time_s).size
    for meta, expected in (("exposed", answer.exposed_s), ("hidden", answer.hidden_s)):
        drawn = {name: x for trace in traces(breakdown, meta) for name, x in zip(trace.y, trace.x, strict=True)}
        for category, style in STEP_CATEGORIES.items():
            value = expected.get(category, 0.0)
            assert drawn.get(style.name, 0.0) * size == pytest.approx(value, abs=1e-9 * answer.step_time_s)
    assert all(max(row.exposed_s, row.hidden_s) > 0 for row in breakdown_rows(answer))


def test_bounds_and_interval_are_marked(answer: StepEstimate, breakdown: Any) -> None:
    size = time_scale(answer.step_time_s).size
    bounds, interval = (np.array(trace.x) * size for trace in traces(breakdown, "range"))
    np.testing.assert_allclose(bounds, [answer.lower_s, answer.upper_s])
    np.testing.assert_allclose(interval, [answer.interval_s.low, answer.interval_s.high])


def test_stage_times_are_drawn_with_a_pipeline_only(answer: StepEstimate, breakdown: Any) -> None:
    drawn = traces(breakdown, "stages")
    times = answer.pipeline.stage_times_s
    assert len(drawn) == (len(times) > 1)
    for trace in drawn:
        np.testing.assert_allclose(np.array(trace.y) * time_scale(max(times)).size, times)


def test_memory_bars_follow_each_other_up_to_the_peak(answer: StepEstimate) -> None:
    figure = memory_figure(answer)
    end = 0.0
    for trace in traces(figure, "category"):
        assert trace.base[0] == pytest.approx(end)
        end += trace.x[0]
    assert end * GIB == pytest.approx(answer.memory.peak, rel=1e-12)
    assert figure.layout.shapes[0].x0 * GIB == pytest.approx(answer.memory.capacity)


def test_deficit_is_drawn_and_said(too_large: LoadedScenario) -> None:
    answer = estimate_loaded(too_large)
    figure = memory_figure(answer)
    (difference,) = traces(figure, "difference")
    assert list(difference.y) == [MISSING_ROW]
    assert difference.x[0] * GIB == pytest.approx(answer.memory.deficit)
    assert difference.base[0] * GIB == pytest.approx(answer.memory.capacity)
    assert "does not fit, 12.04 GiB are missing" in figure.layout.title.text


def test_scaling_traces_hold_the_legal_points() -> None:
    scaling = scaling_from(loaded_scenario("mixtral_8x7b"))
    figure = scaling_figure(scaling)
    longest_s = max(np.nanmax(curve.step_time_s) for curve in scaling.curves)
    unit = time_scale(longest_s)
    assert unit.symbol == "s"
    assert "Step time in s" in texts(figure)
    for curve in scaling.curves:
        legal = [point.verdict != "illegal" for point in curve.points]
        assert not all(legal)
        for field, size in (("step_time_s", unit.size), ("tokens_per_s", 1.0), ("usd_per_billion_tokens", 1.0)):
            for meta, name in ((f"{curve.mode} {field}", field), (f"ideal {curve.mode} {field}", f"ideal_{field}")):
                (trace,) = traces(figure, meta)
                assert list(trace.x) == list(curve.devices[legal])
                np.testing.assert_allclose(np.array(trace.y) * size, getattr(curve, name)[legal])


def test_points_that_do_not_fit_are_hollow_and_explained(too_large: LoadedScenario) -> None:
    figure = scaling_figure(scaling_from(too_large))
    (trace,) = traces(figure, "weak step_time_s")
    assert list(trace.marker.color) == [HOLLOW] * 6
    for text in trace.customdata:
        assert "does not fit" in text


def test_points_that_fit_are_full_beside_hollow_ones() -> None:
    figure = scaling_figure(scaling_from(loaded_scenario("m6t_1t_v100x480")))
    (trace,) = traces(figure, "weak step_time_s")
    assert list(trace.x) == [15, 30, 60, 120, 240, 480]
    assert list(trace.marker.color) == [HOLLOW] * 5 + [BLUE]
    assert ["does not fit" in text for text in trace.customdata] == [True] * 5 + [False]
    for devices, text in zip(trace.x, trace.customdata, strict=True):
        assert f"expert degree {devices}" in text.split("<br>")


def test_legend_is_full_where_the_first_point_is_hollow() -> None:
    figure = scaling_figure(scaling_from(loaded_scenario("m6t_1t_v100x480")))
    shown = [trace for trace in figure.data if trace.showlegend]
    assert [trace.name.split(":")[0] for trace in shown] == ["Weak", "Strong", "Hollow", "Perfect scaling"]
    assert [trace.marker.color for trace in shown[:3]] == [BLUE, VERMILION, HOLLOW]
    figure = scaling_figure(scaling_from(loaded_scenario("t5_base")))
    assert not any("Hollow" in str(trace.name) for trace in figure.data)


@pytest.mark.parametrize("name", ["gshard_600b_2048e_36l", "switch_c"])
def test_axes_stay_readable_where_step_times_differ_by_orders_of_magnitude(name: str) -> None:
    scaling = scaling_from(loaded_scenario(name))
    assert np.nanmax(scaling.strong.step_time_s) > 1e4 * scaling.base.step_time_s
    figure = scaling_figure(scaling)
    for number, field in enumerate(("step_time_s", "tokens_per_s", "usd_per_billion_tokens"), start=1):
        axis = figure.layout["yaxis" if number == 1 else f"yaxis{number}"]
        assert axis.type == "log"
        assert 3 <= len(axis.ticktext) <= 8
        assert len(set(axis.ticktext)) == len(axis.ticktext)
        for curve in scaling.curves:
            (trace,) = traces(figure, f"{curve.mode} {field}")
            assert axis.range[0] < min(np.log10(trace.y)) <= max(np.log10(trace.y)) < axis.range[1]


def test_missing_price_is_said_instead_of_drawn() -> None:
    scaling = scaling_from(loaded_scenario("mixtral_8x7b"))
    base = replace(scaling.base, cost=CostAnswer(None, None))
    unpriced = replace(scaling, base=base)
    figure = scaling_figure(unpriced)
    assert traces(figure, "weak usd_per_billion_tokens") == []
    assert "No cost: neither cluster h100_sxm_hgx_nodes" in texts(figure)


def test_no_text_is_smaller_than_thirteen_pixels(answer: StepEstimate, breakdown: Any) -> None:
    for figure in (breakdown, memory_figure(answer)):
        sizes = [annotation.font.size for annotation in figure.layout.annotations]
        assert min([*sizes, figure.layout.font.size, figure.layout.legend.font.size]) >= SMALL_FONT_SIZE == 13


@pytest.mark.parametrize("high", [1.3, 4.0, 60.0, 1e5])
@pytest.mark.parametrize("low", [0.00123, 1.0, 7.7, 3.1e6])
def test_log_ticks_lie_in_the_range_and_are_few(low: float, high: float) -> None:
    ticks = log_ticks(low, low * max(high, 4.0))
    assert 3 <= len(ticks) <= 8
    assert all(low <= tick <= low * max(high, 4.0) for tick in ticks)


def test_tick_texts_write_thousands_in_one_way() -> None:
    assert tick_texts([0.5, 1.0, 1e4]) == ["0.5", "1", "10,000"]
    assert tick_texts([100.0, 1e3, 1e4, 1e5, 1e6]) == ["100", "1k", "10k", "100k", "1M"]


def test_device_labels_are_few_and_include_the_base() -> None:
    devices = [2**power for power in range(14)]
    labels = device_labels(devices, 64)
    assert labels[6] == "<b>64</b>"
    assert 1 <= sum(label != "" for label in labels) <= 7
