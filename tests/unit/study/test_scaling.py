from __future__ import annotations

import numpy as np
import pytest

from moesim.describe.hardware_library import HardwareLibrary
from moesim.estimation.estimate import estimate, estimate_loaded
from moesim.estimation.loading import LoadedScenario, load
from moesim.estimation.spaces import Axis, Space
from moesim.estimation.tables import estimate_many
from moesim.study.scaling import Scaling, device_counts, scaling_from


def loaded_scenario(name: str, *assignments: str) -> LoadedScenario:
    return load(name, assignments=assignments, library=HardwareLibrary())


@pytest.fixture(scope="module")
def mixtral() -> Scaling:
    return scaling_from(loaded_scenario("mixtral_8x7b"))


def test_point_at_base_equals_the_estimate(mixtral: Scaling) -> None:
    answer = estimate("mixtral_8x7b")
    for curve in mixtral.curves:
        row = int(np.flatnonzero(curve.devices == answer.num_devices)[0])
        assert curve.points[row].verdict == "ok"
        assert curve.step_time_s[row] == answer.step_time_s == curve.ideal_step_time_s[row]
        assert (curve.lower_s[row], curve.upper_s[row]) == (answer.lower_s, answer.upper_s)
        assert curve.tokens_per_s[row] == answer.tokens_per_s == curve.ideal_tokens_per_s[row]
        assert curve.usd_per_billion_tokens[row] == answer.cost.usd_per_billion_tokens
        assert curve.memory_peak_bytes[row] == answer.memory.peak
        assert curve.efficiency_fraction[row] == 1


def test_other_points_equal_the_estimate_of_the_scenario_written_out(mixtral: Scaling) -> None:
    written = {"weak": 512, "strong": 256}
    for curve in mixtral.curves:
        assignments = ("devices=128", "parallelism.data=auto", f"workload.sequences_per_step={written[curve.mode]}")
        answer = estimate_loaded(loaded_scenario("mixtral_8x7b", *assignments))
        row = int(np.flatnonzero(curve.devices == 128)[0])
        assert curve.step_time_s[row] == answer.step_time_s
        assert curve.usd_per_billion_tokens[row] == answer.cost.usd_per_billion_tokens


# Written out by hand, from the smallest number of devices; from there on the degree is the scenario's.
SMALLER_EXPERT_DEGREES = {
    "mixtral_8x7b": {4: 1, 8: 2, 16: 4},
    "deepseek_v3": {16: 1, 32: 2, 64: 4, 128: 8, 256: 16, 512: 32},
    "m6t_1t_v100x480": {15: 15, 30: 30, 60: 60, 120: 120, 240: 240},
    "t5_large": {},
}


@pytest.mark.parametrize("name", SMALLER_EXPERT_DEGREES)
def test_expert_degree_is_kept_until_a_stage_has_too_few_devices(name: str) -> None:
    loaded = loaded_scenario(name)
    for curve in scaling_from(loaded).curves:
        own = loaded.scenario.parallelism.expert
        drawn = dict(zip(curve.devices.tolist(), curve.expert_degrees.tolist(), strict=True))
        assert {devices: degree for devices, degree in drawn.items() if degree != own} == SMALLER_EXPERT_DEGREES[name]


def test_expert_degree_leaves_room_for_expert_tensor_ranks() -> None:
    degrees = ("parallelism.expert=4", "parallelism.expert_tensor=2", "parallelism.pipeline.stages=4")
    curve = scaling_from(loaded_scenario("mixtral_8x7b", *degrees)).weak
    drawn = dict(zip(curve.devices.tolist(), curve.expert_degrees.tolist(), strict=True))
    assert [drawn[devices] for devices in (8, 16, 32, 64)] == [1, 2, 4, 4]
    assert curve.points[2].rule == "expert_degrees_do_not_multiply"  # 4 devices: a stage has one, experts need two


