"""Stop requests that arrive as signals. A signal sets a flag on the rank that receives it.

The ranks exchange the flags between steps. The handlers are installed before torch is imported. The import takes
seconds, and a signal during these seconds would otherwise kill the process. Therefore this module imports only the
standard library at its top.
"""

from __future__ import annotations

import os
import signal
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Stopped(Exception):
    """Raised if a signal stops the run during set-up. The run then has nothing to save.

    The message names the signal.
    """


class StopSignals:
    """Context manager that turns SIGTERM, SIGUSR1, SIGUSR2 and SIGINT (Ctrl-C) into requests to stop at the next step.

    The handler only sets a flag, so it never interrupts a collective or a write. Further signals have no effect, except
    that a second Ctrl-C kills the process at once. If SIGINT is already ignored, as in background jobs of a shell, it
    stays ignored.

    When the block ends, the earlier handlers are restored. If the block ends because the process exits, the signals are
    ignored instead, so that a late SIGTERM from the launcher does not change the exit status.

    The context manager must be entered in the main thread. If it was never entered, no signal is ever reported.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the first signal received; 0 if there was none
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python, which Python cannot restore.
            signal.signal(number, signal.SIG_IGN if kind is SystemExit else handler or signal.SIG_DFL)

    def _note(self, number: int, frame: object) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(2, b"\nstopping at the next step; Ctrl-C again ends at once, without a checkpoint\n")

    def pending(self) -> bool:
        """Return whether this rank has received a signal."""
        return bool(self.received)

    def agreed(self, device: Any) -> str | None:
        """Return the name of a signal that any rank has received, or None if there is none yet. Collective.

        The result is the same on all ranks.
        """
        from moe_dist.parallel.agreement import largest  # imports torch

        number = largest(self.received, device)
        return signal.Signals(number).name if number else None

    def check(self, device: Any) -> None:
        """Raise Stopped on every rank if any rank has received a signal. Collective."""
        name = self.agreed(device)
        if name is not None:
            raise Stopped(name)
