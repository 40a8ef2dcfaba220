"""The command ``moesim network``: tables, JSON, CSV, and every bad input."""

from __future__ import annotations

import csv
import io
import json

import pytest

from moesim.cli import main
from moesim.resources import profile_directories
from moesim.study.network_tables import COLUMNS

HOPPER = "h100_sxm_hgx_nodes"
TORUS = "tpu_v3_8x8"


def ask(capsys, *arguments):
    code = main(["network", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows_of(capsys, *arguments):
    code, out, err = ask(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)["rows"]


def test_a_table_has_a_row_for_each_size_of_the_range(capsys):
    code, out, _ = ask(capsys, HOPPER, "--collective", "all_to_all", "--ranks", "64", "--sizes", "1KiB..1MiB")
    rows = [line for line in out.splitlines() if not line.startswith("#")]
    assert code == 0
    assert [int(row.split()[0]) for row in rows] == [1024 * 2**step for step in range(11)]


def test_ideal_all_to_all_by_hand(capsys):
    """64 ranks, 64 MiB: 56/64 of it over a NIC of 50 GB/s, one hop of 2.7 us; busbw is 63/64 of algbw."""
    (row,) = rows_of(capsys, HOPPER, "--collective", "all_to_all", "--ranks", "64", "--sizes", "64MiB")
    assert row["time_s"] == pytest.approx(56 * 2**20 / 50e9 + 2.7e-6, rel=1e-12)
    assert row["algbw_bytes_per_s"] == pytest.approx(2**26 / row["time_s"], rel=1e-12)
    assert row["busbw_bytes_per_s"] == pytest.approx(row["algbw_bytes_per_s"] * 63 / 64, rel=1e-12)
    assert row["busiest_link"] == "network"
    assert row["busiest_link_utilisation"] == pytest.approx(56 * 2**20 / 50e9 / row["time_s"], rel=1e-12)


@pytest.mark.parametrize(("kind", "factor"), [("all_reduce", 14 / 8), ("all_gather", 7 / 8), ("broadcast", 1.0)])
def test_bus_bandwidth_follows_the_conventions_of_nccl_tests(capsys, kind, factor):
    for row in rows_of(capsys, HOPPER, "--collective", kind, "--ranks", "8", "--sizes", "1MiB..4MiB"):
        assert row["busbw_bytes_per_s"] == pytest.approx(factor * row["algbw_bytes_per_s"], rel=1e-12)


def test_names_of_nccl_tests_are_understood(capsys):
    ours, theirs = (
        rows_of(capsys, HOPPER, "--collective", name, "--ranks", "8", "--sizes", "1MiB")
        for name in ("all_to_all", "alltoall")
    )
    assert ours == theirs


def test_csv_has_the_columns_of_the_json(capsys):
    _, out, _ = ask(capsys, HOPPER, "--collective", "all_reduce", "--ranks", "16", "--sizes", "1kB,5kB", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert tuple(rows[0]) == COLUMNS
    assert [float(row["size_bytes"]) for row in rows] == [1000.0, 5000.0]


def test_json_is_one_object_that_says_what_was_asked(capsys):
    _, out, _ = ask(capsys, TORUS, "--collective", "all_reduce", "--ranks", "128", "--sizes", "1MiB", "--json")
    answer = json.loads(out)
    assert answer["schema_version"] == 1
    assert answer["extents"] == {"chip": 2, "torus_x": 8, "torus_y": 8}
    assert (answer["engine"], answer["algorithm"], answer["stack"]) == ("closed", "auto", None)
    assert answer["rows"][0]["algorithm"] == "torus"


def test_auto_takes_what_nccl_takes_and_a_named_algorithm_is_kept(capsys):
    arguments = (HOPPER, "--collective", "all_reduce", "--ranks", "8", "--sizes", "1KiB,64MiB")
    assert [row["algorithm"] for row in rows_of(capsys, *arguments)] == ["ring", "nvls"]
    named = rows_of(capsys, *arguments, "--algorithm", "tree")
    assert [row["algorithm"] for row in named] == ["tree", "tree"]


@pytest.mark.parametrize(("profile", "ranks"), [(TORUS, 128), ("tpu_v4_8x8x8", 512)])
def test_flows_on_a_torus_take_the_closed_form_of_the_direct_exchange(capsys, profile, ranks):
    arguments = (
        profile,
        "--collective",
        "all_to_all",
        "--ranks",
        str(ranks),
        "--sizes",
        "16MiB",
        "--algorithm",
        "direct",
    )
    closed, flow = (rows_of(capsys, *arguments, "--engine", engine)[0]["time_s"] for engine in ("closed", "flow"))
    assert flow == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [
        ("all_to_all", "direct"),
        ("all_to_all", "pairwise"),
        ("all_to_all", "bruck"),
        ("all_to_all", "hierarchical"),
        ("all_to_all", "rail_aligned"),
        ("all_reduce", "ring"),
        ("all_reduce", "hierarchical"),
        ("all_reduce", "hierarchical_ring"),
        ("all_reduce", "halving_doubling"),
        ("all_gather", "ring"),
        ("all_gather", "recursive"),
        ("reduce_scatter", "ring"),
        ("reduce_scatter", "recursive"),
        ("broadcast", "binomial_tree"),
        ("point_to_point", "send"),
    ],
)
def test_the_flow_engine_takes_the_closed_form_of_plans_on_a_crossbar(capsys, kind, algorithm, ranks):
    """Plans whose rounds are alike: nothing is lost by waiting for a round, so chunks would not help."""
    arguments = ("h100_sxm_8", "--ranks", str(ranks), "--sizes", "64KiB,64MiB", "--collective", kind)
    ways = [rows_of(capsys, *arguments, "--algorithm", algorithm, "--engine", engine) for engine in ("closed", "flow")]
    for closed, flow in zip(*ways, strict=True):
        assert flow["time_s"] == pytest.approx(closed["time_s"], rel=1e-9)


def test_flows_reduce_in_the_switch_one_round_after_the_other(capsys):
    """To the switch and back, twice: s, s/8, s/8 and s at 450 GB/s, two trips of 0.7 us; pipelined, half the bytes."""
    arguments = ("h100_sxm_8", "--collective", "all_reduce", "--ranks", "8", "--sizes", "64MiB", "--algorithm", "nvls")
    closed, flow = (rows_of(capsys, *arguments, "--engine", engine)[0]["time_s"] for engine in ("closed", "flow"))
    assert closed == pytest.approx(2**26 * 1.125 / 450e9 + 1.4e-6, rel=1e-6)
    assert flow == pytest.approx(2 * 2**26 * 1.125 / 450e9 + 1.4e-6, rel=1e-6)


def test_a_stack_takes_longer_than_ideal_links(capsys):
    arguments = (HOPPER, "--collective", "all_to_all", "--ranks", "16", "--sizes", "1KiB..1GiB")
    ideal, real = rows_of(capsys, *arguments), rows_of(capsys, *arguments, "--stack", "megatron_core_nccl")
    assert all(one["time_s"] < other["time_s"] for one, other in zip(ideal, real, strict=True))


@pytest.mark.parametrize(
    ("profile", "ranks", "stack"), [(HOPPER, 64, "megatron_core_nccl"), ("tpu_v4_8x8x8", 512, "xla_gspmd_modern")]
)
def test_a_stack_makes_the_same_of_flows_and_of_the_closed_form(capsys, profile, ranks, stack):
    """One place applies latency, fractions and pipelining; without contention both engines agree."""
    arguments = (
        profile,
        "--collective",
        "all_to_all",
        "--ranks",
        str(ranks),
        "--sizes",
        "64KiB,64MiB",
        "--stack",
        stack,
    )
    arguments = (*arguments, "--algorithm", "direct")
    ways = [rows_of(capsys, *arguments, "--engine", engine) for engine in ("closed", "flow")]
    for closed, flow in zip(*ways, strict=True):
        assert flow["time_s"] == pytest.approx(closed["time_s"], rel=0.02)
        assert flow["busiest_link_utilisation"] == pytest.approx(closed["busiest_link_utilisation"], rel=0.02)


def test_a_named_algorithm_is_priced_with_the_constants_of_the_stack(capsys):
    """Two stages send few long messages: less latency for short buffers, more time for long ones."""
    arguments = (HOPPER, "--collective", "all_to_all", "--ranks", "64", "--sizes", "1KiB,1GiB", "--stack")
    direct, staged = (
        rows_of(capsys, *arguments, "megatron_core_nccl", "--algorithm", name) for name in ("direct", "hierarchical")
    )
    assert staged[0]["time_s"] < direct[0]["time_s"]
    assert staged[1]["time_s"] > direct[1]["time_s"]


def test_a_token_matrix_sets_the_busiest_rank(capsys, tmp_path):
    """Rank 0 sends twice what the others do: its 2 x 8/9 of the mean at 450 GB/s, 7/8 of it to others."""
    path = tmp_path / "tokens.csv"
    path.write_text("\n".join(",".join(["2"] * 8 if row == 0 else ["1"] * 8) for row in range(8)), encoding="utf-8")
    arguments = (
        "h100_sxm_8",
        "--collective",
        "all_to_all",
        "--ranks",
        "8",
        "--sizes",
        "90MB",
        "--token-matrix",
        str(path),
    )
    closed, flow = (rows_of(capsys, *arguments, "--engine", engine)[0] for engine in ("closed", "flow"))
    expected = 160e6 * 7 / 8 / 450e9
    assert closed["time_s"] == pytest.approx(expected, rel=0.02)
    assert flow["time_s"] == pytest.approx(closed["time_s"], rel=0.02)


BAD = [
    (("nope", "--collective", "all_to_all", "--ranks", "8"), "E-SCN-009", "no cluster is called 'nope'"),
    ((HOPPER, "--collective", "all_to_al", "--ranks", "8"), "E-SCN-010", "did you mean 'all_to_all'"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "8", "--algorithm", "rings"), "E-SCN-010", "'rings'"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "8", "--algorithm", "torus"), "E-SCN-010", "'torus'"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "8", "--engine", "fast"), "E-SCN-010", "closed, flow"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "9000"), "E-NET-003", "use at most 8192"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "12"), "E-NET-003", "partly filled"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "1"), "E-NET-003", "at least 2"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "-4"), "E-NET-003", "at least 2"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "8", "--sizes=-1KiB"), "E-SCN-007", "negative"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "8", "--sizes", "1024"), "E-SCN-005", "no unit"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "8", "--sizes", "4MiB..1MiB"), "E-SCN-007", "does not go up"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "8", "--sizes", "0B..1MiB"), "E-SCN-007", "does not go up"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "8", "--sizes", "1B..2B..3B"), "E-SCN-007", "does not go up"),
    ((HOPPER, "--collective", "all_to_all", "--ranks", "8", "--stack", "nope"), "E-SCN-009", "no stack is called"),
    ((TORUS, "--collective", "all_to_all", "--ranks", "8", "--stack", "deepspeed_nccl"), "E-SCN-011", "torus links"),
    (
        (HOPPER, "--collective", "all_reduce", "--ranks", "512", "--algorithm", "ring", "--engine", "flow"),
        "E-NET-003",
        "too",
    ),
    (
        (HOPPER, "--collective", "all_to_all", "--ranks", "8", "--token-matrix", "/none.csv"),
        "E-FMT-014",
        "No such file",
    ),
]


