"""Commands that tests interrupt: the signal must reach them however the tests themselves were started."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """Let a child process be interrupted; to be its ``preexec_fn``.

    A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
