from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from collective_rows import ROW, facts, written

from moesim.cli import main
from moesim.resources import data_directory
from moesim.study.collective_report import collective_report, collective_rows_csv
from moesim.study.collective_tables import CollectiveRow
from moesim.study.collective_validation import MOE, TARGETS, class_of_row, validate_collectives
from moesim.study.fit_collectives import CollectiveFit
from moesim.study.fit_moe_libraries import KIND_OF_LIBRARY, MoeFit
from moesim.study.library_files import moe_documents, network_documents, node_documents, read_fits
from moesim.study.torus_growth import growth_cases

SIZES = [2.0**power for power in range(10, 31, 2)]


def planted_row(kind: str, num_bytes: float, **fields: object) -> CollectiveRow:
    row = {"table": "t", "system": "s", "kind": kind, "num_ranks": 8, "num_bytes": num_bytes, "measured_s": 1.0}
    one_node = facts(n_devices="8", nic="none")
    return CollectiveRow(**{**row, "facts": one_node, **fields})


def planted_rows(device_factor: float = 1.0) -> list[CollectiveRow]:
    """Rows that the model itself makes, with the node's latencies and its ring bandwidth changed by known factors."""
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    rows = [planted_row(kind, size) for kind in kinds for size in SIZES]
    model = CollectiveFit(rows)
    constants = model.constants(np.zeros(len(model.spreads)))
    node = {name: {key: value * device_factor for key, value in by.items()} for name, by in constants.node.items()}
    slower = {
        name: (node[name] if name in ("base", "round", "quick_base", "quick_round") else by)
        for name, by in constants.node.items()
    }
    seconds = model.predict_s(dataclasses.replace(constants, node=slower))
    return [dataclasses.replace(row, measured_s=float(value)) for row, value in zip(rows, seconds, strict=True)]


def test_a_fit_recovers_what_was_planted():
    """Latencies of reductions 1.4 times their prior's centre; the rest as it was."""
    rows = planted_rows(1.4)
    model = CollectiveFit(rows)
    constants = model.constants(model.fit())
    priors = model.constants(np.zeros(len(model.spreads)))
    predicted = model.predict_s(constants)
    assert np.abs(predicted / model.measured_s - 1.0).max() < 0.05
    for name in ("quick_base", "quick_round"):
        found = constants.node[name]["nccl_hopper"] / priors.node[name]["nccl_hopper"]
        assert found == pytest.approx(1.4, rel=0.1)


def test_fractions_never_exceed_the_nominal_bandwidth():
    model = CollectiveFit(planted_rows())
    constants = model.constants(np.full(len(model.spreads), 5.0))
    for values in (constants.node, constants.network):
        assert max(value for name, by in values.items() if name.endswith("fraction") for value in by.values()) <= 1.0


def test_kernels_of_one_domain_by_hand():
    """GB200, 64 ranks: 7.57 devices per token at a fitted fraction of 900 GB/s."""
    rack = facts(device="GB200", n_devices="64", devices_per_node="4", topology="NVL72", nic="none")
    row = planted_row("dispatch", 1e9, num_ranks=64, facts=rack, moe_library="trtllm_two_sided")
    model = MoeFit([row])
    constants = model.constants(np.zeros(len(model.spreads)))
    values = {name: by["trtllm_two_sided"] for name, by in constants.values.items()}
    copies = 64 * (1 - (1 - 1 / 64) ** 8)
    wire_s = 1e9 * (63 / 64 * copies / 8 + values["own_copy"] / 64) / (values["fraction"] * 900e9)
    latency_s = values["base"] * 1e-6
    expected = latency_s + wire_s + values["pipelining"] * np.sqrt(latency_s * wire_s)
    assert model.predict_s(constants)[0] == pytest.approx(expected, rel=1e-9)


def test_classes_are_told_by_nodes_and_size():
    assert class_of_row(planted_row("all_reduce", 2.0**20)) == "one node, >= 1 MiB"
    assert class_of_row(planted_row("all_reduce", 2.0**20 - 1)) == "one node, < 1 MiB"
    assert class_of_row(planted_row("dispatch", 1.0, moe_library="deepep_ll")) == MOE


