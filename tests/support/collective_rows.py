"""Rows and files of collective tables as tests write them."""

from __future__ import annotations

from pathlib import Path

from moesim.study.collective_systems import SystemFacts, facts_of_row
from moesim.study.collective_tables import COLUMNS

ROW = {
    "id": "table",
    "system": "a cluster",
    "device": "H100-SXM5",
    "n_devices": "16",
    "devices_per_node": "8",
    "topology": "2 nodes x 8 H100 NVLink4",
    "nic": "8x 400 Gb/s ConnectX-7 IB per node",
    "library_version": "NCCL 2.27.3",
    "collective": "all_reduce",
    "bytes": "1048576",
    "time_us": "100",
    "algbw_GBps": "",
    "busbw_GBps": "",
    "source": "a test",
}


def facts(**columns: str) -> SystemFacts:
    found = facts_of_row({**ROW, **columns})
    assert isinstance(found, SystemFacts), found
    return found


def written(path: Path, *rows: dict[str, str]) -> Path:
    lines = [",".join(COLUMNS), *(",".join(f'"{row[name]}"' for name in COLUMNS) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
