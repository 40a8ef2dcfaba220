"""A processor calibrated on half of its shapes predicts the other half, and whole layers that nothing was fitted on."""

from __future__ import annotations

import json
from pathlib import Path

from moesim.cli import main

PROCESSOR = Path(__file__).parents[3] / "validation" / "processor"
MEASURED = str(PROCESSOR / "epyc_core_torch2.13.jsonl")


def test_gemms_and_layers_of_shapes_left_out_are_predicted_within_15_percent_with_coverage(capsys, tmp_path):
    (tmp_path / "devices").mkdir()
    (tmp_path / "stacks").mkdir()
    out = ["--out", str(tmp_path / "devices" / "core.yaml"), "--stack-out", str(tmp_path / "stacks" / "layers.yaml")]
    start = ["--profile", "epyc_core", "--profiles", str(PROCESSOR), "--half", "fit", "--time", "minimum"]
    assert main(["calibrate", MEASURED, *start, *out]) == 0
    capsys.readouterr()
    for half in ("judge", "all"):
        fitted = ["--profile", "core", "--stack", "layers", "--profiles", str(tmp_path), "--time", "minimum"]
        assert main(["compare", MEASURED, *fitted, "--half", half, "--json"]) == 0
        suites = json.loads(capsys.readouterr().out)["suites"]
        for suite in ("gemm", "moe_layer"):
            assert suites[suite]["median"] <= 0.15
            assert suites[suite]["coverage"] >= 0.85
