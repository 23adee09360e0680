"""Waits until all ranks have connected to one address, before torch.distributed is initialised.

By itself, torch would wait for missing ranks inside one call, during which a process prints nothing and handles no
signal. The wait in this module reports which ranks are missing, and a signal stops it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from moe_dist.core.errors import PeerError
from moe_dist.parallel.discovery import Place
from moe_dist.parallel.mpi_start import REPEAT, SILENCE
from moe_dist.parallel.signals import Stopped, StopSignals

POLL = 0.05  # seconds between two looks for the other ranks
LAST_WAIT = 10.0  # seconds that a rank waits on after a signal: if the others come, all of them stop together
LIMIT = 1800.0  # seconds after which a rank gives up, as torch does
ANSWER = timedelta(seconds=60)  # time that rank 0 may take to answer a rank that has reached it


def meet(place: Place, stop: StopSignals) -> dist.Store | None:
    """Wait until all ranks have connected. Collective: every rank calls it after Place.export.

    Returns the store to which the ranks are connected, or None if there is only one rank. The caller must keep the
    store until torch.distributed is initialised, because torch.distributed reuses it.

    Raises Stopped if this rank receives a signal and the other ranks do not connect within the next LAST_WAIT seconds.
    Raises PeerError after LIMIT seconds of waiting.
    """
    if place.world == 1:
        return None
    wait = _Wait(place, stop)
    while True:
        store = _connect(wait)
        try:
            _gather(store, wait)
        except dist.DistError:
            if wait.hosts:
                raise
            # Rank 0 has gone. Another may come to its address.
            wait.pause(lambda: f"{place.world - 1} of {place.world} ranks at {wait.address}: the connection was lost")
            continue
        return store


@dataclass
class _Wait:
    """The state of one rank's wait for the others. The rank may try to connect several times."""

    place: Place
    stop: StopSignals
    began: float = field(default_factory=time.monotonic)
    reported: float | None = None  # time of the last report
    signalled: float | None = None  # time at which a signal was noticed

    @property
    def address(self) -> str:
        return f"{self.place.master_addr}:{self.place.master_port}"

    @property
    def hosts(self) -> bool:
        """True if the other ranks connect to this one. Under torchrun, all ranks connect to its agent instead."""
        return self.place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def pause(self, describe: Callable[[], str]) -> None:
        """Sleep for POLL seconds. If a report is due, print that this rank is waiting for describe().

        Raises Stopped if a signal came at least LAST_WAIT seconds ago, and PeerError after LIMIT seconds of waiting.
        """
        now = time.monotonic()
        if self.stop.pending():
            self._end_soon(now)
        if now - self.began > LIMIT:
            raise PeerError(f"the ranks have not met within {LIMIT:.0f} seconds: waiting for {describe()}")
        due = self.began + SILENCE if self.reported is None else self.reported + REPEAT
        if now >= due:
            self.reported = now
            self._print(f"waiting for {describe()}")
        time.sleep(POLL)

    def _end_soon(self, now: float) -> None:
        name = signal.Signals(self.stop.received).name
        if self.signalled is None:
            self.signalled = now
            self._print(f"{name}: stops in {LAST_WAIT:.0f} seconds if the other ranks do not come to {self.address}")
        if now - self.signalled >= LAST_WAIT:
            raise Stopped(name)

    def _print(self, text: str) -> None:
        print(f"rank {self.place.rank}: {text}", file=sys.stderr, flush=True)


def _connect(wait: _Wait) -> dist.Store:
    """Wait until the store can be reached, and return it.

    Rank 0 hosts the store. Under torchrun, torchrun's agent hosts it instead.
    """
    place, why = wait.place, ""

    def describe() -> str:
        return f"{place.world - 1} of {place.world} ranks at {wait.address}: nobody answers there ({why})"

    while True:
        try:
            if not wait.hosts:  # torch would try for minutes, without a look at signals
                socket.create_connection((place.master_addr, place.master_port), timeout=1.0).close()
            return dist.TCPStore(
                place.master_addr,
                place.master_port,
                place.world,
                is_master=wait.hosts,
                timeout=ANSWER,
                wait_for_workers=False,
                multi_tenant=True,  # torch.distributed, which asks for a store at this address, gets this one
            )
        except (OSError, dist.DistNetworkError) as error:
            if wait.hosts:
                raise
            why = getattr(error, "strerror", None) or "no answer"
        wait.pause(describe)


def _gather(store: dist.Store, wait: _Wait) -> None:
    """Put this rank's number into the store, and wait until all ranks have done so.

    Rank 0 waits for the numbers of all ranks. The other ranks wait for rank 0 to set the key `all`.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's agent keeps its store over restarts
    here, place = dist.PrefixStore(f"meeting {start}", store), wait.place
    mine, ranks = str(place.rank), [str(rank) for rank in range(place.world)]

    def describe() -> str:
        missing = [rank for rank in ranks if not here.check([rank])]
        listed = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        return f"{len(missing)} of {place.world} ranks at {wait.address} (missing: {listed})"

    here.set(mine, "")
    while not here.check(ranks if place.rank == 0 else ["all"]):
        try:
            wait.pause(describe)
        except Stopped:
            here.delete_key(mine)
            raise
    if place.rank == 0:
        here.set("all", "")
