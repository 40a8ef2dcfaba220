"""``moesim predict``: columns, sources, intervals, bad input."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from moesim.cli import main
from moesim.cost.efficiency_surfaces import device_rates
from moesim.cost.operators import attention_cost, gemm_cost
from moesim.describe.hardware_library import HardwareLibrary
from moesim.structure.step_graph import AttentionCore, Gemm

GEMM = "label,m,n,k\na,4096,4096,4096\nb,1,64,64\nc,8192,7168,2048\n"
ATTENTION = "batch_size,isl,num_heads,num_key_value_heads,head_dim,pass,is_causal\n" + "".join(
    f"1,4096,32,8,128,{one},{masked}\n" for one in ("forward", "backward") for masked in ("true", "false")
)


MOE_HEADER = (
    "framework,num_tokens,hidden_size,inter_size,topk,num_experts,moe_tp_size,moe_ep_size,distribution,kernel_source\n"
)
MOE = MOE_HEADER + "".join(
    f"TRTLLM,{tokens},4096,1536,8,128,1,8,{router},moe_torch_flow_cutlass\n"
    for router in ("balanced", "power_law_1.01", "power_law_1.2")
    for tokens in (64, 1024, 16384)
)


def predicted(tmp_path: Path, operator: str, device: str, text: str) -> list[dict[str, str]]:
    source, target = tmp_path / "shapes.csv", tmp_path / "predictions.csv"
    source.write_text(text, encoding="utf-8")
    assert main(["predict", operator, "--device", device, "--input", str(source), "--output", str(target)]) == 0
    with target.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_unknown_columns_are_kept_in_order_and_four_are_added(tmp_path: Path) -> None:
    rows = predicted(tmp_path, "gemm", "v100_sxm2_32gb", GEMM)
    assert list(rows[0]) == ["label", "m", "n", "k", "predicted_us", "low_us", "high_us", "source"]
    assert [row["label"] for row in rows] == ["a", "b", "c"]
    for row in rows:
        assert 0 < float(row["low_us"]) < float(row["predicted_us"]) < float(row["high_us"])
        assert row["source"] == "transferred"


def test_a_v100_multiplies_in_fp16_near_but_below_its_peak(tmp_path: Path) -> None:
    (row, *_) = predicted(tmp_path, "gemm", "v100_sxm2_32gb", GEMM)
    rate = 2 * 4096**3 / (float(row["predicted_us"]) * 1e-6)
    assert 0.6 * 125e12 < rate < 125e12


def test_fitted_devices_say_so_and_extrapolate_to_other_passes_with_wider_intervals(tmp_path: Path) -> None:
    rows = predicted(tmp_path, "attention", "h100_sxm", ATTENTION)
    assert [row["source"] for row in rows] == ["fitted", "extrapolated", "extrapolated", "extrapolated"]
    times = [float(row["predicted_us"]) for row in rows]
    assert times[1] == pytest.approx(2 * times[0], rel=1e-4)
    assert times[2] == pytest.approx(2.5 * times[0], rel=1e-4)
    widths = [float(row["high_us"]) / float(row["predicted_us"]) for row in rows]
    assert widths[2] > widths[0]


def test_gradients_are_the_same_products_in_another_order(tmp_path: Path) -> None:
    text = "m,n,k,pass\n64,4096,1024,dgrad\n64,1024,4096,forward\n64,4096,1024,wgrad\n4096,1024,64,forward\n"
    times = [row["predicted_us"] for row in predicted(tmp_path, "gemm", "a800_sxm", text)]
    assert times[0] == times[1]
    assert times[2] == times[3]


def test_a_skewed_router_costs_more_than_a_balanced_one(tmp_path: Path) -> None:
    rows = predicted(tmp_path, "moe", "h200_sxm", MOE)
    assert next(iter(rows[0])) == "framework"
    assert {row["source"] for row in rows} == {"fitted"}
    times = [float(row["predicted_us"]) for row in rows]
    balanced, mild, steep = times[0:3], times[3:6], times[6:9]
    assert all(even < little < much for even, little, much in zip(balanced[1:], mild[1:], steep[1:], strict=True))
    for row in rows:
        assert 0 < float(row["low_us"]) < float(row["predicted_us"]) < float(row["high_us"])


def test_layers_outside_what_was_measured_are_extrapolated_with_wider_intervals(tmp_path: Path) -> None:
    text = MOE_HEADER + "".join(f"x,{tokens},4096,1536,8,128,1,8,balanced,\n" for tokens in (16384, 1 << 20))
    inside, outside = predicted(tmp_path, "moe", "h100_sxm", text)
    assert (inside["source"], outside["source"]) == ("fitted", "extrapolated")
    widths = [float(row["high_us"]) / float(row["predicted_us"]) for row in (inside, outside)]
    assert widths[1] > widths[0]


def test_layers_of_devices_without_tables_are_transferred(tmp_path: Path) -> None:
    assert {row["source"] for row in predicted(tmp_path, "moe", "v100_sxm2_32gb", MOE)} == {"transferred"}
    assert {row["source"] for row in predicted(tmp_path, "attention", "tpu_v4", ATTENTION)} == {"transferred"}


def test_a_device_that_surfaces_do_not_suit_is_predicted_as_its_steps_are_priced(tmp_path: Path) -> None:
    rates = device_rates(HardwareLibrary().device("tpu_v4"))
    size = np.array([4096.0])
    (gemm,) = predicted(tmp_path, "gemm", "tpu_v4", "m,n,k\n4096,4096,4096\n")
    work = Gemm(size, size, size, np.ones(1), "bf16", 2.0, 2.0)
    assert float(gemm["predicted_us"]) == pytest.approx(1e6 * float(gemm_cost(work, rates)[0][0]), rel=1e-5)
    header = "batch_size,isl,num_heads,num_key_value_heads,head_dim\n"
    (attention,) = predicted(tmp_path, "attention", "tpu_v4", header + "2,4096,16,16,128\n")
    core = AttentionCore(2 * size**2, np.array([16.0]), 256.0, 0.5, 2 * size * 128 * 64, "bf16", 2.0)
    seconds = float(attention_cost(core, rates, 1)[0][0])
    assert float(attention["predicted_us"]) == pytest.approx(1e6 * seconds, rel=1e-5)


def test_experts_without_a_gate_cost_less_and_sizes_may_be_written_as_decimals(tmp_path: Path) -> None:
    rows = [f"x,1024.0,4096,1536,8.0,128,1,8,balanced,{kernel}\n" for kernel in ("moe_torch_flow_nongated", "other")]
    ungated, gated = predicted(tmp_path, "moe", "b200_sxm", MOE_HEADER + "".join(rows))
    assert float(ungated["predicted_us"]) < float(gated["predicted_us"])


def test_all_problems_of_a_layer_are_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "layers.csv", tmp_path / "out.csv"
    source.write_text(
        MOE_HEADER + "x,64,4096,1536,9,8,1,1,balanced,\nx,64,4096,1536,2,8,1,3,zipf,\nx,64,4096,1536,2,8,1\n",
        encoding="utf-8",
    )
    arguments = ["--device", "h100_sxm", "--input", str(source), "--output", str(target)]
    assert main(["predict", "moe", *arguments]) == 2
    assert "7 values under a header of 10" in capsys.readouterr().err
    source.write_text(source.read_text(encoding="utf-8").rsplit("x,", 1)[0], encoding="utf-8")
    assert main(["predict", "moe", *arguments]) == 2
    err = capsys.readouterr().err
    assert all(said in err for said in ("topk is above num_experts", "no multiple of moe_ep_size", "zipf"))
    assert not target.exists()


def test_an_empty_table_gives_an_empty_answer(tmp_path: Path) -> None:
    assert predicted(tmp_path, "gemm", "h100_sxm", "m,n,k\n") == []
    assert predicted(tmp_path, "moe", "h100_sxm", MOE_HEADER) == []
    assert predicted(tmp_path, "attention", "h100_sxm", ATTENTION.split("\n", 1)[0] + "\n") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("m,n\n1,2\n", "column k missing"),
        ("m,n,k\n1,2,x\n1,2,-4\n1,2,nan\n", "line 4"),
        ("m,n,k,pass\n1,2,3,sideways\n", "sideways"),
        ("m,n,k,source\n1,2,3,me\n", "source is there already"),
        ("", "missing"),
    ],
)
def test_bad_tables_are_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    source, target = tmp_path / "shapes.csv", tmp_path / "out.csv"
    source.write_text(text, encoding="utf-8")
    assert main(["predict", "gemm", "--device", "h100_sxm", "--input", str(source), "--output", str(target)]) == 2
    err = capsys.readouterr().err
    assert said in err or said.replace("line ", ":") in err
    assert list(tmp_path.iterdir()) == [source]


def test_unknown_operators_and_devices_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "shapes.csv"
    source.write_text(GEMM, encoding="utf-8")
    arguments = ["--input", str(source), "--output", str(tmp_path / "out.csv")]
    assert main(["predict", "gemv", "--device", "h100_sxm", *arguments]) == 2
    assert main(["predict", "gemm", "--device", "h100_sxn", *arguments]) == 2
    assert "h100_sxm" in capsys.readouterr().err
