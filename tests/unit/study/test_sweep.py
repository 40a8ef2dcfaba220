"""Sweeps to a file: resumable, atomic, equal to the table in memory."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from moesim.estimation.tables import ROWS_PER_CHUNK, estimate_many
from moesim.study.sweep import run_sweep

SPACE = """
schema_version: 1
name: resumable
base: mixtral_8x7b
axes:
  parallelism.pipeline.schedule: [one_f_one_b]
  parallelism.pipeline.virtual_stages: [1]
  parallelism.data: [auto]
  parallelism.tensor: [1, 2, 4]
  parallelism.pipeline.stages: [1, 2, 4]
  parallelism.zero_stage: [0, 1]
  parallelism.recompute: [none, full]
  workload.sequences_per_micro_batch: [1, 2]
  workload.sequences_per_step: [{}]
"""


@pytest.fixture
def space_file(tmp_path: Path) -> Path:
    steps = ", ".join(str(256 * count) for count in range(1, 1001))
    path = tmp_path / "space.yaml"
    path.write_text(SPACE.format(steps), encoding="utf-8")
    return path


def test_an_interrupted_sweep_goes_on_where_it_stopped(space_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.csv"

    def stop(done: int, total: int) -> None:
        assert done < total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(space_file, output, workers=1, advance=stop)
    assert not output.exists()
    partial = output.with_name("rows.csv.partial")
    with partial.open("a", encoding="utf-8") as stream:
        stream.write("half a row,")  # what a kill in the middle of a write leaves
    summary = run_sweep(space_file, output, workers=1)
    assert 0 < summary.resumed_rows < summary.rows == 72_000
    assert summary.rows > ROWS_PER_CHUNK
    whole = tmp_path / "whole.csv"
    reference = run_sweep(space_file, whole, workers=1)
    assert output.read_bytes() == whole.read_bytes()
    assert summary.funnel == reference.funnel
    assert summary.reasons == reference.reasons
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "space.yaml", "whole.csv"]


def test_rows_in_the_file_equal_the_table(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE.format("256, 512, 700"), encoding="utf-8")
    output = tmp_path / "rows.csv"
    summary = run_sweep(path, output)
    table = estimate_many(path)
    with output.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(table) == summary.rows
    for row, expected in zip(rows, table.rows(), strict=True):
        assert row["verdict"] == expected["verdict"]
        assert row["reason"] == expected["reason"]
        if expected["verdict"] != "illegal":
            assert float(row["step_time_s"]) == expected["step_time_s"]
            assert float(row["memory_peak_bytes"]) == expected["memory_peak_bytes"]
        else:
            assert row["step_time_s"] == ""
    funnel = table.funnel()
    assert summary.funnel == {
        "tried": funnel["tried"],
        "illegal": funnel["illegal"],
        "does_not_fit": funnel["does_not_fit"],
        "costed": funnel["ok"],
    }
    assert summary.best[0]["tokens_per_s"] == max(row["tokens_per_s"] for row in table.rows() if row["verdict"] == "ok")


def test_a_changed_space_starts_again(space_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.csv"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(space_file, output, workers=1, advance=stop)
    space_file.write_text(SPACE.format("256"), encoding="utf-8")
    summary = run_sweep(space_file, output, workers=1)
    assert summary.resumed_rows == 0
    assert summary.rows == 72
