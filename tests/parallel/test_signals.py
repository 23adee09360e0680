"""A signal sets a flag and nothing else; ranks that were told different things agree on one."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from moe_dist.parallel.signals import STOP_SIGNALS, Stopped, StopSignals
from tests.support.distributed import run_ranks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_the_foreground():
    """A shell that starts the tests in the background has them ignore Ctrl-C, and their children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def handlers():
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_the_handlers_of_before_are_put_back(number):
    before = handlers()
    with StopSignals() as stop:
        assert not stop.pending() and stop.agreed(CPU) is None
        signal.raise_signal(number)
        assert stop.pending() and stop.agreed(CPU) == number.name
        with pytest.raises(Stopped, match=number.name):
            stop.check(CPU)
    assert handlers() == before


def test_the_first_signal_counts_and_more_change_nothing():
    with StopSignals() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        assert stop.agreed(CPU) == "SIGUSR1"


def test_one_that_is_not_entered_touches_nothing():
    before = handlers()
    stop = StopSignals()
    stop.check(CPU)
    assert handlers() == before


SCRIPT = """
import os, signal, sys
from moe_dist.parallel.signals import StopSignals
assert "torch" not in sys.modules
with StopSignals() as stop:
    {body}
"""


def run_script(body, **settings):
    return subprocess.run([sys.executable, "-c", SCRIPT.format(body=body)], capture_output=True, text=True, **settings)


def test_a_second_ctrl_c_ends_the_process_at_once():
    done = run_script("signal.raise_signal(2); print('still here', flush=True); signal.raise_signal(2); print('no')")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "still here\n")
    assert "Ctrl-C again" in done.stderr


def test_ctrl_c_stays_ignored_in_the_background():
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    done = run_script("signal.raise_signal(2); signal.raise_signal(2); print(stop.pending())", **ignoring)
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_a_late_signal_does_not_change_the_exit_status():
    late = "import atexit; atexit.register(signal.raise_signal, 15); sys.exit(0)"
    assert run_script(late).returncode == 0
    assert run_script(late.replace("sys.exit(0)", "pass")).returncode == -signal.SIGTERM  # it would have


def _agree(rank, told):
    with StopSignals() as stop:
        for number in told[rank]:
            os.kill(os.getpid(), number)
        names = [stop.agreed(CPU)]
        try:
            stop.check(CPU)
        except Stopped as error:
            names.append(str(error))
    return names


@pytest.mark.parametrize(
    ("told", "name"),
    [(((), (signal.SIGUSR1,)), "SIGUSR1"), (((signal.SIGTERM, signal.SIGUSR2), (signal.SIGUSR1,)), "SIGTERM")],
    ids=["one rank", "both"],
)
def test_the_ranks_agree(told, name):
    assert run_ranks(_agree, 2, told) == [[name, name]] * 2
    assert run_ranks(_agree, 2, ((), ())) == [[None]] * 2
