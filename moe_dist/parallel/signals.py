"""Told to stop: a signal sets a flag on the rank that gets it, and between two steps the ranks agree whether one did.

Needs the standard library alone until the ranks have met: the handlers are in place before torch is imported, which
takes seconds that a signal would otherwise end.
"""

from __future__ import annotations

import os
import signal
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Stopped(Exception):
    """Every rank was told to stop while the run was set up: nothing to save. The message is the signal's name."""


class StopSignals:
    """Context manager: inside it SIGTERM, SIGUSR1, SIGUSR2 and SIGINT (Ctrl-C) are requests to stop at the next step.

    A handler only sets a flag, so nothing is cut short, no collective and no write; more signals change nothing, but
    for a second Ctrl-C, which ends the process at once, as if killed. SIGINT stays ignored where a shell has it so
    (jobs in the background). The earlier handlers are put back at the end, unless the process is on its way out: then
    the signals are ignored, since a launcher's late SIGTERM must not turn exit status 0 into another.
    One that is not entered has never anything to tell. For the main thread.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the first signal; 0: none
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_IGN if kind is SystemExit else handler or signal.SIG_DFL)

    def _note(self, number: int, frame: object) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(2, b"\nstopping at the next step; Ctrl-C again ends at once, without a checkpoint\n")

    def pending(self) -> bool:
        """Whether this rank has been told to stop."""
        return bool(self.received)

    def agreed(self, device: Any) -> str | None:
        """The name of a signal that any rank has got, the same on every rank; None if none has. Collective."""
        from moe_dist.parallel.agreement import largest  # imports torch

        number = largest(self.received, device)
        return signal.Signals(number).name if number else None

    def check(self, device: Any) -> None:
        """Raise Stopped on every rank where any rank has been told to stop. Collective."""
        name = self.agreed(device)
        if name is not None:
            raise Stopped(name)
