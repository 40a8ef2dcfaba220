"""Tables of measured collectives and of MoE dispatch and combine: reading, and what each row asks for."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesim.errors import FormatError, Problem
from moesim.study.collective_systems import GIGABYTE, SystemFacts, facts_of_row, system_key

COLUMNS = (
    "id",
    "system",
    "device",
    "n_devices",
    "devices_per_node",
    "topology",
    "nic",
    "library_version",
    "collective",
    "bytes",
    "time_us",
    "algbw_GBps",
    "busbw_GBps",
    "source",
)
KINDS: dict[str, str] = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "sendrecv": "point_to_point",
}
"""The tables' words for the collectives, and ours."""
PEAK_BYTES = 16 * 2.0**30
"""Size at which a row without bytes counts: a peak of large messages."""
CHOICES = 8
DEFAULT_TOKENS = 4096
BYTES_PER_TOKEN: tuple[tuple[str, float], ...] = (("bf16", 14336.0), ("bfloat16", 14336.0), ("fp8", 7392.0))
"""Hidden size 7168 as the tables send it; fp8 with its scales."""
NODE_LIMIT = 4
"""Nodes a token may visit (top-4 groups)."""
MOE_LIBRARIES: tuple[tuple[str, str], ...] = (
    (r"DeepEP Feb 2025 low-latency", "deepep_ll_rdma"),
    (r"DeepEP.*(low-latency|LL)", "deepep_ll"),
    (r"DeepEP.*normal", "deepep_normal"),
    (r"UCCL-EP", "uccl"),
    (r"MORI", "mori_ll"),
    (r"pplx", "pplx"),
    (r"TRT-LLM", "trtllm"),
)


@dataclass(frozen=True)
class CollectiveRow:
    """One measured time.

    ``kind`` is a collective of moesim or ``dispatch`` or ``combine``; ``num_bytes`` the buffer by moesim's convention
    (``Collective.num_bytes``; tokens x choices x bytes per token for MoE kernels); ``moe_library`` names the kernel.
    """

    table: str
    system: str
    kind: str
    num_ranks: int
    num_bytes: float
    measured_s: float
    facts: SystemFacts
    moe_library: str = ""
    is_derived_time: bool = False


@dataclass(frozen=True)
class Unmapped:
    """Rows of one table that cannot be predicted, and why."""

    table: str
    reason: str
    rows: int


@dataclass(frozen=True)
class CollectiveTables:
    """All rows of a file: those that are mapped, in order of the file, and the others."""

    rows: tuple[CollectiveRow, ...]
    unmapped: tuple[Unmapped, ...]


def read_collective_tables(path: Path) -> CollectiveTables:
    """Read a file of collective tables.

    Raises
    ------
    FormatError
        If it cannot be read, lacks a column, or a number is none; with its line.
    """
    lines = _read_lines(path)
    rows: list[CollectiveRow] = []
    lost: dict[tuple[str, str], int] = {}
    for number, line in lines:
        try:
            mapped = _map_row(line)
        except ValueError as error:
            message = f"row of {line['id']!r} has {error}"
            raise _error("E-FMT-013", path, message, "write counts and numbers", number) from None
        if isinstance(mapped, CollectiveRow):
            rows.append(mapped)
        else:
            key = (line["id"], mapped)
            lost[key] = lost.get(key, 0) + 1
    return CollectiveTables(tuple(rows), tuple(Unmapped(table, why, count) for (table, why), count in lost.items()))


