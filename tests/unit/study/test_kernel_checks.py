"""``moesim validate kernels``: a folder of tables in, reports out, exit code by the targets."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import pytest

from moesim.cli import main
from moesim.cost.gemm_surface import gemm_surface_from_json
from moesim.describe.hardware_library import HardwareLibrary


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A table of times that the shipped H100 surface says, with 2 % noise: 10 x 6 x 5 sizes."""
    document = HardwareLibrary().surface("gemm", "h100_sxm")
    assert document is not None
    surface = gemm_surface_from_json(document)
    generator = np.random.default_rng(3)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["m", "n", "k", "time_us"])
    for m in (1, 4, 16, 64, 128, 256, 512, 1024, 4096, 8192):
        for n in (128, 512, 1024, 4096, 8192, 16384):
            for k in (128, 512, 2048, 4096, 8192):
                time_us = float(surface.time_s(m, n, k)) * 1e6 * np.exp(generator.normal(0, 0.02))
                writer.writerow([m, n, k, f"{time_us:.3f}"])
    folder = tmp_path / "tables"
    folder.mkdir()
    with gzip.open(folder / "h100_sxm_gemm_bf16.csv.gz", "wt", encoding="utf-8") as stream:
        stream.write(text.getvalue())
    return folder


@pytest.mark.slow
def test_the_command_writes_reports_and_says_which_targets_were_missed(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "reports"
    code = main(["validate", "kernels", "--data", str(tables), "--out", str(out), "--operator", "gemm"])
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"gemm.md", "gemm.csv", "transfer.md"}
    assert "h100_sxm" in printed
    assert (code == 0) == printed.rstrip().endswith("Missed targets: none")
    assert code in (0, 1)


def test_wrong_folders_and_operators_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "kernels", "--data", str(tmp_path / "nowhere")]) == 2
    assert main(["validate", "kernels", "--data", str(tmp_path), "--operator", "gemv"]) == 2
    assert "gemv" in capsys.readouterr().err
