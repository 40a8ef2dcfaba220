"""Operations priced together take what each takes by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moesim.cost.operators import price
from moesim.describe.hardware_library import HardwareLibrary
from moesim.formats.measurement_records import read_measurements
from moesim.study.kernel_pricing import operation_seconds
from moesim.study.measured_operations import map_case
from moesim.study.measurement_comparison import judge

MEASURED = Path(__file__).parents[3] / "validation" / "measurements" / "h200_sxm/single_gpu_torch2.11.jsonl"


def test_all_kinds_of_operations_priced_together_take_what_each_takes_alone():
    judged_by = judge("h200_sxm", "pytorch_grouped_mm_nccl", HardwareLibrary())
    cases = read_measurements(MEASURED).cases[::9]
    operations = [one for case in cases for one in map_case(case, judged_by.stack).operations]
    together = operation_seconds(operations, judged_by.in_step)
    alone = np.array([float(price(one, judged_by.in_step).time_s[0]) for one in operations])
    assert {type(one.work).__name__ for one in operations} == {"Gemm", "MemoryTraffic", "AttentionCore"}
    np.testing.assert_allclose(together, alone, rtol=1e-12)
