"""The meeting of real ranks: the wait for missing ones is reported, and signals end it."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from moe_dist.core.errors import PeerError
from moe_dist.parallel import meeting
from moe_dist.parallel.discovery import Place, free_port
from moe_dist.parallel.signals import STOP_SIGNALS, Stopped, StopSignals
from tests.support.distributed import FORK_SERVER

STOPPED, GAVE_UP = 7, 8


def _place(rank, world, port):
    return Place(
        rank=rank, world=world, local_rank=rank, master_addr="127.0.0.1", master_port=port, launcher="environment"
    )


def _rank(rank, world, port, grace, limit, path):
    """Meet the other ranks; then the sum over all ranks shows that torch.distributed is initialised with them."""
    sys.stderr = path.open("w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    meeting.SILENCE, meeting.LAST_WAIT, meeting.LIMIT = 0.5, grace, limit
    place = _place(rank, world, port)
    place.export()
    with StopSignals() as stop:
        try:
            store = meeting.meet(place, stop)
        except (Stopped, PeerError) as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(STOPPED if isinstance(error, Stopped) else GAVE_UP)
        dist.init_process_group("gloo")
        del store
        total = torch.tensor(1)
        dist.all_reduce(total)
        assert int(total) == world
        dist.destroy_process_group()
    sys.stderr.flush()


class Started:
    """A rank in a process of its own."""

    def __init__(self, folder, rank, port, *, world=2, grace=0.5, limit=120.0):
        self.path = folder / f"{rank}-{len(list(folder.iterdir()))}.txt"
        self.path.touch()
        self.process = FORK_SERVER.Process(target=_rank, args=(rank, world, port, grace, limit, self.path), daemon=True)
        self.process.start()

    def prints(self, text):
        end = time.monotonic() + 60
        while text not in self.path.read_text():
            assert time.monotonic() < end and self.process.is_alive(), self.path.read_text()
            time.sleep(0.02)

    def signal(self, number):
        os.kill(self.process.pid, number)

    def ended(self):
        self.process.join(60)
        code = self.process.exitcode
        self.process.kill()
        return code, self.path.read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_says_for_whom_and_ends_by_a_signal(rank, tmp_path):
    ports = [free_port() for _ in STOP_SIGNALS]
    ranks = [Started(tmp_path, rank, port) for port in ports]
    for port, number, started in zip(ports, STOP_SIGNALS, ranks, strict=True):
        reason = " (missing: 1)" if rank == 0 else ": nobody answers there (Connection refused)"
        started.prints(f"rank {rank}: waiting for 1 of 2 ranks at 127.0.0.1:{port}{reason}\n")
        started.signal(number)
    for number, started in zip(STOP_SIGNALS, ranks, strict=True):
        code, printed = started.ended()
        assert code == STOPPED and printed.endswith(f"Stopped('{number.name}')\n"), printed


def test_a_rank_that_is_reached_waits_for_the_third(tmp_path):
    """Rank 1 has met rank 0, and says so when a signal ends its wait; rank 0 then misses it again."""
    port = free_port()
    host, other = (Started(tmp_path, rank, port, world=3) for rank in (0, 1))
    other.prints(f"rank 1: waiting for 1 of 3 ranks at 127.0.0.1:{port} (missing: 2)\n")
    other.signal(signal.SIGTERM)
    assert other.ended()[0] == STOPPED
    late = Started(tmp_path, 2, port, world=3)
    late.prints(f"rank 2: waiting for 1 of 3 ranks at 127.0.0.1:{port} (missing: 1)\n")
    again = Started(tmp_path, 1, port, world=3)
    assert [each.ended()[0] for each in (host, late, again)] == [0, 0, 0]


def test_ranks_that_come_after_a_signal_are_met(tmp_path):
    """One rank alone does not leave the others behind: they stop together once they have met."""
    port = free_port()
    first = Started(tmp_path, 0, port, grace=60.0)
    first.prints("waiting for 1 of 2 ranks")
    first.signal(signal.SIGUSR1)
    first.prints("rank 0: SIGUSR1: stops in 60 seconds if the other ranks do not come to")
    assert Started(tmp_path, 1, port).ended()[0] == first.ended()[0] == 0


def test_another_rank_0_may_come_to_the_address(tmp_path):
    port = free_port()
    host, other = Started(tmp_path, 0, port, world=3), Started(tmp_path, 1, port, world=3)
    other.prints("waiting for 1 of 3 ranks")
    host.signal(signal.SIGKILL)
    assert host.ended()[0] == -signal.SIGKILL
    ranks = [other, Started(tmp_path, 0, port, world=3), Started(tmp_path, 2, port, world=3)]
    assert [started.ended()[0] for started in ranks] == [0, 0, 0]


def test_the_wait_has_a_limit(tmp_path):
    code, printed = Started(tmp_path, 0, free_port(), limit=1.0).ended()
    assert code == GAVE_UP
    assert "the ranks have not met within 1 seconds: waiting for 1 of 2 ranks at 127.0.0.1:" in printed


def test_one_rank_meets_nobody():
    assert meeting.meet(_place(0, 1, 0), StopSignals()) is None
