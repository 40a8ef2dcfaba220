from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path

import pytest

from moesim.describe.hardware_library import HardwareLibrary
from moesim.errors import FormatError
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import load_document
from moesim.resources import data_directory
from moesim.study.published_facts import PublishedRun, UnpredictableRunError, read_published_runs
from moesim.study.published_runs import recompute_variants, scenario_document
from moesim.study.published_validation import (
    PublishedReport,
    RunError,
    measured_step_time_s,
    run_published_validation,
)

DATA = data_directory("validation") / "published"

MIXTRAL = {
    "id": "invented-mixtral.1",
    "tier": "A",
    "use": "core",
    "scope": "full_step",
    "source_group": "invented",
    "model": "Mixtral-8x7B",
    "total_params_b": "46.7",
    "n_layers": "32.0",
    "d_model": "4096.0",
    "d_ff_expert": "14336.0",
    "n_heads": "32.0",
    "n_kv_heads": "8.0",
    "head_dim": "128",
    "attention": "GQA",
    "n_experts": "8.0",
    "top_k": "2.0",
    "moe_layers": "every layer",
    "vocab": "32000.0",
    "routing": "natural",
    "capacity_factor": "dropless",
    "seq_len": "4096.0",
    "global_batch": "256.0",
    "micro_batch": "1.0",
    "precision": "BF16",
    "device": "H100",
    "n_devices": "64.0",
    "tp": "1.0",
    "pp": "4.0",
    "vp": "8.0",
    "cp": "1.0",
    "ep": "8.0",
    "etp": "1.0",
    "zero_fsdp": "ZeRO-1 distributed optimizer",
    "recompute": "none",
    "optimizer": "Adam",
    "framework": "Megatron-Core",
    "step_time_s": "3.0",
    "source": "invented",
}


def run_with(**facts: str) -> PublishedRun:
    return PublishedRun({**MIXTRAL, **facts})


def fields_of(run: PublishedRun) -> dict:
    return scenario_document(run, HardwareLibrary()).data


@pytest.fixture(scope="module")
def report() -> PublishedReport:
    return run_published_validation(DATA)


def test_row_becomes_a_legal_scenario_with_the_published_parameters() -> None:
    run = run_with()
    answer = estimate_loaded(load_document(scenario_document(run, HardwareLibrary()), HardwareLibrary()))
    assert answer.parameters.total / 1e9 == pytest.approx(46.7, rel=0.002)
    assert answer.tokens_per_step == 256 * 4096
    assert (answer.cluster, answer.stack) == ("h100_sxm_hgx_nodes", "megatron_core_nccl")
    assert "model.moe.router.imbalance" in answer.assumptions


@pytest.mark.parametrize(
    ("facts", "stack"),
    [
        ({"other_opts": "DeepEP; CUDA graphs"}, "megatron_core_deepep"),
        ({"device": "H800", "framework": "HAI-LLM", "precision": "FP8"}, "deepseek_dualpipe_deepep"),
        ({"device": "GB200", "other_opts": "dispatcher hybridep"}, "megatron_core_hybridep_blackwell"),
        ({"device": "B200"}, "megatron_core_nccl_blackwell"),
        ({"device": "A100-80GB"}, "megatron_core_nccl_ampere"),
        ({"device": "A100-40GB", "framework": "Megatron-LM + FastMoE/SmartMoE fork"}, "fastmoe_nccl"),
        ({"device": "A100-40GB", "framework": "Tutel"}, "tutel_nccl"),
        ({"device": "GB300", "date_or_version": "26.04", "other_opts": "hybridep"}, "megatron_core_hybridep_blackwell"),
        (
            {"device": "GB300", "date_or_version": "26.08", "other_opts": "dispatcher hybridep"},
            "megatron_core_hybridep_blackwell_2606",
        ),
        (
            {"framework": "Megatron-Bridge", "date_or_version": "25.11", "ep": "16.0", "n_devices": "128.0"},
            "megatron_core_deepep",
        ),
        ({"framework": "Megatron-Bridge", "date_or_version": "25.11"}, "megatron_core_nccl"),
        ({"device": "V100", "precision": "fp16"}, "pytorch_einsum_nccl"),
        ({"device": "TPU v3"}, "xla_einsum"),
        ({"device": "TPU v6e"}, "xla_gspmd_modern"),
    ],
)
def test_stack_follows_from_device_and_software(facts: dict[str, str], stack: str) -> None:
    assert fields_of(run_with(**facts))["stack"] == stack


