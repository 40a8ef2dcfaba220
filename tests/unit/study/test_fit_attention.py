import csv
import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from moesim.cost.attention_surface import (
    AttentionParameters,
    AttentionShapes,
    attention_formula_time_s,
    attention_surface_from_document,
    attention_time_s,
)
from moesim.study.fit_attention import (
    DeviceFigures,
    attention_folds,
    fit_attention,
    held_out_attention_times_s,
    select_shapes,
)
from moesim.study.fit_grids import GridProbes, fit_residual_grids, with_interval
from moesim.study.kernel_tables import error_statistics
from moesim.study.kernel_validation_attention import write_attention_validation

FIGURES = DeviceFigures(1e15, 3e12, 128.0)
PLANTED = AttentionParameters(9e-6, 0.6, 0.85, 0.95, 0.95, 1.2, 2.5e-6, 0.8, 1e-10, 3e7, 1.6)
LAYERS = [(1, 1), (8, 2), (8, 8), (16, 4), (32, 4), (32, 8), (64, 8), (96, 96)]


def table_shapes() -> AttentionShapes:
    calls = product((1, 4, 16, 64), (1, 64, 128, 512, 1024, 4096, 16384), LAYERS, (64, 128))
    rows = [(batch, sequence, *layer, size) for batch, sequence, layer, size in calls]
    return AttentionShapes(*(np.array(column, dtype=float) for column in zip(*rows, strict=True)))


def planted_s(shapes: AttentionShapes) -> np.ndarray:
    return attention_formula_time_s(PLANTED, shapes, **asdict(FIGURES))


SHAPES = table_shapes()
TIME_S = planted_s(SHAPES)


def test_the_formula_recovers_what_was_planted():
    surface = fit_attention("planted", SHAPES, TIME_S, FIGURES, has_grids=False)
    assert error_statistics(attention_time_s(surface, SHAPES), TIME_S).p90 < 0.005
    for name in ("fixed_s", "compute_fraction", "head_64_factor", "tile_s", "lone_tile_factor"):
        assert getattr(surface.parameters, name) == pytest.approx(getattr(PLANTED, name), rel=0.05)


def test_one_row_in_ten_five_times_too_slow_changes_little():
    slow = TIME_S * np.where(np.random.default_rng(1).random(TIME_S.size) < 0.1, 5.0, 1.0)
    surface = fit_attention("planted", SHAPES, slow, FIGURES)
    assert error_statistics(attention_time_s(surface, SHAPES), TIME_S).p90 < 0.03


def test_grids_learn_what_the_formula_cannot_say():
    bump = np.exp(0.15 * np.sin(np.log2(SHAPES.sequence)) + 0.1 * (SHAPES.heads == SHAPES.kv_heads))
    errors = []
    for has_grids in (False, True):
        surface = fit_attention("planted", SHAPES, TIME_S * bump, FIGURES, has_grids=has_grids)
        errors.append(error_statistics(attention_time_s(surface, SHAPES), TIME_S * bump).median)
    assert errors[1] < 0.4 * errors[0]


def test_a_table_that_falls_is_not_followed_downwards():
    falling = TIME_S * np.where(SHAPES.sequence == 128, 1.6, 1.0)
    surface = fit_attention("planted", SHAPES, falling, FIGURES)
    sequences = np.arange(1.0, 2048.0)
    for batch, (heads, kv_heads) in product((1.0, 8.0), LAYERS):
        fixed = (np.array(value) for value in (heads, kv_heads, 128.0))
        time_s = attention_time_s(surface, AttentionShapes(np.array(batch), sequences, *fixed))
        assert (time_s >= np.maximum.accumulate(time_s) * 0.99).all()


def test_a_fold_is_predicted_without_its_rows():
    folds = attention_folds(SHAPES)
    is_out = folds == folds[0]
    tampered = np.where(is_out, 3.0 * TIME_S, TIME_S)
    _, honest = held_out_attention_times_s("planted", SHAPES, TIME_S, FIGURES, folds)
    _, after = held_out_attention_times_s("planted", SHAPES, tampered, FIGURES, folds)
    assert (after[is_out] == honest[is_out]).all()
    assert (after[~is_out] != honest[~is_out]).any()


