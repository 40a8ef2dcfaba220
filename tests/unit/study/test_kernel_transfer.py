"""Transfers judged: sources, intervals that other targets give, the page, the data beside the surfaces."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from moesim.cost.surface_transfer import Anchors
from moesim.describe.hardware_library import HardwareLibrary
from moesim.study.kernel_transfer import (
    MeasuredRows,
    TransferResult,
    judge_transfers,
    transfer_data,
    transfer_interval,
    transfer_report,
)

LIBRARY = HardwareLibrary()


def result(target: str, error: float, *, anchored: float | None = None) -> TransferResult:
    """A target whose 400 measured times are exp(error) times what is predicted."""
    measured = np.geomspace(1e-5, 1e-2, 400)
    rows = MeasuredRows(measured, measured > 1e-3, lambda source, target, anchors: measured)
    return TransferResult(
        operator="gemm",
        target=target,
        source="a100_sxm",
        relation="other generation",
        is_rule=True,
        rows=rows,
        datasheet_s=measured * np.exp(-error),
        anchored_s=None if anchored is None else measured * np.exp(-anchored),
    )


def test_the_interval_covers_nine_tenths_of_all_targets_alike():
    results = [result("a", 0.1), result("b", 0.3), result("c", -0.2)]
    interval = transfer_interval(results)
    assert interval.half_widths == pytest.approx(0.3)
    assert interval.coverages == {"a": 1.0, "b": 0.0, "c": 1.0}


def test_a_published_rate_counts_where_there_is_one():
    assert transfer_interval([result("a", 0.5, anchored=0.1)]).half_widths == pytest.approx(0.1)


def test_the_page_and_the_data_hold_every_transfer():
    results = {"gemm": [result("a", 0.1), result("b", 0.3, anchored=0.2)]}
    page = transfer_report(results)
    assert "| a | a100_sxm | other generation | 9.5 / 9.5 % (-10%) |" in page
    assert "half widths" in page
    facts = {"h100_sxm": {"generation": "hopper", "flops_per_byte": 295.2}}
    data = transfer_data({"rule": "kept", "intervals": {"moe": {}}}, results, facts)
    assert data["measured"] == facts
    assert data["rule"] == "kept"
    assert set(data["intervals"]) == {"moe", "gemm"}
    assert [(row["target"], row["published_rate"]) for row in data["errors"]["gemm"]] == [
        ("a", False),
        ("b", False),
        ("b", True),
    ]


def test_a_target_is_predicted_from_its_generation_and_as_if_it_had_none(tmp_path: Path):
    source = LIBRARY.surface("gemm", "h200_sxm")
    assert source is not None
    with gzip.open(tmp_path / "h100_sxm_gemm_bf16.csv.gz", "wt", encoding="utf-8") as stream:
        stream.write("m,n,k,time_us\n64,4096,4096,20\n4096,4096,4096,180\n")
    found = judge_transfers(tmp_path, "gemm", LIBRARY, {"h100_sxm": 0.8})
    assert [(one.source, one.relation, one.is_rule) for one in found] == [
        ("h200_sxm", "same generation", True),
        ("a100_sxm", "other generation", False),
    ]
    for one in found:
        assert one.anchored_s is not None
        assert one.rows.is_training.tolist() == [False, True]
        again = one.rows.carry(LIBRARY.device(one.source), LIBRARY.device("h100_sxm"), Anchors())
        assert one.datasheet_s.tolist() == again.tolist()


def test_the_shipped_table_has_every_measured_device():
    document = LIBRARY.transfer_document()
    for operator in ("gemm", "attention", "moe"):
        measured = set(LIBRARY.surface_devices(operator))
        assert {row["target"] for row in document["errors"][operator]} == measured
        assert all(row["source"] != row["target"] for row in document["errors"][operator])
        assert set(document["intervals"][operator]) == {"same generation", "other generation"}