@pytest.mark.parametrize(("arguments", "code", "words"), BAD)
def test_bad_input_ends_with_a_sentence_and_exit_code_2(capsys, arguments, code, words):
    status, out, err = ask(capsys, *arguments)
    assert (status, out) == (2, "")
    assert f"[{code}]" in err
    assert words in err


def test_all_problems_are_named_at_once_also_as_json(capsys):
    code, out, _ = ask(
        capsys, HOPPER, "--collective", "gossip", "--ranks", "9000", "--sizes=-1KiB", "--engine", "fast", "--json"
    )
    problems = json.loads(out)["errors"]
    assert code == 2
    assert {problem["field"] for problem in problems} == {"collective", "ranks", "sizes", "engine"}


@pytest.mark.parametrize("table", ["1,2\n3,4\n", "a,b\n", "1,-1,0,0,0,0,0,0\n" * 8, "1,2\n3\n"])
def test_a_wrong_token_matrix_is_refused(capsys, tmp_path, table):
    path = tmp_path / "tokens.csv"
    path.write_text(table, encoding="utf-8")
    status, _, err = ask(
        capsys, "h100_sxm_8", "--collective", "all_to_all", "--ranks", "8", "--token-matrix", str(path)
    )
    assert status == 2
    assert str(path) in err


