"""The start of MPI, which waits for all ranks that mpiexec starts.

While this process waits, none of its Python code runs, neither threads nor signal handlers. Therefore another process
reports the wait. During the wait, stop signals have their default effect: they end the process. There is one exception:
MPICH handles SIGUSR1 itself, so this signal has no effect under MPICH. After the wait, the earlier handlers are
restored.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from moe_dist.core.errors import UserError
from moe_dist.parallel.signals import STOP_SIGNALS

SILENCE = 3.0  # seconds before a wait for other ranks is reported, and
REPEAT = 60.0  # between two reports

# Arguments: seconds before the first report and between two reports, and the text. Ends when its input ends, which is
# when the wait or the waiting process ends.
_REPORTER = """
import select, signal, sys
for number in map(int, sys.argv[4:]):
    signal.signal(number, signal.SIG_IGN)
seconds, repeat, text = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
while not select.select([sys.stdin], [], [], seconds)[0]:
    print(text, file=sys.stderr, flush=True)
    seconds = repeat
"""


def start_mpi(rank: str) -> ModuleType:
    """Initialise MPI and return mpi4py's module. Collective.

    rank: this rank's number, which is printed if the wait for the other ranks takes long. Raises UserError if there is
    no MPI library.
    """
    try:
        with _reported(f"rank {rank}: waiting in MPI_Init for the other ranks of mpiexec"), _default_signals():
            from mpi4py import MPI  # initialises MPI: only under an MPI launcher
    except (ImportError, RuntimeError):  # RuntimeError: mpi4py is installed, an MPI library is not
        raise UserError(
            "mpi4py finds no MPI library: pip install 'moe_dist[mpi]' for MPICH, or load the MPI that mpiexec is from"
        ) from None
    return MPI


@contextmanager
def _reported(text: str) -> Iterator[None]:
    """Print `text` after SILENCE seconds, and then every REPEAT seconds, while the block runs."""
    numbers = [str(int(number)) for number in STOP_SIGNALS]
    command = [sys.executable, "-I", "-S", "-c", _REPORTER, str(SILENCE), str(REPEAT), text, *numbers]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as reporter:
        assert reporter.stdin is not None
        try:
            yield
        finally:
            reporter.stdin.close()


@contextmanager
def _default_signals() -> Iterator[None]:
    """Let stop signals end this process while the block runs. Signals that are ignored stay ignored."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
