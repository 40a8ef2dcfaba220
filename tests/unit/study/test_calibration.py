"""Calibration: planted constants of a device come back from synthetic measurements; shapes stay out as a whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.describe.hardware_library import HardwareLibrary
from moesim.study.calibration import at_values, calibrate, fold_of, half_of, is_fit_half, shape_of
from moesim.study.device_figures import figure_at, fitted_figure, with_value
from moesim.study.kernel_calibration import elementwise_passes, fit_attention_kernels, widening_s
from moesim.study.measured_cases import MeasuredCase, Measurements
from moesim.study.measured_operations import map_case
from moesim.study.measurement_comparison import judge, operation_times_s

PLANTED = {
    "sustained_clock_fraction": 0.7,
    "kernels.gemm.accumulation_fraction": 0.4,
    "kernels.gemm.unaligned_slowdown": 3.5,
    "kernels.gemm.eight_bit_fraction": 0.8,
    "kernels.gemm.row_scale_slowdown": 1.2,
    "kernels.gemm.block_scale_slowdown": 1.4,
    "kernels.memory_bound.memory_fraction": 0.66,
    "kernels.memory_bound.fixed_time": 3e-6,
    "kernels.memory_bound.update_fraction": 0.5,
}


@pytest.fixture(scope="module")
def h200():
    return judge("h200_sxm", "pytorch_grouped_mm_nccl", HardwareLibrary())


def case(suite: str, operation: str, pass_name: str, shape, num_bytes: float = 0.0, **keys) -> MeasuredCase:
    sizes = ",".join(f"{name}={value}" for name, value in shape.items())
    name = f"{suite}/{operation}/{pass_name}/{sizes}"
    one = MeasuredCase(name, suite, operation, pass_name, "bf16", shape, 0.0, num_bytes, 1.0, 0.0, 5, "", "")
    return replace(one, **keys)


def gemms():
    extents = [(1024, 1024), (4096, 4096), (4100, 4100), (14336, 4096), (2048, 8192), (7168, 2048)]
    shapes = [{"m": m, "n": n, "k": k} for m in (64, 512, 4096, 16384) for n, k in extents]
    return [case("gemm", "gemm", kind, shape) for shape in shapes for kind in ("forward", "dgrad", "wgrad")]


def scaled():
    sizes = [(m, n, 4096) for m in (512, 16384) for n in (1024, 4096, 8192)]
    return [
        case("eight_bit", "scaled_gemm", "forward", shape, dtype="fp8", flops=2.0 * m * n * k)
        for m, n, k in sizes
        for shape in ({"m": m, "n": n, "k": k, "scaling": scaling} for scaling in ("tensor", "row", "block"))
    ]


def streams():
    sizes = [(rows, columns) for rows in (128, 1024, 8192, 65536) for columns in (1024, 4096)]
    shapes = [{"rows": rows, "columns": columns} for rows, columns in sizes]
    return [case("memory_bound", "copy", "forward", shape, 4.0 * shape["rows"] * shape["columns"]) for shape in shapes]


def updates():
    return [case("optimizer", "adam_step", "forward", {"tensors": one, "elements": 2**24}) for one in (1, 2, 4, 8)]


def measured(cases, at, *, seed=None):
    """Cases timed as a judge prices them, with 3 % of noise and 5 % of outliers where a seed is given."""
    times = np.array([times.sum() for times in operation_times_s([map_case(one, at.stack) for one in cases], at)])
    if seed is not None:
        generator = np.random.default_rng(seed)
        times *= np.exp(0.03 * generator.normal(size=times.size))
        times *= np.where(generator.random(times.size) < 0.05, generator.uniform(1.5, 4.0, times.size), 1.0)
    return [replace(one, median_s=float(time_s)) for one, time_s in zip(cases, times, strict=True)]


def test_planted_constants_come_back_exactly_from_exact_times(h200):
    cases = measured(gemms() + streams() + updates() + scaled(), at_values(h200, PLANTED))
    found = calibrate(cases, h200.device, h200.stack, h200.surfaces, source="synthetic")
    for path, planted in PLANTED.items():
        figure = figure_at(found.device, path)
        assert figure is not None
        assert figure.value == pytest.approx(planted, rel=2e-3), path
        assert figure.kind == "fitted"
        assert "synthetic" in figure.source
    assert found.refused == {}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_and_outliers_leave_planted_constants_within_their_stated_errors(h200, seed):
    cases = measured(gemms() + streams(), at_values(h200, PLANTED), seed=seed)
    found = calibrate(cases, h200.device, h200.stack, h200.surfaces, source="synthetic")
    for block in found.blocks:
        for path, error in block.fit.standard_errors.items():
            assert abs(np.log(block.fit.values[path] / PLANTED[path])) < 3 * error, path
    (gemm,) = [block for block in found.blocks if block.name == "gemm"]
    assert gemm.held_out_median < 0.05
    assert 0.8 < gemm.covered <= 1.0


def test_what_no_case_shows_keeps_its_value_and_is_refused_by_name(h200):
    aligned = [one for one in gemms() if one.shape["n"] % 8 == 0 and one.pass_name == "forward"]
    found = calibrate(measured(aligned, at_values(h200, PLANTED)), h200.device, h200.stack, h200.surfaces, source="x y")
    assert {
        "kernels.gemm.accumulation_fraction",
        "kernels.gemm.unaligned_slowdown",
        "kernels.memory_bound.memory_fraction",
    } <= set(found.refused)
    for path in found.refused:
        assert figure_at(found.device, path) == figure_at(h200.device, path)
    clock = figure_at(found.device, "sustained_clock_fraction")
    assert clock is not None
    assert clock.value == pytest.approx(0.7, rel=2e-3)


def test_a_device_without_surfaces_gets_the_four_constants_of_its_gemms():
    tpu = judge("tpu_v3_core", "pytorch_grouped_mm_nccl", HardwareLibrary())
    planted = {"kernels.gemm.compute_fraction": 0.5, "kernels.gemm.fixed_time": 2e-5}
    shapes = [{"m": m, "n": n, "k": k} for m in (16, 256, 4096) for n in (512, 4096) for k in (64, 512, 4096)]
    cases = measured([case("gemm", "gemm", "forward", shape) for shape in shapes], at_values(tpu, planted))
    found = calibrate(cases, tpu.device, tpu.stack, tpu.surfaces, source="synthetic")
    for path, value in planted.items():
        figure = figure_at(found.device, path)
        assert figure is not None
        assert figure.value == pytest.approx(value, rel=2e-2)


def test_attention_kernels_are_fitted_by_library_and_pass(h200):
    sizes = [
        (length, heads, size) for length in (512, 1024, 4096, 16384) for heads, size in ((8, 128), (32, 128), (16, 64))
    ]
    shapes = [
        {"batch": 2, "length": length, "heads": heads, "kv_heads": heads, "head_size": size, "method": "cudnn"}
        for length, heads, size in sizes
    ]
    cases = measured(
        [case("attention", "a", kind, shape) for shape in shapes for kind in ("forward", "backward")], h200
    )
    kernels = fit_attention_kernels(cases, h200)
    assert [(one.library, one.pass_name) for one in kernels] == [("cudnn", "forward"), ("cudnn", "backward")]
    for one in kernels:
        planted = h200.surfaces.attention_kernels[one.library, one.pass_name].parameters
        assert one.fit.values["compute_fraction"] == pytest.approx(planted.compute_fraction, rel=0.02)
        assert np.median(np.abs(one.held_out)) < 0.02


def test_passes_and_separate_sums_of_a_stack_come_back(h200):
    kernels = [
        case("memory_bound", "rms_norm", kind, {"rows": 16384, "columns": 4096}, 1e9)
        for kind in ("forward", "backward")
    ]
    shape = {"tokens": 8192, "hidden": 4096, "experts": 64, "experts_per_token": 4}
    kernels += [case("dispatch", "unpermute", kind, shape, 1e9) for kind in ("forward", "backward")]
    sums = [case("grouped_gemm", "g", "wgrad", {"n": 4096, "k": 2048}, loads=(512,) * 16, implementation="mm + add_")]
    cases = measured(kernels + sums, h200)
    stack = h200.stack.elementwise
    passes = elementwise_passes(cases, h200)
    assert passes["norm"]["backward"] == pytest.approx(stack.norm.backward, rel=1e-6)
    assert passes["unpermute"]["forward"] == pytest.approx(stack.unpermute.forward, rel=0.05)
    assert widening_s(cases, h200) == pytest.approx(stack.widening_s, rel=1e-6)


def test_halves_and_folds_keep_all_passes_presets_and_libraries_of_a_shape_together():
    shape = {"n": 64, "k": 32, "tokens": 8}
    family = [
        case("grouped_gemm", "g", kind, {**shape, "preset": preset, "method": method})
        for kind in ("forward", "wgrad")
        for preset in ("W0", "W5")
        for method in ("grouped", "loop")
    ]
    assert len({shape_of(one) for one in family}) == 1
    assert len({fold_of(one) for one in family}) == 1
    assert len({is_fit_half(one) for one in family}) == 1


def test_the_halves_part_the_cases_and_neither_is_small():
    measurements = Measurements(gemms())
    fit, judged = half_of(measurements, "fit"), half_of(measurements, "judge")
    assert len(fit.cases) + len(judged.cases) == len(measurements.cases)
    assert not {shape_of(one) for one in fit.cases} & {shape_of(one) for one in judged.cases}
    assert min(len(fit.cases), len(judged.cases)) > len(measurements.cases) / 4
    assert half_of(measurements, "all") is measurements


def test_figures_are_read_and_set_by_path(h200):
    device = with_value(h200.device, "peak_flop_rate.bf16", 5e14)
    assert figure_at(device, "peak_flop_rate.bf16").value == 5e14
    assert figure_at(h200.device, "peak_flop_rate.bf16").value == 989e12
    plain = with_value(h200.device, "kernels.gemm.fixed_time", 1e-6)
    assert figure_at(plain, "kernels.gemm.fixed_time").kind == figure_at(h200.device, "kernels.gemm.fixed_time").kind
    a100 = HardwareLibrary().device("a100_sxm")
    assert figure_at(a100, "kernels.gemm.unaligned_slowdown") is None
    fitted = fitted_figure(a100, "kernels.gemm.unaligned_slowdown", 2.0, source="a test", error_fraction=0.1)
    assert fitted.kernels.gemm.unaligned_slowdown.value == 2.0