@pytest.mark.parametrize(
    ("published", "compute", "parameters"),
    [("MXFP8", "fp8", "bf16"), ("FP8-CS", "fp8", "bf16"), ("NVFP4", "fp4", "bf16"), ("fp16", "fp16", "fp16")],
)
def test_narrow_formats_are_of_the_linear_layers_only(published: str, compute: str, parameters: str) -> None:
    precision = fields_of(run_with(precision=published))["precision"]
    assert (precision["compute"], precision["parameters"], precision["dispatch"]) == (compute, parameters, parameters)


def test_blocks_have_scales_of_their_own_where_a_source_says_so() -> None:
    published = ("FP8-blockwise", "FP8 (blockwise 1x128/128x128), BF16 attention", "FP8-CS", "MXFP8")
    scales = [fields_of(run_with(precision=text))["precision"].get("scaling") for text in published]
    assert scales == ["block", "block", None, None]


def test_tpu_v3_counts_cores_and_takes_the_smallest_torus() -> None:
    fields = fields_of(run_with(device="TPU v3", n_devices="16.0", pp="1.0", vp=""))
    assert (fields["devices"], fields["cluster"]) == (32, "tpu_v3_4x4")


def test_batch_in_millions_of_tokens_is_a_power_of_two() -> None:
    facts = {"global_batch": "", "tokens_per_step": "1000000.0", "seq_len": "1024.0"}
    assert fields_of(run_with(**facts))["workload"]["sequences_per_step"] == 1024


def test_two_matrices_are_recognised_by_the_number_of_parameters() -> None:
    assert fields_of(run_with())["model"]["moe"]["is_gated"]
    assert not fields_of(run_with(total_params_b="32"))["model"]["moe"]["is_gated"]


def test_capacity_of_fastmoe_is_a_limit_per_expert_and_rank() -> None:
    """One expert a rank, 1.2 times a rank's tokens: 0.6 of two choices; 4.8 times: nothing is dropped or padded."""
    fastmoe = {"framework": "FastMoE", "device": "V100", "precision": "fp16"}
    for factor, expected in (("1.2", 1.2), ("4.8", 2.0)):
        router = fields_of(run_with(**fastmoe, capacity_factor=factor))["model"]["moe"]["router"]
        assert (router["capacity_factor"], router["capacity_per"]) == (expected, "token")


@pytest.mark.parametrize(
    ("text", "policy", "modules"),
    [
        ("full", "full", None),
        ("selective: mla_up_proj,mlp", "selective", ["mla_up_proj", "mlp"]),
        ("selective: layernorm,moe_act", "selective", ["layernorm", "moe_act"]),
        ("selective: mlp (first 3 dense layers)", "selective", ["mlp"]),
        ("RMSNorm + MLA up-projections", "selective", ["mla_up_proj", "layernorm"]),
        ("unknown", "none", None),
    ],
)
def test_recompute_is_by_the_modules_a_source_names(text: str, policy: str, modules: list[str] | None) -> None:
    parallelism = fields_of(run_with(recompute=text))["parallelism"]
    assert (parallelism["recompute"], parallelism.get("recompute_modules")) == (policy, modules)


