"""The command line through ``main``: output, exit codes, bad input."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesim.cli import main
from moesim.errors import ERROR_CODES
from moesim.resources import SCENARIOS, data_directory, find_scenario

ROOT = Path(__file__).resolve().parents[3]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_estimate_prints_time_bounds_memory_and_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "estimate", "m6t_1t_v100x480")
    assert code == 0
    assert err == ""
    for text in ("step time", "bounds", "90 % interval", "MFU", "all_to_all", "usable", "fits", "Assumed", "datasheet"):
        assert text in out


def test_estimate_of_two_scenarios_stands_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "estimate", "mixtral_8x7b", "deepseek_v3")
    assert code == 0
    assert any("mixtral_8x7b" in line and "deepseek_v3" in line for line in out.splitlines())


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "estimate", "m6t_1t_v100x480", "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer["scenario"] == "m6t_1t_v100x480"
    assert answer["fits"] is True


def test_schedules_are_compared_in_a_table_and_in_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = ("--set", "parallelism.pipeline={stages: 4, virtual_stages: 1, schedule: one_f_one_b}")
    six = ("--set", "workload.sequences_per_step=96")
    code, out, _ = run(capsys, "estimate", "mixtral_8x7b", "--compare-schedules", *pipeline, *six)
    assert code == 0
    assert "one_f_one_b *" in out
    assert "dualpipe: dualpipe needs at least two micro-batches" in out
    code, out, _ = run(capsys, "estimate", "mixtral_8x7b", "--compare-schedules", "--json")
    answer = json.loads(out)
    own = [row for row in answer["schedules"] if row["is_chosen"]]
    assert [row["schedule"] for row in own] == ["interleaved_one_f_one_b"]
    assert own[0]["step_time_s"] == answer["step_time_s"]
    assert len(answer["schedules"]) == 10


def test_what_does_not_fit_is_answered_in_full_with_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    assignments = ["--set", "optimizer.kind=adam", "--set", "precision.parameters=fp32"]
    code, out, _ = run(capsys, "estimate", "m6t_1t_v100x480", "--json", *assignments)
    answer = json.loads(out)
    assert code == 3
    assert answer["memory_bytes"]["deficit"] == answer["memory_bytes"]["peak"] - answer["memory_bytes"]["capacity"] > 0
    code, out, _ = run(capsys, "estimate", "m6t_1t_v100x480", *assignments)
    assert code == 3
    assert "DOES NOT FIT" in out


def test_explained_terms_evaluate_to_their_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("m6t_1t_v100x480", "deepseek_v3", "switch_base", "mixtral_8x7b", "deepspeed_moe_1_3b_128e"):
        code, out, _ = run(capsys, "estimate", name, "--json", "--explain")
        assert code == 0
        terms = [term for term in json.loads(out)["explanation"] if term["category"] != "memory"]
        assert len(terms) > 20
        for term in terms:
            value = eval(term["substituted"], {"__builtins__": {}, "max": max})
            assert value == pytest.approx(term["seconds_each"], rel=1e-6, abs=1e-15), term


def test_explained_terms_of_one_stage_sum_to_the_step() -> None:
    """Without overlap, hosts or recompute the terms, times their count, are the step."""
    from moesim.describe.hardware_library import HardwareLibrary
    from moesim.estimation.estimate import estimate_loaded
    from moesim.estimation.explanation import explain_step
    from moesim.estimation.loading import load

    loaded = load("megatron_moe_mixtral_8xh100", library=HardwareLibrary())
    answer = estimate_loaded(loaded)
    terms = explain_step(loaded)
    layers = sum(term.seconds_each * term.times for term in terms if term.phase != "step")
    ends = sum(term.seconds_each for term in terms if term.name in ("update", "gradients and updated parameters"))
    hidden = sum(answer.hidden_s.values()) - answer.hidden_s["data_parallel"]
    assert layers + ends - hidden + answer.exposed_s["host"] == pytest.approx(answer.step_time_s, rel=1e-9)


@pytest.mark.parametrize(
    ("assignments", "codes", "texts"),
    [
        (["model.moe.num_expert=3"], ["E-SCN-001"], ["num_experts"]),
        (["parallelism.tensor=3"], ["E-SCN-003"], ["480"]),
        (["model.moe.num_experts=961"], ["E-SCN-004"], ["961"]),
        (["precision.compute=bf16"], ["E-SCN-008"], ["fp16"]),
        (["devices=0"], ["E-SCN-007"], ["0"]),
        (["devices=-4"], ["E-SCN-007"], ["-4"]),
        (["model.moe.router.capacity_factor=.nan"], ["E-SCN-007"], ["nan"]),
        (["model.moe.router.capacity_factor=.inf"], ["E-SCN-007"], ["inf"]),
        (["workload.sequences_per_step=99999999999999999999"], ["E-SCN-007"], []),
        (["cluster=v100_sxm2_32gb_60x8_shared_10g"], ["E-SCN-009"], ["v100_sxm2_32gb_60x8_shared_100g"]),
        (["stack=nope"], ["E-SCN-009"], ["stack"]),
        (["model.moe.router.kind=top_p"], ["E-SCN-010"], ["top_k"]),
        (["schema_version=2"], ["E-FMT-009"], ["1"]),
        (["workload.source_length=4"], ["E-SCN-011"], ["source_length"]),
        (["stack=xla_einsum"], ["E-SCN-011"], ["scale_out"]),
        (["nonsense"], ["E-SCN-012"], ["="]),
        (["model.layers.0.count=99999999999999"], ["E-SCN-007"], []),
        (["model.moe.num_experts=99999999999999"], ["E-SCN-007"], []),
    ],
)
def test_bad_fields_give_a_code_a_place_and_a_remedy(
    capsys: pytest.CaptureFixture[str], assignments: list[str], codes: list[str], texts: list[str]
) -> None:
    arguments = [part for assignment in assignments for part in ("--set", assignment)]
    code, out, _ = run(capsys, "estimate", "m6t_1t_v100x480", "--json", *arguments)
    errors = json.loads(out)["errors"]
    assert code == 2
    assert [error["code"] for error in errors][: len(codes)] == codes
    assert all(error["remedy"] and error["message"] for error in errors)
    for text in texts:
        assert text in out
    code, out, err = run(capsys, "estimate", "m6t_1t_v100x480", *arguments)
    assert (code, out) == (2, "")
    assert codes[0] in err
    assert "Traceback" not in err


def test_all_problems_are_reported_together_with_file_and_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = find_scenario("m6t_1t_v100x480").read_text(encoding="utf-8")
    text = text.replace("hidden_size: 1024", "hiden_size: 1024").replace("zero_stage: 0", "zero_stage: 7")
    text = text.replace("cluster: v100", "clusters: v100")
    file = tmp_path / "broken.yaml"
    file.write_text(text, encoding="utf-8")
    code, out, _ = run(capsys, "check", str(file), "--json")
    errors = json.loads(out)["errors"]
    assert code == 2
    assert {error["field"] for error in errors} >= {"model.hiden_size", "parallelism.zero_stage", "clusters", "cluster"}
    lines = text.splitlines()
    for error in errors:
        assert error["file"] == str(file)
        assert error["line"] is not None
        leaf = error["field"].split(".")[-1]
        if leaf in ("hiden_size", "zero_stage", "clusters"):
            assert leaf in lines[error["line"] - 1]


def write_bomb(path: Path) -> None:
    levels = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    names = "abcdefgh"
    levels += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in itertools.pairwise(names)]
    path.write_text("\n".join(levels), encoding="utf-8")


@pytest.mark.parametrize("kind", ["empty", "large", "bomb", "binary", "folder", "missing", "syntax", "list"])
def test_unreadable_files_end_with_exit_code_2_and_no_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "scenario.yaml"
    match kind:
        case "empty":
            file.write_text("", encoding="utf-8")
        case "large":
            file.write_bytes(b"a: " + b"x" * 2**20)
        case "bomb":
            write_bomb(file)
        case "binary":
            file.write_bytes(bytes(range(256)))
        case "folder":
            file.mkdir()
        case "syntax":
            file.write_text("a: [1, 2\nb: }", encoding="utf-8")
        case "list":
            file.write_text("- 1\n- 2\n", encoding="utf-8")
    for command in (
        ["estimate", str(file)],
        ["check", str(file)],
        ["sweep", str(file), "--output", str(tmp_path / "o")],
    ):
        code, out, err = run(capsys, *command)
        assert code == 2, command
        assert "[E-FMT-" in err, command
        assert "Traceback" not in out + err
    assert not (tmp_path / "o").exists()
    code, out, _ = run(capsys, "estimate", str(file), "--json")
    assert code == 2
    assert json.loads(out)["errors"][0]["code"].startswith("E-FMT-")


@pytest.mark.parametrize("arguments", [["estimate"], ["nonsense"], ["estimate", "--wat", "x"], ["chart", "pie", "x"]])
def test_wrong_usage_ends_with_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "Traceback" not in err


def test_check_accepts_every_shipped_scenario_and_space(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(data_directory(SCENARIOS).rglob("*.yaml"))
    assert len(files) > 20
    for file in files:
        code, out, err = run(capsys, "check", str(file))
        assert code == 0, err
        assert "fine" in out


def test_schema_is_a_json_schema_of_scenarios(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "schema")
    schema = json.loads(out)
    assert code == 0
    assert set(schema["required"]) >= {"model", "workload", "parallelism", "cluster", "devices", "stack"}


def test_hardware_lists_and_shows_every_profile(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "hardware", "list", "--json")
    names = json.loads(out)
    assert code == 0
    contract = (
        "k40 t4 v100_sxm2_16gb v100_sxm2_32gb v100_sxm3_32gb v100_pcie_16gb a100_sxm a100_sxm_40gb a800_sxm h100_sxm "
        "h100_pcie h800_sxm h20 h200_sxm b200_sxm b300_sxm gb200 l40s mi250x_gcd mi300x tpu_v2_core tpu_v3_core tpu_v4 "
        "tpu_v5e tpu_v5p tpu_v6e"
    )
    assert set(names["devices"]) >= set(contract.split())
    for name in [*names["devices"], *names["clusters"], *names["stacks"]]:
        code, out, _ = run(capsys, "hardware", "show", name, "--json")
        assert code == 0
        assert json.loads(out)["id"] == name
    assert "V100" in run(capsys, "hardware", "list")[1]
    assert "source" in run(capsys, "hardware", "show", "v100_sxm2_32gb")[1]
    code, _, err = run(capsys, "hardware", "show", "h100")
    assert code == 2
    assert "h100_" in err


def test_profiles_of_the_user_go_before_the_shipped_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = data_directory("hardware_profiles") / "devices" / "v100_sxm2_32gb.yaml"
    (tmp_path / "devices").mkdir()
    text = source.read_text(encoding="utf-8")
    faster = text.replace('"900 GB/s"', '"1800 GB/s"')
    assert faster != text
    (tmp_path / "devices" / source.name).write_text(faster, encoding="utf-8")
    _, out, _ = run(capsys, "estimate", "m6t_1t_v100x480", "--json")
    code, changed, _ = run(capsys, "estimate", "m6t_1t_v100x480", "--json", "--profiles", str(tmp_path))
    assert code == 0
    assert json.loads(changed)["step_time_s"] < json.loads(out)["step_time_s"]
    assert run(capsys, "estimate", "m6t_1t_v100x480", "--profiles", str(tmp_path / "nowhere"))[0] == 2


def test_sweep_writes_the_contract_columns_and_its_funnel(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "rows.csv"
    space = data_directory(SCENARIOS) / "spaces" / "mixtral_small.yaml"
    code, out, err = run(capsys, "sweep", str(space), "--output", str(output), "--json")
    summary = json.loads(out)
    assert (code, err) == (0, "")
    with output.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == summary["rows"] == summary["funnel"]["tried"]
    assert summary["configurations_per_s"] > 0
    tail = ["verdict", "reason", "step_time_s", "lower_s", "upper_s", "tokens_per_s", "mfu_fraction"]
    tail.append("memory_peak_bytes")
    assert list(rows[0])[-len(tail) :] == tail
    verdicts = [row["verdict"] for row in rows]
    assert summary["funnel"]["costed"] == verdicts.count("ok")
    assert sum(summary["funnel"][key] for key in ("illegal", "does_not_fit", "costed")) == len(rows)
    assert list(tmp_path.iterdir()) == [output]


def test_sweep_refuses_a_bad_axis_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(
        "schema_version: 1\nbase: mixtral_8x7b\naxes: {parallelism.expert: [8, -1], parallelism.expertt: [1]}\n",
        encoding="utf-8",
    )
    code, out, _ = run(capsys, "sweep", str(space), "--output", str(tmp_path / "rows.csv"), "--json")
    errors = json.loads(out)["errors"]
    assert code == 2
    assert {error["code"] for error in errors} == {"E-SCN-001", "E-SCN-007"}
    assert list(tmp_path.iterdir()) == [space]
    code, _, err = run(capsys, "sweep", "nowhere.yaml", "--output", str(tmp_path / "no" / "rows.csv"))
    assert code == 2
    assert "E-FMT-001" in err


def test_error_codes_and_their_documentation_are_the_same_list() -> None:
    headings = [
        line.removeprefix("### ")
        for line in (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("### E-")
    ]
    assert headings == list(ERROR_CODES)


def test_help_imports_no_numbers_and_estimate_no_heavy_library() -> None:
    program = (
        "import sys\nfrom moesim.cli import main\ncode = main({arguments})\n"
        "heavy = {{'numpy', 'pydantic', 'scipy', 'networkx', 'plotly', 'torch'}}\n"
        "print(sorted(set(sys.modules) & heavy), file=sys.stderr)"
    )
    for arguments, allowed in ((["--help"], "[]"), (["estimate", "m6t_1t_v100x480"], "['numpy', 'pydantic']")):
        result = subprocess.run(
            [sys.executable, "-c", program.format(arguments=arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr.strip() == allowed
