from __future__ import annotations

import pytest
from collective_rows import ROW, facts, written

from moesim.errors import FormatError
from moesim.study.collective_systems import facts_of_row, nic_bandwidth
from moesim.study.collective_tables import COLUMNS, read_collective_tables


@pytest.mark.parametrize(
    ("device", "library", "gigabytes"),
    [
        ("V100-SXM2-32GB", "nccl_volta_mesh", 150),
        ("A100-SXM4-80GB", "nccl_ampere", 300),
        ("A100-PCIE-40GB", "pcie_host", 32),
        ("H800", "nccl_hopper", 200),
        ("H20-3e", "nccl_hopper", 450),
        ("GB300", "nccl_blackwell", 900),
        ("MI300X/MI325X?", "rccl_mi300", 448),
        ("L40S", "pcie_host", 32),
    ],
)
def test_the_device_tells_the_library_and_the_links(device, library, gigabytes):
    found = facts(device=device)
    assert (found.library, found.link_bandwidth) == (library, gigabytes * 1e9)


@pytest.mark.parametrize(
    ("nic", "per_node", "gigabytes"),
    [
        ("32x 100 Gb/s EFA v2 per node", 8, 50),
        ("4x 100 Gb/s EFA v1 per node", 8, 6.25),
        ("1x 400 Gb/s CX-7 per GPU (inferred)", 8, 50),
        ("8x CX-7 400Gb/s RoCE (gIB)", 8, 50),
        ("100 Gb/s EFA per node", 8, 1.5625),
        ("4x 200 GbE GPUDirect-TCPX", 8, 12.5),
        ("AMD Pollara AINIC", 8, 50),
        ("8 mlx5 HCA listed per tray", 4, 0),
    ],
)
def test_nics_of_a_node_are_shared_by_its_devices(nic, per_node, gigabytes):
    assert nic_bandwidth(nic, per_node) == gigabytes * 1e9


@pytest.mark.parametrize(
    ("columns", "network"),
    [
        ({"nic": "32x 100 Gb/s EFA v2 per node"}, "efa_v2"),
        ({"nic": "4x 100 Gb/s EFA v1 per node"}, "efa_v1"),
        ({"nic": "100 Gb/s EFA per node", "system": "AWS p3dn.24xlarge x2"}, "efa_v1"),
        ({"nic": "8x CX-7 400Gb/s RoCE (gIB)"}, "gib"),
        ({"nic": "4x 200 GbE GPUDirect-TCPX"}, "tcpx"),
        ({"nic": "RoCE (mlx5, 8 HCAs; ~200 Gb/s per GPU implied)"}, "ib_gdr"),
        ({"nic": "none"}, ""),
    ],
)
def test_nic_and_system_tell_the_network(columns, network):
    assert facts(**columns).network == network


def test_a_rack_is_one_domain_and_kernels_on_nics_only_have_none():
    rack = facts(device="GB300", n_devices="64", devices_per_node="4", topology="16 trays 1 rack NVL72", nic="8 HCA")
    assert (rack.ranks_per_domain, rack.domains) == (64, 1)
    alone = facts(n_devices="8", topology="pure RDMA", nic="1x 400 Gb/s CX-7 IB per GPU")
    assert (alone.ranks_per_domain, alone.domains) == (1, 8)


def test_tables_in_disorder_are_named_with_a_reason_and_unknown_devices_are_not_guessed():
    assert "TCPX" in facts(id="a3high_ag16_ctk").apart
    assert "never measured" in facts(nic="4x 200 GbE GPUDirect-TCPX").apart
    assert facts().apart == ""
    assert facts_of_row({**ROW, "device": "any"}) == "device 'any' is not known"


def test_rows_become_seconds_and_bytes_and_what_is_no_collective_is_listed(tmp_path):
    peak = {**ROW, "id": "peak", "bytes": "", "time_us": "", "algbw_GBps": "200"}
    messages = {**ROW, "id": "messages", "collective": "alltoall_msgsize"}
    kernel = {
        **ROW,
        "id": "kernel",
        "library_version": "DeepEP V1 normal",
        "collective": "ep_dispatch_fp8_normal",
        "bytes": "",
        "time_us": "",
        "algbw_GBps": "43",
        "source": "4096 tok",
    }
    tables = read_collective_tables(written(tmp_path / "t.csv", ROW, peak, messages, kernel))
    plain, bandwidth, dispatch = tables.rows
    assert (plain.kind, plain.num_bytes, plain.measured_s) == ("all_reduce", 1048576.0, pytest.approx(100e-6))
    assert bandwidth.measured_s == pytest.approx(16 * 2**30 / 200e9)
    assert dispatch.num_bytes == 4096 * 8 * 7392
    assert dispatch.measured_s == pytest.approx(4096 * 7392 * 1.9922 / 43e9, rel=1e-4)  # 2 (1 - 2^-8) nodes
    assert [(lost.table, lost.rows) for lost in tables.unmapped] == [("messages", 1)]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("id,system\n1,2\n", "E-FMT-014"),
        (",".join(COLUMNS) + "\n", "E-FMT-002"),
        (",".join(COLUMNS) + "\n" + ",".join({**ROW, "time_us": "-1"}.values()) + "\n", "E-FMT-013"),
        (",".join(COLUMNS) + "\n" + ",".join({**ROW, "n_devices": "many"}.values()) + "\n", "E-FMT-013"),
    ],
)
def test_a_wrong_file_is_an_error_with_its_place(tmp_path, content, code):
    path = tmp_path / "wrong.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FormatError) as raised:
        read_collective_tables(path)
    assert raised.value.problems[0].code == code
    assert raised.value.problems[0].file == str(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FormatError, match="cannot be read"):
        read_collective_tables(tmp_path / "nothing.csv")