def test_folds_keep_whole_shapes_together():
    folds = attention_folds(SHAPES, seed=3)
    for layer, size in product(LAYERS, (64, 128)):
        is_shape = (SHAPES.heads == layer[0]) & (SHAPES.kv_heads == layer[1]) & (SHAPES.head_size == size)
        assert np.unique(folds[is_shape]).size == 1


def test_a_grid_obeys_its_constraint_exactly_where_it_is_probed():
    at = np.linspace(0.0, 4.0, 200)
    points = np.linspace(0.0, 4.0, 41)
    probes = GridProbes({"x": points}, np.zeros(41), np.arange(40), np.arange(1, 41))
    (grid,) = fit_residual_grids([("x",)], {"x": (0, 1, 2, 3, 4)}, {"x": at}, np.where(at < 2, at, 4.0 - at), probes)
    assert (np.diff(grid.values) >= -1e-4).all()
    assert grid.values[0] < 0.5 < grid.values[-1]


def test_the_interval_covers_nine_rows_in_ten():
    noisy = TIME_S * np.exp(0.05 * np.random.default_rng(0).standard_normal(TIME_S.size))
    surface = fit_attention("planted", SHAPES, TIME_S, FIGURES, has_grids=False)
    surface = with_interval(surface, TIME_S, noisy)
    widths = surface.interval_half_widths[np.searchsorted(surface.interval_edges_s, TIME_S, side="right")]
    assert 0.88 <= np.mean(np.abs(np.log(noisy / TIME_S)) <= widths) <= 0.95


def test_selecting_rows_keeps_their_order():
    part = select_shapes(SHAPES, SHAPES.heads == 8)
    assert (part.heads == 8).all()
    assert part.sequence.size == (SHAPES.heads == 8).sum()


def write_table(folder: Path, time_s: np.ndarray) -> None:
    with (folder / "planted_attention_prefill_bf16.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "time_us"])
        columns = (SHAPES.batch, SHAPES.sequence, SHAPES.heads, SHAPES.kv_heads, SHAPES.head_size)
        for *sizes, seconds in zip(*columns, time_s, strict=True):
            writer.writerow([*(int(size) for size in sizes), seconds * 1e6])


@pytest.fixture
def few_probes(monkeypatch):
    """Fewer points where the time may not fall: these tests are about something else."""
    monkeypatch.setattr("moesim.study.fit_attention.PROBE_PAIRS", 2000)


@pytest.mark.usefixtures("few_probes")
def test_validation_writes_a_report_and_surfaces_that_can_be_read_back(tmp_path):
    write_table(tmp_path, TIME_S * np.exp(0.01 * np.random.default_rng(0).standard_normal(TIME_S.size)))
    problems = write_attention_validation(
        tmp_path, {"planted": FIGURES}, reports=tmp_path / "reports", surfaces=tmp_path / "surfaces"
    )
    assert problems == []
    assert "| planted | 448 |" in (tmp_path / "reports" / "attention.md").read_text(encoding="utf-8")
    assert (tmp_path / "reports" / "attention.csv").read_text(encoding="utf-8").startswith("device,group,model,median")
    document = json.loads((tmp_path / "surfaces" / "attention_planted.json").read_text(encoding="utf-8"))
    surface = attention_surface_from_document(document)
    assert error_statistics(attention_time_s(surface, SHAPES), TIME_S).median < 0.02
    assert document["provenance"]["rows"] == TIME_S.size


@pytest.mark.usefixtures("few_probes")
def test_validation_says_what_misses_its_tolerance(tmp_path):
    write_table(tmp_path, TIME_S * np.exp(0.3 * np.random.default_rng(0).standard_normal(TIME_S.size)))
    (problem, *_) = write_attention_validation(tmp_path, {"planted": FIGURES}, reports=tmp_path)
    assert problem.startswith("planted: ")
    assert "limit 3.5% / 10.0%" in problem


def test_a_surface_without_grids_is_the_formula():
    surface = fit_attention("planted", SHAPES, TIME_S, FIGURES)
    bare = replace(surface, grids=())
    assert attention_time_s(bare, SHAPES) == pytest.approx(
        attention_formula_time_s(surface.parameters, SHAPES, **asdict(FIGURES)), rel=1e-9
    )
