"""The measurement suite: what kernels, layers and blocks really cost on the machine at hand.

It travels light: the folder ``moesim`` copied beside torch and NumPy is enough, and importing it needs not even torch.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``python -m moesim measure``.

    Parameters
    ----------
    argv : sequence of str
        Arguments after the word ``measure``.

    Returns
    -------
    int
        0 fine, 2 bad input or a machine that cannot be measured, 130 interrupted.
    """
    from moesim.measurement.command import run

    return run(argv)
