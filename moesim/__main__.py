"""Run the command line: ``python -m moesim``."""

import sys


def main() -> int:
    """Run one command; ``measure`` must work where only torch and NumPy are installed.

    Returns
    -------
    int
        Exit code.
    """
    if sys.argv[1:2] == ["measure"]:
        from moesim.measurement import main as measure

        return measure(sys.argv[2:])
    from moesim.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
