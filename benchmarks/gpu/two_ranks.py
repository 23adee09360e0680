"""launch/train.py on the tests' emoji: one rank, then two with EP=2 over NCCL, a stop by signal, a resume at EP=1.

With one card both ranks use it. Each gets its own NCCL_HOSTID, so that NCCL treats them as two hosts and communicates
through sockets. That tests correctness, never speed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gpu.check import Check, right_if
from gpu.findings import ROOT
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.parallel.discovery import free_port

SHARED_CARD = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
}
SMALL = [
    "data.sequence_length=128",
    "data.group_sequences=2",
    "data.lanes=4",
    "data.max_bad_fraction=0.1",  # captions that 128 tokens cut
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.ffn.hidden_size=64",
    "train.steps=8",
    "schedule.warmup_steps=2",
    "eval.every=4",
    "eval.groups=4",
    "checkpoint.every=4",
    "telemetry.tensorboard=false",
]
TOLERANCE = {"fp32": 2e-3, "bf16": 5e-2}  # nats, between ranks; the grouped kernel adds in another order than the loop


def run(check: Check) -> None:
    runs = Runs(check)
    runs.make_data()
    codes, _ = runs.train("one", 1, "parallel.expert=1")
    losses = runs.losses("one")
    check.note("one rank, fp32", right_if(codes == [0] and len(losses) == 8), codes=codes, losses=losses)
    if check.small:
        return  # ranks over gloo are covered by the tests
    for precision, stage in (("fp32", 1), ("bf16", 3)):
        what = f"two ranks, EP=2, ZeRO-{stage}, {precision}"
        check.attempt(what, lambda stage=stage, precision=precision: runs.compared(stage, precision, losses))
    check.attempt("stopped by a signal to one rank, resumed at EP=1", runs.stopped_and_resumed)


class Runs:
    def __init__(self, check: Check):
        self.check, self.folder = check, check.scratch / "two_ranks"
        self.cards = 0 if check.small else torch.cuda.device_count()

    def make_data(self) -> None:
        """Write shards and briefly trained tokenizers, in a process that does not use the card."""
        own = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        code = f"from tests.support.corpus import write_corpus; write_corpus({str(self.folder)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=own, check=True)

    def compared(self, stage: int, precision: str, wanted: list[float]) -> tuple[str, dict]:
        name = f"ep2_z{stage}_{precision}"
        bf16 = f"deepspeed.bf16={{enabled: {str(precision == 'bf16').lower()}}}"
        codes, _ = self.train(name, 2, "parallel.expert=2", f"deepspeed.zero_optimization.stage={stage}", bf16)
        losses = self.losses(name)
        close = len(losses) == len(wanted) == 8
        close = close and max(abs(a - b) for a, b in zip(losses, wanted)) < TOLERANCE[precision]
        return right_if(codes == [0, 0] and close), {"codes": codes, "losses": losses, "cards": self.cards}

    def stopped_and_resumed(self) -> tuple[str, dict]:
        long = "train.steps=400"
        _, status = self.train("stop", 2, "parallel.expert=2", long, interrupt=True)
        step = status.get("step", 0)
        codes, after = self.train("stop", 1, "parallel.expert=1", long, f"train.stop_after={step + 2}")
        good = status.get("state") == "stopped" and codes == [0] and after.get("step") == step + 2
        return right_if(good), {"stopped_at": step, "state": status.get("state"), "went_on_to": after.get("step")}

    def train(
        self, name: str, world: int, *overrides: str, interrupt: bool = False, limit: float = 75
    ) -> tuple[list[int], dict[str, Any]]:
        """Return the exit statuses of the ranks (-9: past the limit) and status.json. interrupt: send SIGUSR1 after a
        step.
        """
        port, folder = str(free_port()), RunFolder(self.folder / name)
        processes = [self._start(rank, world, port, folder, overrides) for rank in range(world)]
        end = time.monotonic() + limit
        while interrupt and time.monotonic() < end and all(process.poll() is None for process in processes):
            if len(self.losses(name)) >= 2:
                processes[-1].send_signal(signal.SIGUSR1)
                break
            time.sleep(0.1)
        for process in processes:
            try:
                process.wait(max(end - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._keep_logs(name, world)
        status = json.loads(folder.status.read_text()) if folder.status.exists() else {}
        return [process.returncode for process in processes], status

    def _start(self, rank: int, world: int, port: str, folder: RunFolder, overrides: tuple[str, ...]) -> Any:
        own = os.environ | {"OMP_NUM_THREADS": "2", "NCCL_DEBUG": "WARN"}
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if world > self.cards:
            own |= SHARED_CARD | {"NCCL_HOSTID": f"host{rank}"}
        tokenizers = self.folder / "tokenizers"
        data = [f"data.shards={self.folder / 'shards'}", f"data.text_tokenizer={tokenizers / 'text.model'}"]
        data += [f"data.image_tokenizer={tokenizers / 'vq'}", f"run.dir={folder.path}"]
        command = [sys.executable, "launch/train.py", "--config", "configs/moma_quickstart.yaml"]
        with self._log(folder.path.name, rank).open("w") as log:
            return subprocess.Popen([*command, *data, *SMALL, *overrides], env=own, cwd=ROOT, stdout=log, stderr=log)

    def _log(self, name: str, rank: int) -> Path:
        return self.check.scratch / f"{name}-rank{rank}.log"

    def _keep_logs(self, name: str, world: int) -> None:
        with (self.check.findings.folder / "ranks.log").open("a") as kept:
            for rank in range(world):
                text = self._log(name, rank).read_text(errors="replace")[-20000:]
                kept.write(f"===== {name}, rank {rank} of {world}\n{text}\n")

    def losses(self, name: str) -> list[float]:
        metrics = RunFolder(self.folder / name).metrics
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [round(json.loads(line)["loss"], 4) for line in lines if '"loss"' in line]
