"""A run goes on at any layout: the real model, data, loader and checkpoint of every kind of system, on 1, 2 and 4 ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moe_dist.config import Config, load_config
from moe_dist.data.loader import make_loader
from moe_dist.engine import checkpoint
from moe_dist.engine.fragments import set_optimizer_scalars
from moe_dist.engine.state import TrainState
from moe_dist.engine.storage import FragmentLoadPlanner
from moe_dist.engine.zero import init_distributed
from moe_dist.parallel.layout import make_layout
from moe_dist.telemetry.run_folder import RunFolder
from moe_dist.train import Run
from tests.distributed import run_ranks
from tests.engine.checkpoint_jobs import account
from tests.launching import MOMA

SAVE_AT, STEPS_AFTER, GROUPS = 2, 4, 4
ADAM = ("exp_avg", "exp_avg_sq")
LORA = "model.ffn.experts={type: lora, rank: 4, alpha: 8.0, dropout: 0.05}"
TOP_1 = "model.ffn.router={type: top_k, num_experts: 4, top_k: 1, bias: true, weighting: straight_through}"
SYSTEMS = {
    "moma": [],
    "top_k": ["model.ffn.router={type: top_k, num_experts: 4, top_k: 2}", "losses={load_balance: {weight: 0.01}}"],
    "null_experts": ["model.ffn.router={type: null_experts, num_experts: 4, num_null_experts: 4, top_k: 3}"],
    "lora_experts": [
        *[LORA, TOP_1, "model.attention_lora={rank: 4, alpha: 8, dropout: 0.05}"],
        *["trainable=['*.router.*', '*.lora.*']", "losses={pooled_balance: {weight: 0.01}}"],
    ],
    "router_only": [LORA, TOP_1, "trainable=['layers.1.ffn.router.*']"],
}


@dataclass(frozen=True)
class At:
    """A layout."""

    world: int
    expert: int
    stage: int

    def __str__(self) -> str:
        return f"{self.world} ranks, EP={self.expert}, ZeRO-{self.stage}"


LAYOUTS = [At(1, 1, 2), At(2, 1, 3), At(2, 2, 1), At(4, 1, 1), At(4, 2, 3), At(4, 4, 2)]
WORLDS = sorted({at.world for at in LAYOUTS})


@dataclass(frozen=True)
class Record:
    """What a rank saw: digests of all it held when it saved or loaded, and the losses of the steps after."""

    held: dict[str, str]
    losses: list[float]


def recipe(overrides: list[str], at: At, folder: Path, resume: Path | str = "none") -> Config:
    own = [f"run.dir={folder / str(at)}", f"run.resume={resume}", f"parallel.expert={at.expert}"]
    own += [f"deepspeed.zero_optimization.stage={at.stage}", "deepspeed.optimizer.params.lr=0.01"]
    own += [f"train.global_batch_groups={GROUPS}", f"train.micro_batch_groups={1 if at.stage == 1 else GROUPS // at.world}"]
    return load_config(MOMA, [*overrides, *own])


def start(config: Config) -> Run:
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    return Run.build(config, layout, RunFolder(Path(config.run.dir)))


def record(run: Run) -> Record:
    """Digests of every logical tensor in full and of the optimizer's step; then the next losses."""
    held = {name: digest(tensor) for name, tensor in account(run.engine, ADAM).items()}
    steps = {float(state["step"]) for state in run.engine.optimizer.optimizer.state.values()}
    assert len(steps) == 1
    held |= {"step": f"{run.engine.steps} {run.step} {run.tokens} {steps}"}
    return Record(held, [run.train_step()["loss"] for _ in range(STEPS_AFTER)])


def digest(tensor: Tensor) -> str:
    return f"{tensor.dtype} {hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()}"


def save_all(rank: int, overrides: list[str], layouts: list[At], folder: Path) -> list[Record]:
    """Train anew at each layout, and save."""
    records = []
    for at in layouts:
        run = start(recipe(overrides, at, folder))
        for _ in range(SAVE_AT):
            run.train_step()
        run.save()
        records.append(record(run))
    return records


def load_all(
    rank: int, overrides: list[str], layouts: list[At], paths: list[Path], folder: Path, plant: Callable | None = None
) -> list[list[Record]]:
    """Load every checkpoint at every layout: the first as a run does that starts, the others after it has trained."""
    if plant is not None:
        plant()
    records = []
    for number, at in enumerate(layouts):
        run, of_layout = None, {}
        for path in [*paths[number:], *paths[:number]]:
            run = start(recipe(overrides, at, folder, path)) if run is None else reload(run, path)
            of_layout[path] = record(run)
        records.append([of_layout[path] for path in paths])
    return records


def reload(run: Run, path: Path) -> Run:
    """The run as if it had started from this checkpoint."""
    state = TrainState.from_json(checkpoint.load(path, run.engine, run.layout))
    loader = make_loader(
        run.documents, run.vocabulary, run.config.data, seed=run.config.seed, dp_rank=run.layout.rank,
        dp=run.layout.world, batch_groups=run.config.train.micro_batch_groups, state=state.loader,
    )  # fmt: skip
    return replace(run, loader=loader, loader_state=state.loader, step=state.step, tokens=state.tokens)


def of_world(world: int) -> list[At]:
    return [at for at in LAYOUTS if at.world == world]


def unite(of_ranks: list[Record]) -> Record:
    """What all ranks hold together; they must agree where they hold the same."""
    held: dict[str, str] = {}
    for of_rank in of_ranks:
        assert of_rank.losses == of_ranks[0].losses
        for name, value in of_rank.held.items():
            assert held.setdefault(name, value) == value, f"ranks differ in {name}"
    return Record(held, of_ranks[0].losses)


def saved_at_every_layout(overrides: list[str], folder: Path) -> tuple[list[Path], list[Record]]:
    """Checkpoints and records in the order of LAYOUTS."""
    records: list[Record] = []
    for world in WORLDS:
        of_ranks = run_ranks(save_all, world, overrides, of_world(world), folder)
        records += [unite(list(of_layout)) for of_layout in zip(*of_ranks, strict=True)]
    return [folder / str(at) / "checkpoints" / f"step_{SAVE_AT:08d}" for at in LAYOUTS], records


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_ordered_pair_of_layouts(system, overrides, tmp_path):
    overrides = [*overrides, *SYSTEMS[system]]
    paths, sources = saved_at_every_layout(overrides, tmp_path)
    for source in sources:
        assert source.losses == pytest.approx(sources[0].losses, abs=1e-5)
        assert len(set(source.losses)) == STEPS_AFTER
    pairs = 0
    for world in WORLDS:
        of_ranks = run_ranks(load_all, world, overrides, of_world(world), paths, tmp_path)
        for at, *of_layout in zip(of_world(world), *of_ranks, strict=True):
            for origin, source, *of_pair in zip(LAYOUTS, sources, *of_layout, strict=True):
                target = unite(of_pair)
                assert target.held == source.held, f"{origin} -> {at}"
                assert target.losses == pytest.approx(source.losses, abs=1e-5), f"{origin} -> {at}"
                pairs += 1
    assert pairs == len(LAYOUTS) ** 2
