"""The command line: arguments in, exit codes out; everything else is imported when a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

EXIT_TOLERANCE = 1
EXIT_BAD_INPUT = 2
EXIT_DOES_NOT_FIT = 3
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        0 fine, 1 tolerance exceeded, 2 bad input or usage, 3 does not fit, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["measure"]:  # needs torch and NumPy only: nothing of the rest is imported
        from moesim.measurement import main as measure

        return measure(arguments[1:])
    from moesim.cli.commands import run

    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what reads us has gone; nothing is left to say
        return 0
