"""Logs of nccl-tests and rccl-tests in the formats their releases print."""

from __future__ import annotations

import pytest

from moesim.errors import FormatError
from moesim.formats.nccl_tests_log import read_nccl_tests_log
from moesim.study.link_calibration import LinkCase, fit_links

RANKS = "".join(
    f"#  Rank {rank:2d} Group  0 Pid {4000 + rank:6d} on     node-0 device  {rank} [0x0{rank}] NVIDIA H100 80GB HBM3\n"
    for rank in range(8)
)
START = (
    "# nThread 1 nGpus 8 minBytes 8 maxBytes 8589934592 step: 2(factor) warmup iters: 5 iters: 20 validation: 1\n#\n"
)
NEW_HEAD = (
    "#                                                              out-of-place                       in-place\n"
    "#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw"
    " #wrong\n"
    "#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)\n"
)
NEW_ROWS = (
    "       0         0     float     sum      -1     5.70    0.00    0.00      0  5.54    0.00    0.00      0\n"
    " 1048576    262144     float     sum      -1    49.35   21.25   37.18      0 48.20   21.75   38.07      0\n"
    "8589934592 2147483648     float     sum      -1    32149  267.19  467.58      0 32122  267.42  467.98      0\n"
    "# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 123.4\n"
)
OLD_HEAD = (
    "#                                                     out-of-place                       in-place\n"
    "#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error\n"
)
OLD_ROWS = (
    "       65536         16384   float     sum    30.10    2.18    3.81  1e-07    29.70    2.21    3.86  1e-07\n"
)


def write(tmp_path, text: str):
    path = tmp_path / "log.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_new_log_with_its_command_line_gives_every_row_with_a_size_in_seconds(tmp_path):
    path = write(tmp_path, "$ ./build/all_reduce_perf -b 8 -e 8G -f 2 -g 8\n" + START + RANKS + NEW_HEAD + NEW_ROWS)
    assert read_nccl_tests_log(path) == [
        LinkCase("links", "all_reduce", 8, 1048576.0, pytest.approx(49.35e-6)),
        LinkCase("links", "all_reduce", 8, 8589934592.0, pytest.approx(32149e-6)),
    ]


def test_an_old_log_has_no_root_column_and_times_stand_one_place_earlier(tmp_path):
    path = write(tmp_path, START + RANKS + OLD_HEAD + OLD_ROWS)
    (case,) = read_nccl_tests_log(path, kind="all_reduce", level="node")
    assert case == LinkCase("node", "all_reduce", 8, 65536.0, pytest.approx(30.10e-6))


def test_the_bus_bandwidth_of_a_log_is_the_beta_that_is_fitted(tmp_path):
    rows = "".join(
        f"{size:12d} {size // 4:12d} float sum -1 {14 * 2.0 + 1.75 * size / 400e3:.2f} 1.00 1.75 0 9.9 1.0 1.0 0\n"
        for size in (1024, 65536, 2**22, 2**28, 2**32)
    )
    path = write(tmp_path, "# Collective test starting: all_reduce_perf\n" + START + RANKS + NEW_HEAD + rows)
    (level,) = fit_links(read_nccl_tests_log(path))
    assert level.beta_bytes_per_s == pytest.approx(400e9, rel=0.01)
    assert level.alpha_s == pytest.approx(2e-6, rel=0.01)


def test_a_log_that_names_no_program_asks_for_the_collective(tmp_path):
    with pytest.raises(FormatError, match=r"names no program.*--collective"):
        read_nccl_tests_log(write(tmp_path, START + RANKS + NEW_HEAD + NEW_ROWS))


def test_a_program_that_is_not_fitted_is_named(tmp_path):
    with pytest.raises(FormatError, match="broadcast_perf"):
        read_nccl_tests_log(write(tmp_path, "broadcast_perf\n" + START + RANKS + NEW_HEAD + NEW_ROWS))


def test_a_cut_row_a_bad_time_and_missing_ranks_are_all_reported(tmp_path):
    rows = " 1048576    262144     float     sum      -1\n     2097152 524288 float sum -1 nan 1.0 1.0 0\n"
    with pytest.raises(FormatError) as caught:
        read_nccl_tests_log(write(tmp_path, START + NEW_HEAD + rows), kind="all_reduce")
    assert [problem.line for problem in caught.value.problems] == [None, 6, 7]


@pytest.mark.parametrize("text", ["", "hello\n", '{"record": "session"}\n'])
def test_files_of_other_tools_are_refused(tmp_path, text):
    with pytest.raises(FormatError, match="no log of nccl-tests"):
        read_nccl_tests_log(write(tmp_path, text))


def test_a_missing_file_is_a_problem_of_the_file(tmp_path):
    with pytest.raises(FormatError) as caught:
        read_nccl_tests_log(tmp_path / "none")
    assert caught.value.problems[0].code == "E-FMT-001"
