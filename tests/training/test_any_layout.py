"""A run can resume in any layout of 1, 2 and 4 ranks, for every kind of system, with real model, data and checkpoint.

The loaded state is compared for every ordered pair of layouts. The next losses follow from it. For MoMa the losses of
four steps are compared for every pair; for other systems those of the first step, and all four by `make test-long`.
Only `make test-long` runs top_k, because lora_experts has the same router, and router_only, because test_checkpoint.py
also resumes a partly frozen model.

Losses are compared up to rounding. Adam with eps 1e-8 turns a gradient as small as a rounding error into a step as
large as lr, so eps is larger here. Selections follow those of the first layout, and logits are compared
(tests/support/selections.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.fragments import kind_of
from moe_dist.checkpoint.storage import Fragment
from moe_dist.checkpoint.train_state import TrainState
from moe_dist.config.recipe import Config, load_config
from moe_dist.core.errors import UserError
from moe_dist.data.stream.loader import Loader, make_loader
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.parallel.layout import make_layout
from moe_dist.training import setup
from moe_dist.training.deepspeed import init_distributed
from moe_dist.training.run import Run, train
from tests.support.checkpoint_jobs import account
from tests.support.distributed import run_ranks
from tests.support.launching import MOMA
from tests.support.long import LONG, REPEATED
from tests.support.selections import LOGITS, Selections, deviation, watching
from tests.support.selections import unite as unite_selections

SAVE_AT, STEPS_AFTER, GROUPS = 2, 4, 4
EPS = "deepspeed.optimizer.params.eps=1e-3"
ADAM = ("exp_avg", "exp_avg_sq")
LORA = "model.ffn.experts={type: lora, rank: 4, alpha: 8.0, dropout: 0.05}"
TOP_1 = "model.ffn.router={type: top_k, num_experts: 4, top_k: 1, bias: true, weighting: straight_through}"
SYSTEMS = {
    "moma": [],
    "top_k": ["model.ffn.router={type: top_k, num_experts: 4, top_k: 2}", "losses={load_balance: {weight: 0.01}}"],
    "null_experts": [
        "model.ffn.router={type: null_experts, num_experts: 4, num_null_experts: 4, top_k: 3}",
        "losses={load_balance: {weight: 0.01}}",
    ],
    "lora_experts": [
        *[LORA, TOP_1, "model.lora={rank: 4, alpha: 8, dropout: 0.05}"],
        *["trainable=['*.router.*', '*.lora.*']", "losses={pooled_balance: {weight: 0.01}}"],
    ],
    "router_only": [LORA, TOP_1, "trainable=['layers.1.ffn.router.*']"],
}


@dataclass(frozen=True)
class At:
    """A layout of ranks for a run."""

    world: int
    expert: int
    stage: int

    def __str__(self) -> str:
        return f"{self.world} ranks, EP={self.expert}, ZeRO-{self.stage}"


LAYOUTS = [At(1, 1, 2), At(2, 1, 3), At(2, 2, 1), At(4, 1, 1), At(4, 2, 3), At(4, 4, 2)]
WORLDS = sorted({at.world for at in LAYOUTS})


@dataclass(frozen=True)
class Record:
    """A rank's observations: digests of its state when it saved or loaded, then the losses and selections."""

    held: dict[str, str]
    losses: list[float]
    selections: Selections


def recipe(overrides: list[str], at: At, folder: Path, resume: Path | str = "none") -> Config:
    own = [f"run.dir={folder / str(at)}", f"run.resume={resume}", f"parallel.expert={at.expert}"]
    own += [f"deepspeed.zero_optimization.stage={at.stage}", "schedule.peak_lr=0.01"]
    micro = 1 if at.stage == 1 else GROUPS // at.world  # accumulated, or not
    own += [f"train.global_batch_groups={GROUPS}", f"train.micro_batch_groups={micro}"]
    return load_config(MOMA, [EPS, *overrides, *own])


def start(config: Config) -> Run:
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    return Run.build(config, layout, RunFolder(Path(config.run.dir)))


