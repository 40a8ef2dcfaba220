"""``moesim calibrate``: files in, a profile out that moesim itself reads, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesim.cli import main
from moesim.describe.hardware_library import HardwareLibrary

MEASURED = str(Path(__file__).parents[3] / "validation" / "measurements" / "h200_sxm/single_gpu_torch2.11.jsonl")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    (folder / "devices").mkdir()
    (folder / "stacks").mkdir()
    out, stack_out = folder / "devices" / "mine.yaml", folder / "stacks" / "my_layers.yaml"
    arguments = ["--profile", "h200_sxm", "--half", "fit", "--out", str(out), "--stack-out", str(stack_out)]
    assert main(["calibrate", MEASURED, *arguments]) == 0
    return folder


def test_the_stack_has_the_passes_that_ship_as_fitted_on_the_same_half(calibrated):
    library = HardwareLibrary([calibrated])
    mine, shipped = library.stack("my_layers").elementwise, library.stack("pytorch_grouped_mm_nccl").elementwise
    assert mine is not None
    assert shipped is not None
    for name in ("norm", "activation", "permute", "unpermute"):
        for of in ("forward", "backward"):
            assert getattr(getattr(mine, name), of) == pytest.approx(getattr(getattr(shipped, name), of), rel=0.02)
    assert mine.sort_kernels == pytest.approx(shipped.sort_kernels, abs=2)
    assert mine.expert_gradient_bytes == shipped.expert_gradient_bytes
    assert mine.widening_s == pytest.approx(shipped.widening_s, rel=0.01)
    assert mine.scan_row_s == pytest.approx(shipped.scan_row_s, rel=0.01)
    assert library.stack("my_layers").collectives == library.stack("pytorch_grouped_mm_nccl").collectives


def test_the_profile_is_read_and_has_the_shipped_constants_that_were_fitted_on_the_same_half(calibrated):
    library = HardwareLibrary([calibrated])
    mine, shipped = library.device("mine"), library.device("h200_sxm")
    assert mine.surface_device == "h200_sxm"
    for name in ("accumulation_fraction", "unaligned_slowdown"):
        fitted, given = getattr(mine.kernels.gemm, name), getattr(shipped.kernels.gemm, name)
        assert fitted.value == pytest.approx(given.value, rel=0.03)
        assert fitted.kind == "fitted"
        assert "213 cases of 71 shapes" in fitted.source
    memory, given = mine.kernels.memory_bound, shipped.kernels.memory_bound
    assert memory.memory_fraction.value == pytest.approx(given.memory_fraction.value, rel=0.01)
    assert memory.fixed_time.value == pytest.approx(given.fixed_time.value, rel=0.03)
    assert mine.memory_bandwidth == shipped.memory_bandwidth


def test_hardware_show_and_compare_take_the_profile_with_its_attention_kernels(capsys, calibrated):
    assert main(["hardware", "show", "mine", "--profiles", str(calibrated), "--json"]) == 0
    capsys.readouterr()
    answers = []
    for profile in ("mine", "h200_sxm"):
        code = main(
            ["compare", MEASURED, "--profile", profile, "--profiles", str(calibrated), "--half", "judge", "--json"]
        )
        assert code == 0
        answers.append(json.loads(capsys.readouterr().out)["suites"])
    for suite in ("gemm", "attention", "grouped_gemm", "moe_layer"):
        assert answers[0][suite]["median"] == pytest.approx(answers[1][suite]["median"], abs=0.01)


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """Every seventh GEMM, and all launches and attention calls of the file."""
    lines = Path(MEASURED).read_text(encoding="utf-8").splitlines()
    gemms = [line for line in lines if '"suite": "gemm"' in line][::7]
    others = [line for line in lines if '"suite": "launch"' in line or '"suite": "attention"' in line]
    path = tmp_path_factory.mktemp("some") / "some.jsonl"
    path.write_text("\n".join([lines[0], *gemms, *others]) + "\n", encoding="utf-8")
    return str(path)


def test_json_states_errors_covariance_held_out_errors_and_refusals(capsys, tmp_path, some):
    out = tmp_path / "mine.yaml"
    assert main(["calibrate", some, "--profile", "h200_sxm", "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    blocks = {block["name"]: block for block in answer["blocks"]}
    gemm = blocks["gemm"]
    assert len(gemm["covariance_of_logs"]) == len(gemm["standard_errors"]) == 3
    assert 0 < gemm["held_out"]["median"] < 0.1
    assert answer["host_s"]["kernel_launch_time"] == pytest.approx(6e-6, rel=0.1)
    assert answer["refused"]["links"] == "no collectives among the cases"
    assert "overlap" in answer["refused"]
    assert (tmp_path / "surfaces" / "flash_kernels_mine.json").is_file()


def test_a_stack_gets_the_launch_times_that_were_measured(tmp_path, some):
    (tmp_path / "devices").mkdir()
    (tmp_path / "stacks").mkdir()
    out, stack_out = tmp_path / "devices" / "mine.yaml", tmp_path / "stacks" / "my_launches.yaml"
    arguments = ["--profile", "h200_sxm", "--out", str(out), "--stack-out", str(stack_out)]
    assert main(["calibrate", some, *arguments]) == 0
    launch = HardwareLibrary([tmp_path]).stack("my_launches").launch
    assert launch.kernel_launch_time.value == pytest.approx(6e-6, rel=0.1)
    assert launch.kernel_launch_time.kind == "fitted"


def test_a_log_alone_fits_its_links_and_refuses_the_rest(capsys, tmp_path):
    log = tmp_path / "all_reduce.log"
    ranks = "".join(f"#  Rank {rank} Group  0 Pid 1 on a device {rank} [0x00] H100\n" for rank in range(8))
    head = "#       size         count      type   redop    root     time   algbw   busbw #wrong\n"
    rows = "".join(
        f"{size} {size // 4} float sum -1 {28 + 1.75 * size / 4e5:.2f} 1.0 1.0 0\n"
        for size in (1024, 2**20, 2**28, 2**32)
    )
    log.write_text("all_reduce_perf\n# nThread 1 minBytes 8\n" + ranks + head + rows, encoding="utf-8")
    out = tmp_path / "mine.yaml"
    arguments = ["calibrate", str(log), "--profile", "h200_sxm", "--out", str(out), "--level", "nvlink"]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (links,) = [block for block in answer["blocks"] if block["name"] == "links nvlink reductions"]
    assert "0 cases" in answer["refused"]["gemm: sustained_clock_fraction"]
    assert links["values"]["beta_bytes_per_s"] == pytest.approx(4e11, rel=0.01)
    assert "nvlink reductions" in out.read_text(encoding="utf-8")


def test_bad_files_and_names_end_with_2_and_write_nothing(capsys, tmp_path):
    bad, out = tmp_path / "bad.jsonl", tmp_path / "mine.yaml"
    bad.write_text("{}\n", encoding="utf-8")
    assert main(["calibrate", str(bad), MEASURED, "--profile", "h200_sxm", "--out", str(out)]) == 2
    assert main(["calibrate", MEASURED, "--profile", "h200", "--out", str(out)]) == 2
    assert main(["calibrate", MEASURED, "--profile", "h200_sxm", "--out", str(out), "--collective", "gossip"]) == 2
    assert main(["calibrate", str(tmp_path / "none"), "--profile", "h200_sxm", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "gossip" in err
    assert not out.exists()
