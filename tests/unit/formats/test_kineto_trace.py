"""Traces of the PyTorch profiler: kernels of operations with known shapes, and NCCL's kernels."""

from __future__ import annotations

import gzip
import json

import pytest

from moesim.errors import FormatError
from moesim.formats.kineto_trace import looks_like_trace, read_kineto_trace
from moesim.study.link_calibration import LinkCase


def operation(name: str, identifier: int, dims, types):
    arguments = {"External id": identifier, "Input Dims": dims, "Input type": types, "Ev Idx": identifier}
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": 1, "ts": 1.0, "dur": 30, "args": arguments}


def kernel(identifier: int, duration: float, **arguments):
    found = {"External id": identifier, "device": 0, "stream": 7, "correlation": identifier, **arguments}
    return {"ph": "X", "cat": "kernel", "name": "sm90_xmma_gemm", "ts": 5.0, "dur": duration, "args": found}


BF16 = "c10::BFloat16"
EVENTS = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
    operation("aten::linear", 1, [[4096, 2048], [1024, 2048], []], [BF16, BF16, ""]),
    operation("aten::mm", 2, [[4096, 2048], [2048, 1024]], [BF16, BF16]),
    kernel(2, 40.0),
    operation("aten::mm", 3, [[4096, 2048], [2048, 1024]], [BF16, BF16]),
    kernel(3, 44.0),
    operation("aten::addmm", 4, [[8], [16, 32], [32, 8]], ["float", "float", "float"]),
    kernel(4, 3.0),
    kernel(4, 2.0),
    operation("aten::copy_", 5, [[64, 4096], [64, 4096], []], [BF16, BF16, "Scalar"]),
    kernel(5, 2.5),
    operation("aten::copy_", 6, [[64, 4096], [64, 4096], []], ["float", BF16, "Scalar"]),
    kernel(6, 9.5),
    operation("aten::mm", 7, [[4, 4], [5, 5]], [BF16, BF16]),
    kernel(7, 1.0),
    *(
        kernel(
            8,
            time_us,
            **{
                "Collective name": "allreduce",
                "dtype": "BFloat16",
                "In msg nelems": 1048576,
                "Out msg nelems": 1048576,
                "Group size": 8,
            },
        )
        for time_us in (90.0, 60.0, 250.0)
    ),
]


def write(tmp_path, document, *, packed: bool = False):
    path = tmp_path / "trace.json"
    data = (document if isinstance(document, str) else json.dumps(document)).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_products_and_copies_are_medians_of_the_time_of_their_kernels(tmp_path, packed):
    path = write(tmp_path, {"schemaVersion": 1, "traceEvents": EVENTS}, packed=packed)
    assert looks_like_trace(path)
    cases, _ = read_kineto_trace(path)
    assert [(one.suite, one.operation, one.dtype, dict(one.shape)) for one in cases] == [
        ("gemm", "gemm", "bf16", {"m": 4096, "n": 1024, "k": 2048}),
        ("gemm", "gemm", "fp32", {"m": 16, "n": 8, "k": 32}),
        ("memory_bound", "copy", "bf16", {"rows": 64, "columns": 4096}),
    ]
    assert [one.median_s for one in cases] == pytest.approx([42e-6, 5e-6, 2.5e-6])
    assert cases[0].samples == 2
    assert cases[2].num_bytes == 2 * 2 * 64 * 4096


def test_of_a_collective_the_shortest_call_counts(tmp_path):
    _, links = read_kineto_trace(write(tmp_path, {"traceEvents": EVENTS}), level="nvlink")
    assert links == [LinkCase("nvlink", "all_reduce", 8, 2097152.0, pytest.approx(60e-6))]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"schemaVersion": 1, "traceEvents": [{"ph": "X"', "no whole JSON document"),
        ('{"schemaVersion": 1}', "no traceEvents"),
        ({"traceEvents": [operation("aten::mm", 2, [[4, 4], [4, 4]], [BF16, BF16])]}, "whose shape is known"),
        ({"traceEvents": [kernel(2, float("nan"))]}, "whose shape is known"),
        ("\x00\x01", "no whole JSON document"),
    ],
)
def test_cut_traces_and_traces_without_shapes_say_what_to_do(tmp_path, document, message):
    with pytest.raises(FormatError, match=message) as caught:
        read_kineto_trace(write(tmp_path, document))
    assert caught.value.problems[0].remedy


def test_a_packed_trace_that_was_cut_off_is_refused(tmp_path):
    path = write(tmp_path, {"traceEvents": EVENTS}, packed=True)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FormatError, match="no whole JSON"):
        read_kineto_trace(path)