def take_steps(run: Run, steps: int, follow: Selections | None) -> tuple[list[float], Selections]:
    losses, selections = [], {}
    for _ in range(steps):
        with watching(follow) as watch:
            watch.step = run.step
            losses.append(run.train_step()["loss"])
        selections |= watch.seen
    return losses, selections


def record(run: Run, follow: Selections | None, steps: int = STEPS_AFTER, before: Selections | None = None) -> Record:
    """Record digests of every logical tensor and of the optimizer's step, then the losses of the next steps.

    before: selections of the steps until now, kept with those of the steps after.
    """
    held = {name: digest(tensor) for name, tensor in account(run.engine, ADAM).items()}
    counted = {float(state["step"]) for state in run.engine.optimizer.optimizer.state.values()}
    assert len(counted) == 1
    held |= {"step": f"{run.engine.steps} {run.step} {run.tokens} {counted}"}
    losses, selections = take_steps(run, steps, follow)
    return Record(held, losses, (before or {}) | selections)


def digest(tensor: Tensor) -> str:
    return f"{tensor.dtype} {hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()}"


def save_all(
    rank: int, overrides: list[str], layouts: list[At], folder: Path, follow: Selections | None
) -> list[Record]:
    """Train from scratch in each layout, and save. Training continues while the checkpoint is written."""
    records = []
    for at in layouts:
        run = start(recipe(overrides, at, folder))
        _, before = take_steps(run, SAVE_AT, follow)
        run.save()
        records.append(record(run, follow, before=before))
        run.saver.wait()
    return records


def load_all(
    rank: int,
    overrides: list[str],
    layouts: list[At],
    paths: list[Path],
    folder: Path,
    follow: Selections,
    steps: int,
) -> list[list[Record]]:
    """Load every checkpoint in every layout: the first into a new run, the others into a run that has trained.

    After the first, take as many steps as the source did; after the others, take `steps`.
    """
    records = []
    for number, at in enumerate(layouts):
        run, of_layout = None, {}
        for path in [*paths[number:], *paths[:number]]:
            if run is None:
                run = start(recipe(overrides, at, folder, path))
                of_layout[path] = record(run, follow)
            else:
                run = reload(run, path)
                of_layout[path] = record(run, follow, steps)
        records.append([of_layout[path] for path in paths])
    return records


def reload(run: Run, path: Path) -> Run:
    """Load a checkpoint into a run, as if the run had started from it."""
    state = TrainState.from_json(checkpoint.load(path, run.engine, run.layout))
    loader = make_loader(
        run.documents,
        run.vocabulary,
        run.config.data,
        seed=run.config.seed,
        dp_rank=run.layout.rank,
        dp=run.layout.world,
        batch_groups=run.config.train.micro_batch_groups,
        state=state.loader,
    )
    return replace(run, loader=loader, loader_state=state.loader, step=state.step, tokens=state.tokens)


def of_world(world: int) -> list[At]:
    return [at for at in LAYOUTS if at.world == world]


def unite(of_ranks: list[Record]) -> Record:
    """Merge the values of all ranks. Ranks that hold the same entry must agree on it."""
    held: dict[str, str] = {}
    for of_rank in of_ranks:
        assert of_rank.losses == of_ranks[0].losses
        for name, value in of_rank.held.items():
            assert held.setdefault(name, value) == value, f"ranks differ in {name}"
    return Record(held, of_ranks[0].losses, unite_selections(of_rank.selections for of_rank in of_ranks))


def saved_at_every_layout(overrides: list[str], folder: Path) -> tuple[list[Path], list[Record]]:
    """Checkpoints and records in the order of LAYOUTS. All layouts follow the selections of the first."""
    records: list[Record] = []
    for world in WORLDS:
        follow = records[0].selections if records else None
        of_ranks = run_ranks(save_all, world, overrides, of_world(world), folder, follow)
        records += [unite(list(of_layout)) for of_layout in zip(*of_ranks, strict=True)]
    return [folder / str(at) / "checkpoints" / f"step_{SAVE_AT:08d}" for at in LAYOUTS], records