def test_a_known_system_is_predicted_without_it_and_an_unknown_one_from_all(tmp_path):
    fits = read_fits()
    known = "AWS p5.48xlarge x2 [H100-SXM5]"
    assert known in fits.without_system
    rows = [{**ROW, "system": "AWS p5.48xlarge x2", "nic": "32x 100 Gb/s EFA v2 per node"}, ROW]
    validation = validate_collectives(written(tmp_path / "t.csv", *rows))
    assert validation.is_known_system.tolist() == [True, False]
    model = CollectiveFit(validation.rows[:1])
    assert validation.predicted_s[0] == pytest.approx(model.predict_s(fits.without_system[known])[0], rel=1e-9)
    assert model.predict_s(fits.everything)[0] != pytest.approx(validation.predicted_s[0], rel=1e-3)


def test_a_network_never_measured_is_apart_and_carries_a_factor_of_two_on_small_messages(tmp_path):
    row = {**ROW, "nic": "4x 200 GbE GPUDirect-TCPX", "bytes": "1024"}
    validation = validate_collectives(written(tmp_path / "t.csv", row))
    assert not validation.is_judged.any()
    assert validation.half_widths[0] >= np.log(2.0)
    assert "never measured in good order" in collective_report(validation)


def test_the_rows_file_holds_every_row_and_every_table_that_is_not_mapped(tmp_path):
    lost = {**ROW, "id": "lost", "device": "any"}
    rows = list(
        csv.DictReader(io.StringIO(collective_rows_csv(validate_collectives(written(tmp_path / "t", ROW, lost)))))
    )
    assert [row["table"] for row in rows] == ["table", "lost"]
    assert float(rows[0]["low_us"]) < float(rows[0]["predicted_us"]) < float(rows[0]["high_us"])
    assert rows[1]["reason"] == "not mapped: device 'any' is not known"


@pytest.mark.parametrize(("time_us", "code"), [(None, 0), ("5000", 1)])
def test_the_command_exits_with_one_beyond_tolerance(tmp_path, capsys, time_us, code):
    plain = validate_collectives(written(tmp_path / "first.csv", ROW))
    exact = time_us or f"{plain.predicted_s[0] * 1e6:.6g}"
    path = written(tmp_path / "t.csv", {**ROW, "time_us": exact})
    assert main(["validate", "collectives", "--data", str(path), "--out", str(tmp_path / "out")]) == code
    assert ("Missed: none" in capsys.readouterr().out) == (code == 0)
    assert (tmp_path / "out" / "rows.csv").is_file()


def test_a_wrong_file_exits_with_two(tmp_path, capsys):
    assert main(["validate", "collectives", "--data", str(tmp_path / "nothing.csv")]) == 2
    assert "E-FMT-001" in capsys.readouterr().err


def test_a_fit_needs_rows_of_every_class(tmp_path, capsys):
    path = written(tmp_path / "t.csv", ROW)
    assert main(["validate", "collectives", "--data", str(path), "--refit"]) == 2
    assert "no rows in good order of class" in capsys.readouterr().err


def test_shipped_libraries_are_those_of_the_shipped_fits():
    fits = read_fits()
    folder = data_directory("hardware_profiles") / "libraries"
    documents = {**node_documents(fits), **network_documents(fits), **moe_documents(fits)}
    assert sorted(documents) == sorted(path.stem for path in folder.glob("*.json"))
    for name, document in documents.items():
        shipped = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        assert shipped.keys() == document.keys()
        assert shipped["constants"] == document["constants"], name
    assert set(KIND_OF_LIBRARY) <= set(documents)


def test_held_out_errors_of_the_shipped_fits_are_within_the_targets():
    """Half widths are 90th percentiles of |log error|: below log(1 + target) of every class."""
    for name, (_, p90) in TARGETS.items():
        assert read_fits().half_widths[name] <= np.log(1.0 + p90) * 1.3


def test_all_to_alls_of_gshard_grow_as_published_within_a_fifth():
    cases = growth_cases()
    assert len([case for case in cases if case.is_judged]) == 3
    assert all(abs(case.error) <= 0.2 for case in cases)
