"""``moesim validate collectives``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli import EXIT_TOLERANCE


def validate_collectives_command(
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="CSV file of measured collectives.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write the report and every row here.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit on this file, once without each system, instead of the shipped fits.")
    ] = False,
    libraries: Annotated[
        Path | None, typer.Option("--libraries", metavar="DIR", help="With --refit: write the fitted libraries here.")
    ] = None,
) -> int:
    """Judge communication libraries on whole systems left out; exits with 1 if a target is missed."""
    from moesim.study.collective_report import collective_report, write_collective_report
    from moesim.study.collective_validation import fit_libraries, validate_collectives
    from moesim.study.library_files import write_fits

    fits = fit_libraries(data) if refit or libraries is not None else None
    if fits is not None and libraries is not None:
        write_fits(fits, libraries)
    validation = validate_collectives(data, fits)
    if out is not None:
        write_collective_report(validation, out)
    print(collective_report(validation))
    return EXIT_TOLERANCE if validation.failures else 0
