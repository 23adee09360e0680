"""Runs whose ranks are killed (kill -9) at chosen places inside functions of the real code.

A place is the n-th profiling event (a Python or C function is called or returns) within the k-th call of a function. An
undisturbed run counts all places, so that one can be drawn at random. The last act of the dying rank is to write the
place of its death to logs/trace.json, next to the run folder.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from moe_dist.checkpoint.checkpoint import checkpoint_path, read_state, verify_checkpoint
from moe_dist.config.recipe import load_config
from moe_dist.metrics.run_folder import read_status
from moe_dist.parallel.discovery import free_port, run_rank
from moe_dist.training.run import train
from tests.support import ROOT
from tests.support.distributed import FORK_SERVER
from tests.support.launching import MOMA

PATIENCE = 120.0  # seconds after which a rank counts as hanging
WINDOWS = {  # functions to die in, as the code looks them up
    "save": "moe_dist.checkpoint.saver:Saver.save",  # in the training thread
    "write": "moe_dist.checkpoint.saver:write",  # these in the writer's, if saves are asynchronous
    "tensors": "moe_dist.checkpoint.storage:write_safetensors",
    "index": "moe_dist.checkpoint.storage:ShardWriter.finish",
    "commit": "moe_dist.checkpoint.checkpoint:commit",
    "place": "moe_dist.checkpoint.checkpoint:put_in_place",  # just before a checkpoint becomes visible, and just after
    "prune": "moe_dist.checkpoint.saver:prune",
    "step": "moe_dist.training.deepspeed:Engine.train_step",
    "backward": "moe_dist.training.deepspeed:_ZeroEngine.backward",
    "optimizer": "moe_dist.training.deepspeed:_ZeroEngine.step",
    "exchange": "moe_dist.parallel.collectives:_exchange",
    "metrics": "moe_dist.metrics.sinks:Sinks.log",
}
STEPS, EVERY, GROUPS = 6, 2, 4  # steps of a run; steps between checkpoints; selection groups of a step
Counts = list[dict[str, list[int]]]  # [rank][window][call]: events inside


@dataclass(frozen=True)
class How:
    """Layout of a run and its way of saving."""

    stage: int
    asynchronous: bool

    def __str__(self) -> str:
        return f"stage_{self.stage}-{'a' if self.asynchronous else ''}synchronous"


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody kills."""

    how: How
    overrides: list[str]
    run_dir: Path  # keeps every checkpoint
    counts: Counts  # with checkpoint.keep=1


@dataclass(frozen=True)
class Kill:
    """A kill of rank `rank` at the event-th event inside the call-th call (from 0) of a window's function."""

    rank: int
    window: str
    call: int
    event: int

    @classmethod
    def draw(cls, seed: int, window: str, counts: Counts) -> Kill:
        """Draw one of all places inside a window, seeded. Places at the very end are excluded, because counts may
        differ a little.
        """
        chance = random.Random(f"{window} {seed}")
        rank = chance.choice([rank for rank, of_rank in enumerate(counts) if of_rank[window]])
        call = chance.randrange(len(counts[rank][window]))
        return cls(rank, window, call, chance.randint(1, int(0.95 * counts[rank][window][call])))


@dataclass(frozen=True)
class Trace:
    """The place where a rank died."""

    stack: list[str]  # functions of its thread, the innermost first
    inside: bool  # whether the window's function was among them


def run_ranks_of_train(
    overrides: Sequence[str],
    run_dir: Path,
    *,
    world: int = 2,
    kill: Kill | None = None,
    largest_file: int | None = None,
) -> tuple[list[int], list[str]]:
    """Train as launch/train.py does, in fresh processes. Return exit codes (-9: killed) and output by rank.

    Nobody ends the ranks that outlive another rank. If one still runs after PATIENCE, that is an AssertionError.
    largest_file: the size in bytes that files of the ranks must not exceed.
    """
    logs = run_dir.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    own = (world, free_port(), [*overrides, f"run.dir={run_dir}"], logs, kill, largest_file)
    ranks = [FORK_SERVER.Process(target=_rank, args=(rank, *own)) for rank in range(world)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + PATIENCE
    try:
        for process in ranks:
            process.join(max(deadline - time.monotonic(), 0))
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    printed = [(logs / f"rank_{rank}.log").read_text() for rank in range(world)]
    hanging = [rank for rank, code in enumerate(codes) if code is None]
    assert not hanging, f"ranks {hanging} hang:\n" + "\n".join(printed)
    return codes, printed


def counts_of(run_dir: Path, world: int = 2) -> Counts:
    """Return the counts of an undisturbed run."""
    return [json.loads((run_dir.parent / "logs" / f"counts_{rank}.json").read_text()) for rank in range(world)]


def trace_of(run_dir: Path) -> Trace:
    return Trace(**json.loads((run_dir.parent / "logs" / "trace.json").read_text()))


def same(run_dir: Path, reference: Path) -> None:
    """Assert that the runs ended with the same bits and had the same losses."""
    last = [checkpoint_path(folder, STEPS) for folder in (run_dir, reference)]
    verify_checkpoint(last[0])
    assert stored(last[0]) == stored(last[1])
    states: list[dict[str, Any]] = [read_state(path) for path in last]
    assert all(states[0][key] == states[1][key] for key in ("step", "tokens", "loader"))
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run_dir, reference)
    ]
    losses = [[(line["step"], line["loss"], line["grad_norm"]) for line in of_run] for of_run in lines]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert read_status(run_dir)["state"] == "done"


def stored(checkpoint: Path) -> dict[str, str]:
    """Return name and checksum of every tensor file."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def _rank(
    rank: int, world: int, port: int, overrides: list[str], logs: Path, kill: Kill | None, largest_file: int | None
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world)
    )
    torch.set_num_threads(1)
    with (logs / f"rank_{rank}.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    counts: dict[str, list[int]] = {}
    for window, where in WINDOWS.items():
        if kill is None or (kill.rank, kill.window) == (rank, window):
            _watch(where, counts.setdefault(window, []), kill, logs / "trace.json")

    def main() -> None:
        train(load_config(ROOT / MOMA, overrides))
        (logs / f"counts_{rank}.json").write_text(json.dumps(counts))

    run_rank(main)


def _watch(where: str, events: list[int], kill: Kill | None, trace: Path) -> None:
    """Wrap a function: count the events inside each call, and end the process at the event of `kill`."""
    module, _, path = where.partition(":")
    *parents, name = path.split(".")
    owner: Any = import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        call = len(events)
        events.append(0)
        outer = sys.getprofile()

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            events[call] += 1
            if kill is not None and (kill.call, kill.event) == (call, events[call]):
                _die(frame, function, trace)
            if outer is not None:
                outer(frame, event, argument)

        sys.setprofile(profile)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(outer)

    setattr(owner, name, watched)


def _die(frame: FrameType | None, function: Any, trace: Path) -> None:
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    last_words = Trace([frame.f_code.co_qualname for frame in frames], function.__code__ in [f.f_code for f in frames])
    with trace.open("w") as stream:
        json.dump(asdict(last_words), stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.kill(os.getpid(), signal.SIGKILL)