def _read_lines(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                remedy = f"a collective table has {', '.join(COLUMNS)}"
                raise _error("E-FMT-014", path, f"column {missing[0]!r} is missing", remedy, 1)
            lines = [(reader.line_num, {key: line[key] or "" for key in COLUMNS}) for line in reader]
    except OSError as error:
        remedy = "give a CSV file of measured collectives"
        raise _error("E-FMT-001", path, f"cannot be read: {error.strerror}", remedy) from None
    except UnicodeDecodeError:
        raise _error("E-FMT-004", path, "not UTF-8 text", "save it as UTF-8") from None
    except csv.Error as error:
        raise _error("E-FMT-013", path, f"not CSV: {error}", "write it as comma-separated values") from None
    if not lines:
        raise _error("E-FMT-002", path, "the table has no rows", "give a table with a header and rows")
    return lines


def _error(code: str, path: Path, message: str, remedy: str, line: int | None = None) -> FormatError:
    return FormatError([Problem(code=code, message=message, remedy=remedy, file=str(path), line=line)])


def _number(row: Mapping[str, str], key: str) -> float | None:
    if not row[key].strip():
        return None
    value = float(row[key])
    if not np.isfinite(value) or value <= 0:
        raise ValueError(f"{key} = {row[key]!r}")
    return value


def _map_row(row: Mapping[str, str]) -> CollectiveRow | str:
    if int(row["n_devices"]) < 2 or int(row["devices_per_node"]) < 1:
        return "fewer than two ranks"
    if row["collective"].startswith("ep_"):
        return _moe_row(row)
    if row["collective"] not in KINDS:
        return f"{row['collective']} is no collective: its bytes are those of one message"
    facts = facts_of_row(row)
    if isinstance(facts, str):
        return facts
    num_bytes = _number(row, "bytes")
    time_us, algorithm_gbps = _number(row, "time_us"), _number(row, "algbw_GBps")
    is_derived = time_us is None
    if time_us is None:
        if algorithm_gbps is None:
            return "neither a time nor a bandwidth is given"
        time_us = (num_bytes or PEAK_BYTES) / (algorithm_gbps * GIGABYTE) * 1e6
    return CollectiveRow(
        table=row["id"],
        system=system_key(row),
        kind=KINDS[row["collective"]],
        num_ranks=int(row["n_devices"]),
        num_bytes=num_bytes or PEAK_BYTES,
        measured_s=time_us * 1e-6,
        facts=facts,
        is_derived_time=is_derived,
    )


def moe_library_of(row: Mapping[str, str], network: str) -> str | None:
    """The kernel library of a dispatch or combine row, with its mode and network where they are kept apart."""
    name = next((name for pattern, name in MOE_LIBRARIES if re.search(pattern, row["library_version"])), None)
    if name == "uccl":
        mode = "normal" if row["collective"].endswith("normal") else "ll"
        is_ib = re.search(r"\bIB\b|CX-?7|ConnectX|Thor|Pollara", f"{row['nic']} {row['system']}")
        return f"uccl_{mode}_{'ib' if is_ib else 'efa'}"
    if name == "pplx":
        transport = re.search(r"IBGDA|IBRC", row["topology"])
        return f"pplx_{transport.group(0).lower()}" if transport else "pplx_nvlink"
    if name == "trtllm":
        return "trtllm_one_sided" if "OneSided" in row["topology"] + row["id"] else "trtllm_two_sided"
    return name


def _moe_row(row: Mapping[str, str]) -> CollectiveRow | str:
    facts = facts_of_row(row)
    if isinstance(facts, str):
        return facts
    library = moe_library_of(row, facts.network)
    if library is None:
        return f"MoE kernels of {row['library_version']!r} are not known"
    per_token = next((size for word, size in BYTES_PER_TOKEN if word in row["collective"]), None)
    num_bytes = _number(row, "bytes")
    if num_bytes is None:
        tokens = re.search(r"(\d+) tok", row["source"])
        if per_token is None or tokens is None:
            return "neither bytes nor tokens are given"
        num_bytes = int(tokens.group(1)) * CHOICES * per_token
    time_us = _number(row, "time_us")
    printed_gbps = _number(row, "busbw_GBps") or _number(row, "algbw_GBps")
    is_derived = time_us is None
    if time_us is None:
        if printed_gbps is None:
            return "neither a time nor a bandwidth is given"
        carried = num_bytes / CHOICES * bottleneck_copies(int(row["n_devices"]), facts.domains)
        time_us = carried / (printed_gbps * GIGABYTE) * 1e6
    return CollectiveRow(
        table=row["id"],
        system=system_key(row),
        kind="dispatch" if "dispatch" in row["collective"] else "combine",
        num_ranks=int(row["n_devices"]),
        num_bytes=num_bytes,
        measured_s=time_us * 1e-6,
        facts=facts,
        moe_library=library,
        is_derived_time=is_derived,
    )


def bottleneck_copies(num_ranks: int, domains: int) -> float:
    """Copies of a token in the bandwidth that DeepEP prints: distinct ranks of one node, else distinct nodes."""
    targets = float(num_ranks if domains == 1 else min(domains, NODE_LIMIT))
    return targets * (1.0 - (1.0 - 1.0 / targets) ** CHOICES)


def tables_of(rows: Sequence[CollectiveRow]) -> dict[str, list[int]]:
    """Positions of the rows of each table, in order of the file."""
    positions: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        positions.setdefault(row.table, []).append(position)
    return positions