@pytest.mark.slow
@pytest.mark.parametrize(
    "system", [pytest.param(system, marks=REPEATED if system in ("top_k", "router_only") else ()) for system in SYSTEMS]
)
def test_every_ordered_pair_of_layouts(system, overrides, tmp_path):
    overrides = [*overrides, *SYSTEMS[system]]
    paths, sources = saved_at_every_layout(overrides, tmp_path)
    follow = sources[0].selections
    for source in sources:
        assert source.losses == pytest.approx(sources[0].losses, abs=1e-5)
        assert len(source.selections) == len(follow) and deviation(source.selections, follow) < LOGITS
        assert len(set(source.losses)) == STEPS_AFTER
    pairs, steps = 0, STEPS_AFTER if system == "moma" or LONG else 1
    for world in WORLDS:
        of_ranks = run_ranks(load_all, world, overrides, of_world(world), paths, tmp_path, follow, steps)
        for at, *of_layout in zip(of_world(world), *of_ranks, strict=True):
            for origin, source, *of_pair in zip(LAYOUTS, sources, *of_layout, strict=True):
                target = unite(of_pair)
                assert target.held == source.held, f"{origin} -> {at}"
                compared = len(target.losses)
                assert target.losses == pytest.approx(source.losses[:compared], abs=1e-5), f"{origin} -> {at}"
                assert deviation(target.selections, follow) < LOGITS, f"{origin} -> {at}"
                assert compared >= steps
                pairs += 1
    assert pairs == len(LAYOUTS) ** 2


# --- planted faults: each must show, in what the run holds and in its losses


def read_others(change: Callable[[list[Fragment]], list[Fragment]]) -> Callable[[pytest.MonkeyPatch], None]:
    """Let checkpoints be read as if other fragments were wanted."""
    read = checkpoint.read_fragments
    return lambda patch: patch.setattr(
        checkpoint, "read_fragments", lambda path, metadata, wanted: read(path, metadata, change(wanted))
    )


def without(kind: str) -> Callable[[list[Fragment]], list[Fragment]]:
    return lambda wanted: [fragment for fragment in wanted if kind_of(fragment.name) != kind]


def swapped(wanted: list[Fragment]) -> list[Fragment]:
    """Swap the masters of experts 0 and 1 of the first layer."""
    other = {"[0]": "[1]", "[1]": "[0]"}
    return [
        replace(fragment, name=fragment.name[:-3] + other.get(fragment.name[-3:], fragment.name[-3:]))
        if fragment.name.startswith("master/layers.0.")
        else fragment
        for fragment in wanted
    ]


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], Any], str]] = {  # and what differs then
    "experts swapped": (read_others(swapped), "master layers.0"),
    "masters not loaded": (read_others(without("master")), "master "),
    "second moments not loaded": (read_others(without("exp_avg_sq")), "exp_avg_sq "),
    "frozen weights not loaded": (read_others(without("frozen")), "working "),
    "a stale step": (lambda patch: patch.setattr(checkpoint, "set_optimizer_scalars", lambda *_: None), "step"),
    "working weights not refreshed": (
        lambda patch: patch.setattr(checkpoint, "refresh_working_parameters", lambda *_: None),
        "working ",
    ),
    "data from the beginning": (lambda patch: patch.setattr(Loader, "restore", lambda *_: None), ""),
}


def load_with_faults(
    rank: int, overrides: list[str], at: At, path: Path, folder: Path, follow: Selections
) -> dict[str, Record]:
    """Load repeatedly into an engine with corrupted weights, first without a fault ("none")."""
    run = start(recipe(overrides, at, folder, path))
    records = {}
    for name, plant in {"none": lambda patch: None, **{name: plant for name, (plant, _) in FAULTS.items()}}.items():
        for parameter in run.engine.module.parameters():
            parameter.data.add_(0.1)
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            run = reload(run, path)
            records[name] = record(run, follow)
    return records