def test_unpublished_recompute_is_the_least_that_fits() -> None:
    """A run that ran did fit; with published recompute there is nothing to choose."""
    library = HardwareLibrary()
    known = list(recompute_variants(scenario_document(run_with(), library)))
    unknown = list(recompute_variants(scenario_document(run_with(recompute="unknown"), library)))
    assert len(known) == 1
    peaks = [estimate_loaded(load_document(document, library)).memory.peak for document in unknown]
    assert len(peaks) == 4
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(
    ("options", "graphs", "overlaps"),
    [
        ("", None, None),
        ("dispatcher hybridep", [], False),
        ("dispatcher hybridep; CUDA graph full_iteration ; EP A2A overlap on", ["step"], True),
        ("dispatcher hybridep; CUDA graph full_iteration ", ["step"], True),
        ("HybridEP, full-iteration CUDA graph; overlap off", ["step"], False),
        ("CUDA graph local f+u+l+l+_+i+t+e+r+a+t+i+o+n", ["step"], None),
        ("dispatcher deepep; CUDA graph transformer_engine moe_router+moe_preprocess", ["router"], False),
        ("TE CUDA graphs attn+mlp", ["attention", "dense_ffn"], None),
        ("HybridEP, no CUDA graphs", [], None),
        ("DeepEP; 1F1B A2A overlap on; no CUDA graphs", [], True),
        ("HybridEP; overlap off; CUDA graphs", ["attention", "router"], False),
    ],
)
def test_options_of_a_run_switch_those_of_its_stack(
    options: str, graphs: list[str] | None, overlaps: bool | None
) -> None:
    switched = fields_of(run_with(other_opts=options))["stack_options"]
    assert switched == {"cuda_graphs": graphs, "overlaps_expert_communication": overlaps}


@pytest.mark.parametrize(
    ("facts", "field"),
    [
        ({"tp": ""}, "tp"),
        ({"d_model": ""}, "d_model"),
        ({"global_batch": ""}, "global_batch"),
        ({"device": "Abacus"}, "device"),
        ({"scope": "fleet_aggregate"}, "scope"),
        ({"attention": "hybrid Mamba2 + attention"}, "attention"),
        ({"device": "TPU v6e", "n_devices": "512"}, "n_devices"),
    ],
)
def test_row_without_an_essential_fact_names_the_field(facts: dict[str, str], field: str) -> None:
    with pytest.raises(UnpredictableRunError) as caught:
        fields_of(run_with(**facts))
    assert caught.value.field == field


def test_measured_step_time_from_every_kind_of_figure() -> None:
    library = HardwareLibrary()
    answer = estimate_loaded(load_document(scenario_document(run_with(), library), library))
    rate = str(256 * 4096 / 3.0 / 64)
    flops = str(answer.model_flops_per_step / 3.0 / 64 / 1e12)
    examples = {"other_metric_name": "examples_per_s (whole job)", "other_metric_value": str(256 / 3.0)}
    for facts in ({"tokens_per_s_per_device": rate}, {"tflops_per_device": flops}, examples):
        seconds, _ = measured_step_time_s(run_with(step_time_s="", **facts), answer)
        assert seconds == pytest.approx(3.0)
    with pytest.raises(UnpredictableRunError, match="MFU alone"):
        measured_step_time_s(run_with(step_time_s="", mfu_pct="50"), answer)


def test_enough_rows_of_every_family_are_predicted(report: PublishedReport) -> None:
    counts = {group.name: group.rows for group in report.by(lambda error: error.device.split("_")[0])}
    assert len(report.errors) >= 60
    assert counts["v100"] >= 8
    assert counts["a100"] >= 10
    assert counts["h100"] + counts["h800"] + counts["h200"] >= 20
    assert counts["b200"] + counts["gb200"] >= 15
    steps_on_tpu_v3 = [
        run for run in read_published_runs(DATA) if run.text("device") == "TPU v3" and run.text("scope") == "full_step"
    ]
    assert sum(error.device == "tpu_v3_core" for error in report.errors) == len(steps_on_tpu_v3)


def test_every_row_is_predicted_or_left_out_with_a_reason(report: PublishedReport) -> None:
    assert len(report.errors) + len(report.skipped) == len(read_published_runs(DATA))
    assert all(run.field and run.why for run in report.skipped)
    assert all(error.tier != "D" and math.isfinite(error.error_fraction) for error in report.errors)


def test_parameters_and_flops_agree_with_what_is_published(report: PublishedReport) -> None:
    """Before times are compared: shapes are those of the runs, and FLOPs are counted alike (causal) by Megatron."""
    for error in report.errors:
        if error.published_parameters_b is not None:
            assert error.parameters_b == pytest.approx(error.published_parameters_b, rel=0.12), error.id
    bridge = [error for error in report.errors if error.source_group == "megatron-bridge-table"]
    for error in bridge:
        if error.published_tflop_per_token and "GPT-OSS" not in error.model:
            assert error.model_tflop_per_token == pytest.approx(error.published_tflop_per_token, rel=0.02), error.id


