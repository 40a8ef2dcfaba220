"""Command line of the network lab."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moesim.errors import MoesimError, UnitError
from moesim.units import parse_quantity
from validation.netlab.reports import REPORT, write_report
from validation.netlab.runs import RunOptions, run_lab

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the lab and write its report; 0 if all tolerances are kept, 1 if not, 2 on bad input, 130 when stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m validation.netlab",
        description="Measure gloo on emulated networks (as root, about five minutes), and judge moesim's predictions.",
    )
    parser.add_argument("--rate", default="60Mb/s", help="rate of a link, one direction (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions of each case (default %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of report and profiles (default: its own)")
    parser.add_argument("--short", action="store_true", help="a few cases on small networks, in half a minute")
    chosen = parser.parse_args(arguments)
    try:
        rate = 8 * parse_quantity(chosen.rate, "bytes_per_s")
        report = run_lab(RunOptions(chosen.out, rate, chosen.repeats, chosen.short), _tell)
        write_report(report, chosen.out)
    except UnitError as error:
        _tell(f"--rate: {error}")
        return 2
    except MoesimError as error:
        _tell(str(error))
        return 2
    except KeyboardInterrupt as error:
        _tell(f"stopped ({error}); all networks are removed")
        return 130
    for verdict in report.verdicts:
        sign = "kept" if verdict.is_met else "MISSED"
        sys.stdout.write(f"{verdict.what}: {verdict.found:.1%} (at most {verdict.tolerance:.0%}) {sign}\n")
    sys.stdout.write(f"{chosen.out / REPORT}\n")
    return 0 if report.is_met else 1


def _tell(text: str) -> None:
    sys.stderr.write(f"netlab: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