@pytest.mark.slow
def test_planted_faults_show(overrides, tmp_path):
    overrides = [*overrides, *SYSTEMS["lora_experts"], "train.reach_steps=0"]
    origin, at = At(2, 1, 2), At(2, 2, 1)
    source = unite([of_rank[0] for of_rank in run_ranks(save_all, 2, overrides, [origin], tmp_path, None)])
    path = tmp_path / str(origin) / "checkpoints" / f"step_{SAVE_AT:08d}"
    of_ranks = run_ranks(load_with_faults, 2, overrides, at, path, tmp_path, source.selections)
    found = {name: unite([of_rank[name] for of_rank in of_ranks]) for name in of_ranks[0]}
    assert found["none"].held == source.held
    assert found["none"].losses == pytest.approx(source.losses, abs=1e-5)
    assert deviation(found["none"].selections, source.selections) < LOGITS
    for name, (_, prefix) in FAULTS.items():
        differ = {key for key, value in source.held.items() if found[name].held[key] != value}
        assert {key for key in differ if key.startswith(prefix)} if prefix else not differ, (name, differ)
        assert found[name].losses != pytest.approx(source.losses, abs=1e-5), name


# --- what cannot be kept is an error


def refusals(rank: int, overrides: list[str], changes: list[list[str]]) -> list[str]:
    """Return the error sentence of each changed run on this rank."""
    sentences = []
    for change in changes:
        with pytest.raises(UserError) as caught:
            train(load_config(MOMA, [*overrides, *change]))
        sentences.append(str(caught.value))
    return sentences


REFUSED = [  # ranks, what changes, the sentence
    (2, ["data.lanes=8"], "cannot resume this checkpoint with another recipe: data.lanes was 4 and is now 8"),
    (2, ["train.global_batch_groups=8"], "train.global_batch_groups was 4 and is now 8"),
    (2, ["data.group_sequences=1"], "data.group_sequences was 2 and is now 1"),
    (2, ["data.sequence_length=64"], "data.sequence_length was 128 and is now 64"),
    (2, ["train.micro_batch_groups=4"], "train.global_batch_groups=4 is not a multiple of 8 (2 ranks times"),
    (2, ["train.micro_batch_groups=3"], "train.global_batch_groups=4 is not a multiple of 6 (2 ranks times"),
    (4, ["train.micro_batch_groups=2"], "train.global_batch_groups=4 is not a multiple of 8 (4 ranks times"),
    (3, ["parallel.expert=1"], "train.global_batch_groups=4 is not a multiple of 3 (3 ranks times"),
    (3, ["parallel.expert=1", "train.global_batch_groups=6"], "data.lanes=4 is not a multiple of the 3 data-parallel"),
    (3, ["parallel.expert=1", "train.global_batch_groups=6", "data.lanes=6"], "data.lanes was 4 and is now 6, train."),
]


def test_a_batch_or_lanes_that_cannot_be_kept(overrides, tmp_path):
    at = At(2, 2, 1)
    run_ranks(save_all, 2, overrides, [at], tmp_path, None)
    path = tmp_path / str(at) / "checkpoints" / f"step_{SAVE_AT:08d}"
    own = [*overrides, f"run.resume={path}", "parallel.expert=2", f"train.global_batch_groups={GROUPS}"]
    own += ["train.micro_batch_groups=1", "schedule.peak_lr=0.01", EPS]
    for world in sorted({world for world, *_ in REFUSED}):
        cases = [(change, sentence) for ranks, change, sentence in REFUSED if ranks == world]
        for told in run_ranks(refusals, world, own, [change for change, _ in cases]):
            for sentence, (change, expected) in zip(told, cases, strict=True):
                assert expected in sentence, change


def _loaders_device(rank, overrides, folder):
    with pytest.MonkeyPatch.context() as patch:
        given = {}
        patch.setattr(setup, "make_loader", lambda *_, **settings: given.update(settings))
        run = start(recipe(overrides, At(1, 1, 1), folder))
    return given["device"] is run.layout.device


def test_the_loader_knows_the_device_of_its_batches(overrides, tmp_path):
    """For a GPU the loader puts them in page-locked memory (tests/data/stream/test_loader.py)."""
    assert run_ranks(_loaders_device, 1, overrides, tmp_path) == [True]
