from collections.abc import Callable

import numpy as np
import pytest

from moesim.estimation.loading import LoadedScenario
from moesim.structure.columns import COLUMN_OF_PATH
from moesim.structure.group_tables import encode_value, group_columns_table, scenario_values


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        ("parallelism.data", "auto", 0.0),
        ("parallelism.recompute", "none", 0.0),
        ("parallelism.recompute", "selective", 1.0),
        ("parallelism.recompute", "full", 2.0),
        ("parallelism.sequence", True, 1.0),
        ("model.moe.router.capacity_factor", None, 0.0),
        ("model.moe.router.group_tokens", None, 0.0),
        ("parallelism.tensor", 8, 8.0),
    ],
)
def test_words_and_nulls_become_codes(path: str, value: object, code: float) -> None:
    assert encode_value(path, value) == code


def test_every_column_of_a_scenario_has_its_value(shipped: Callable[..., LoadedScenario]) -> None:
    values = scenario_values(shipped("switch_base").scenario)
    assert set(values) == set(COLUMN_OF_PATH.values())
    assert (values["source_length"], values["target_length"]) == (512, 114)
    assert (values["expert"], values["capacity_factor"], values["group_tokens"]) == (32, 1.0, 0)


def test_a_decoder_only_scenario_has_no_source(shipped: Callable[..., LoadedScenario]) -> None:
    values = scenario_values(shipped("m6t_1t_v100x480").scenario)
    assert (values["source_length"], values["target_length"]) == (0, 1024)


def test_swept_columns_take_the_place_of_the_base_value(shipped: Callable[..., LoadedScenario]) -> None:
    scenario = shipped("m6t_1t_v100x480").scenario
    columns = group_columns_table(scenario, {"tensor": ([2.0, 8.0], np.array([1, 0, 1]))}, 3)
    assert columns["tensor"].tolist() == [8.0, 2.0, 8.0]
    assert columns["devices"].tolist() == [480.0] * 3
