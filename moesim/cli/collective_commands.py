"""The command ``moesim network``: one collective on one cluster, size by size."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.cli.options import JsonOption, ProfilesOption

if TYPE_CHECKING:
    from moesim.study.network_tables import NetworkTable

WIDTHS = (12, 18, 9, 12, 10, 10)


def network(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="Cluster: name of a profile, or a YAML file.")],
    collective: Annotated[str, typer.Option("--collective", help="all_to_all, all_reduce, all_gather, ...")],
    ranks: Annotated[int, typer.Option("--ranks", help="Devices 0 .. N - 1 of the cluster take part.")],
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="A..B", help="Sizes A, 2 A, 4 A, ... B; or a list with commas.")
    ] = "1KiB..1GiB",
    algorithm: Annotated[str, typer.Option("--algorithm", help="Name, or auto: what the library takes.")] = "auto",
    stack: Annotated[str | None, typer.Option("--stack", help="Software stack; without one, ideal times.")] = None,
    engine: Annotated[str, typer.Option("--engine", help="closed or flow.")] = "closed",
    token_matrix: Annotated[
        Path | None, typer.Option("--token-matrix", metavar="FILE.csv", help="Tokens from each rank to each rank.")
    ] = None,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")] = False,
    profiles: ProfilesOption = None,
) -> int:
    """Time a collective on a cluster size by size, in a table as nccl-tests prints it."""
    from moesim.describe.hardware_library import HardwareLibrary
    from moesim.study.network_questions import NetworkQuestion, read_question
    from moesim.study.network_tables import network_table

    question = NetworkQuestion(profile, collective, ranks, sizes, algorithm, stack, engine, token_matrix)
    table = network_table(read_question(question, HardwareLibrary(profiles or [])))
    if as_json:
        sys.stdout.write(json.dumps(table.to_json(), indent=1, allow_nan=False) + "\n")
    elif as_csv:
        from moesim.study.network_tables import COLUMNS

        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.to_json() for row in table.rows)
    else:
        _print_table(table)
    return 0


def _print_table(table: NetworkTable) -> None:
    """Columns of nccl-tests: size, time in us, algbw and busbw in GB/s; then the busiest link."""
    case = table.case
    levels = " x ".join(
        f"{int(extent)} {level.name}" for level, extent in zip(case.fabric.levels, case.extents, strict=True)
    )
    stack = case.stack.id if case.stack is not None else "ideal"
    print(f"# {case.kind}, {case.ranks} ranks ({levels}) on {case.cluster.id}; {stack}; engine {case.engine}")
    headers = ("size (B)", "algorithm", "protocol", "time (us)", "algbw", "busbw")
    print("#" + "".join(f"{text:>{width}}" for text, width in zip(headers, WIDTHS, strict=True)) + "  busiest link")
    for row in table.rows:
        cells = (
            f"{row.size_bytes:.0f}",
            row.algorithm,
            row.protocol,
            f"{row.time_s * 1e6:.2f}",
            f"{row.algbw_bytes_per_s / 1e9:.2f}",
            f"{row.busbw_bytes_per_s / 1e9:.2f}",
        )
        line = " " + "".join(f"{text:>{width}}" for text, width in zip(cells, WIDTHS, strict=True))
        print(f"{line}  {row.busiest_link} {row.busiest_link_utilisation:.1%}")
    for note in table.notes:
        print(f"# {note}")