def test_runs_that_ran_mostly_fit_and_peaks_are_those_published(report: PublishedReport) -> None:
    ratios = [
        error.predicted_memory_gib / error.published_memory_gib for error in report.errors if error.published_memory_gib
    ]
    assert len(ratios) >= 40
    assert statistics.median(ratios) == pytest.approx(1.0, abs=0.15)
    assert sum(not error.fits for error in report.errors) <= 0.06 * len(report.errors)


def test_intervals_cover_what_groups_left_out_took(report: PublishedReport) -> None:
    library = HardwareLibrary()
    for check in report.intervals():
        assert check.coverage >= 0.8
        carried = {
            (ratio.low, ratio.high)
            for path in sorted((data_directory("hardware_profiles") / "stacks").glob("*.yaml"))
            if (ratio := library.stack(path.stem).step_ratio) is not None and ratio.stack_class == check.stack_class
        }
        assert len(carried) == 1
        low, high = carried.pop()
        assert low == pytest.approx(check.low, rel=0.1)
        assert high == pytest.approx(check.high, rel=0.1)


def test_report_holds_every_row_and_the_reasons(report: PublishedReport, tmp_path: Path) -> None:
    text = report.to_markdown()
    assert all(f"| {error.id} |" in text for error in report.errors)
    assert all(f"| {run.id} |" in text for run in report.skipped)
    assert report.notes.strip() in text
    rows = list(csv.DictReader(report.to_csv().splitlines()))
    assert [row["id"] for row in rows] == [error.id for error in report.errors]
    judged = [error for error in report.errors if error.role == "judge"]
    assert report.to_json()["overall"]["rows"] == len(judged) < len(report.errors)
    fitted = [error for error in report.errors if error.role == "fit"]
    assert {error.use for error in fitted} >= {"control_dense", "overhead_control"}
    assert all("naive" not in error.id for error in fitted)
    assert [error.id for error in report.worst(3)] == [error.id for error in report.errors[:3]]


def test_statistics_of_known_errors(report: PublishedReport) -> None:
    from dataclasses import replace

    from moesim.study.published_validation import error_statistics

    def error(measured_s: float, predicted_s: float) -> RunError:
        fraction = predicted_s / measured_s - 1
        return replace(
            report.errors[0],
            measured_s=measured_s,
            predicted_s=predicted_s,
            error_fraction=fraction,
            lower_s=0.5 * predicted_s,
            upper_s=1.5 * predicted_s,
        )

    known = error_statistics("known", [error(1.0, 2.0), error(2.0, 1.0), error(1.0, 1.0)])
    assert known.median == 0.5
    assert known.bias_fraction == pytest.approx(0.0)
    assert (known.below_bounds, known.above_bounds) == (0, 1)


def test_files_are_written_and_rows_of_tier_d_left_out(tmp_path: Path) -> None:
    with (tmp_path / "runs.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(MIXTRAL))
        writer.writeheader()
        writer.writerows([MIXTRAL, {**MIXTRAL, "id": "broken", "tier": "D"}, {**MIXTRAL, "id": "odd", "ep": "3.0"}])
    result = run_published_validation(tmp_path, tmp_path / "out")
    assert [error.id for error in result.errors] == ["invented-mixtral.1"]
    assert [(run.id, run.field) for run in result.skipped] == [("odd", "parallelism.expert")]
    assert (tmp_path / "out" / "report.md").read_text(encoding="utf-8") == result.to_markdown()
    assert (tmp_path / "out" / "errors.csv").read_text(encoding="utf-8") == result.to_csv()
    table = (tmp_path / "runs.csv").rename(tmp_path / "published_runs.csv")
    for data in (tmp_path, table):  # the full table's own name, and the table itself
        assert run_published_validation(data).to_csv() == result.to_csv()


def test_folder_without_a_table_is_a_kind_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="carry_published_runs"):
        run_published_validation(tmp_path)