def changed_profile(tmp_path, name, old, new):
    (source,) = (
        path for path in (folder / "clusters" / f"{name}.yaml" for folder in profile_directories([])) if path.is_file()
    )
    text = source.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / f"{name}.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def test_a_profile_may_be_a_file(capsys, tmp_path):
    path = changed_profile(tmp_path, "h100_sxm_8", '"450 GB/s"', '"225 GB/s"')
    arguments = ("--collective", "all_to_all", "--ranks", "8", "--sizes", "1GiB")
    (slow,), (fast,) = (rows_of(capsys, where, *arguments) for where in (str(path), "h100_sxm_8"))
    assert slow["time_s"] == pytest.approx(2 * fast["time_s"], rel=1e-3)


@pytest.mark.parametrize("engine", ["closed", "flow"])
def test_a_disconnected_network_is_refused(capsys, tmp_path, engine):
    """GPU 7 of a DGX-1V without its links."""
    path = changed_profile(tmp_path, "v100_sxm2_32gb_8", "- [0, 0, 0, 1, 2, 1, 2, 0]", "- [0, 0, 0, 0, 0, 0, 0, 0]")
    text = path.read_text(encoding="utf-8")
    for row in (
        "[2, 1, 2, 0, 0, 0, 0, 1]",
        "[2, 0, 0, 0, 0, 1, 1, 2]",
        "[0, 2, 0, 0, 1, 0, 2, 1]",
        "[0, 0, 1, 0, 1, 2, 0, 2]",
    ):
        text = text.replace(row, row[:-2] + "0]")
    path.write_text(text, encoding="utf-8")
    status, _, err = ask(capsys, str(path), "--collective", "all_to_all", "--ranks", "8", "--engine", engine)
    assert status == 2
    assert "E-NET-001" in err


def test_groups_over_several_pods_are_refused(capsys, tmp_path):
    path = changed_profile(tmp_path, "tpu_v5e_4x4", "device_count: 16", "device_count: 32")
    figure = '{value: "%s", kind: assumed, source: "test"}'
    pods = f"  pods: {{count: 2, bandwidth_per_device: {figure % '3 GB/s'}, latency: {figure % '10 us'}}}\n"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("  dimensions:", pods + "  dimensions:"), encoding="utf-8")
    arguments = (str(path), "--collective", "all_reduce", "--sizes", "1MiB")
    assert ask(capsys, *arguments, "--ranks", "16")[0] == 0
    status, _, err = ask(capsys, *arguments, "--ranks", "32")
    assert status == 2
    assert "several pods" in err


def test_a_link_without_bandwidth_is_refused(capsys, tmp_path):
    path = changed_profile(tmp_path, "h100_sxm_8", '"450 GB/s"', '"0 GB/s"')
    status, _, err = ask(capsys, str(path), "--collective", "all_to_all", "--ranks", "8")
    assert status == 2
    assert "E-SCN-007" in err