@pytest.mark.parametrize("name", SMALLER_EXPERT_DEGREES)
def test_verdicts_and_times_equal_those_of_a_sweep(name: str) -> None:
    loaded = loaded_scenario(name)
    scaling = scaling_from(loaded)
    own, smaller = loaded.scenario.parallelism.expert, SMALLER_EXPERT_DEGREES[name]
    for curve in scaling.curves:
        factor = curve.devices / scaling.base.num_devices if curve.mode == "weak" else np.ones(len(curve.devices))
        sequences = loaded.scenario.workload.sequences_per_step * factor
        whole = np.flatnonzero(sequences == np.floor(sequences))
        values = {
            "devices": [int(count) for count in curve.devices[whole]],
            "parallelism.data": ["auto"] * len(whole),
            "parallelism.expert": [smaller.get(int(count), own) for count in curve.devices[whole]],
            "workload.sequences_per_step": [int(number) for number in sequences[whole]],
        }
        table = estimate_many(Space(loaded.document, (Axis("devices", values),)))
        for index, row in enumerate(whole):
            swept = table.row(index)
            point = curve.points[row]
            assert (point.verdict, point.rule) == (swept["verdict"], swept["reason"])
            np.testing.assert_allclose(curve.step_time_s[row], swept["step_time_s"], rtol=1e-12)
            np.testing.assert_allclose(curve.tokens_per_s[row], swept["tokens_per_s"], rtol=1e-12)


def test_perfect_scaling_keeps_the_step_or_divides_it(mixtral: Scaling) -> None:
    factor = mixtral.weak.devices / mixtral.base.num_devices
    np.testing.assert_array_equal(mixtral.weak.ideal_step_time_s, mixtral.base.step_time_s)
    np.testing.assert_allclose(mixtral.strong.ideal_step_time_s * factor, mixtral.base.step_time_s)
    for curve in mixtral.curves:
        np.testing.assert_allclose(curve.ideal_tokens_per_s / factor, mixtral.base.tokens_per_s)
        np.testing.assert_array_equal(curve.ideal_usd_per_billion_tokens, mixtral.base.cost.usd_per_billion_tokens)


def test_illegal_points_carry_reasons_and_no_numbers(mixtral: Scaling) -> None:
    for curve in mixtral.curves:
        illegal = [row for row, point in enumerate(curve.points) if point.verdict == "illegal"]
        assert illegal
        for row in illegal:
            assert curve.points[row].rule
            assert curve.points[row].reason
            assert np.isnan(curve.step_time_s[row])
            assert np.isnan(curve.usd_per_billion_tokens[row])
    two = mixtral.weak.points[list(mixtral.weak.devices).index(2)]
    assert two.reason == "2 devices do not divide into groups of tensor 1 x context 1 x pipeline 4"


def test_only_fewer_devices_are_tried_where_the_scenario_fills_the_cluster() -> None:
    scaling = scaling_from(loaded_scenario("m6t_1t_v100x480"))
    assert list(scaling.weak.devices) == [15, 30, 60, 120, 240, 480]
    assert [point.verdict for point in scaling.weak.points] == ["does_not_fit"] * 5 + ["ok"]


def test_sequences_are_whole_wherever_the_data_degree_is() -> None:
    scaling = scaling_from(
        loaded_scenario("t5_base", "workload.sequences_per_step=96", "workload.sequences_per_micro_batch=3")
    )
    assert [point.verdict for point in scaling.weak.points] == ["ok"] * 6
    one_rank = ("devices=2", "parallelism.data=1", "parallelism.context=2", "workload.sequences_per_step=1")
    scaling = scaling_from(loaded_scenario("t5_base", *one_rank, "workload.sequences_per_micro_batch=1"))
    assert scaling.weak.points[0].rule == "devices_not_divisible"
    assert {point.verdict for point in scaling.weak.points[1:]} == {"ok"}


def test_points_that_do_not_fit_have_numbers_and_a_reason() -> None:
    loaded = loaded_scenario("m6t_1t_v100x480", "optimizer.kind=adam", "precision.parameters=fp32")
    scaling = scaling_from(loaded)
    assert not scaling.base.fits
    point = scaling.weak.points[-1]
    assert point.verdict == "does_not_fit"
    assert point.reason == "the fullest device needs 43.78 GiB, 31.74 GiB are usable"
    assert scaling.weak.step_time_s[-1] == scaling.base.step_time_s


def test_device_counts_go_down_to_the_odd_part_and_up_to_the_cluster() -> None:
    assert list(device_counts(6, 25)) == [3, 6, 12, 24]
    assert list(device_counts(5, 5)) == [5]
    assert list(device_counts(1, 2)) == [1, 2]
