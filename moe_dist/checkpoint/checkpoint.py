"""Sharded checkpoints that any parallel layout can load. They are committed atomically and verified before use.

RUN/checkpoints/step_XXXXXXXX/
    rank_RRRRR.safetensors   the fragments that one rank writes (see fragments.py), without frozen weights
    index.json               logical tensors: dtype, shape, and the file of each piece
    state.json               state of the run, counters of the optimizer and the engine, layout of the writing run
    manifest.json            size and SHA-256 of the files above, and the digest of the store with the frozen weights
                             (see frozen_store.py), written last

A checkpoint is written to step_XXXXXXXX.tmp. This folder is renamed once all ranks' files are on disk. Nothing is
pickled. Loading the checkpoint of a different model raises UserError.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from moe_dist.checkpoint.fragment_files import dcp_errors, disk_errors, removed_on_error, write_fragments
from moe_dist.checkpoint.fragments import (
    FROZEN,
    MODEL_KINDS,
    fragments,
    kind_of,
    moment_names,
    optimizer_scalars,
    refresh_working_parameters,
    reset_optimizer,
    set_optimizer_scalars,
)
from moe_dist.checkpoint.frozen_store import keep_store
from moe_dist.checkpoint.manifest import (
    CHECKPOINT_FORMAT,
    STATE,
    checkpoint_path,
    frozen_digest,
    newest_complete,
    prune,
    read_state,
    resolve_resume,
    set_aside_later,
    verify_checkpoint,
    write_manifest,
)
from moe_dist.checkpoint.storage import Fragment, FragmentLoadPlanner, ShardReader, read_index
from moe_dist.checkpoint.train_state import merge_states
from moe_dist.core.errors import UserError
from moe_dist.core.files import PARTIAL, StoredFile, partial_path, put_in_place, read_json, write_json
from moe_dist.core.step import ShardedModel
from moe_dist.core.tensor_files import DTYPE_NAMES
from moe_dist.parallel.agreement import gather_objects, raise_on_all_ranks
from moe_dist.parallel.layout import Layout

__all__ = [
    "checkpoint_path",
    "load",
    "newest_complete",
    "prune",
    "read_state",
    "resolve_resume",
    "save",
    "set_aside_later",
    "verify_checkpoint",
]


def save(path: str | Path, engine: ShardedModel, layout: Layout, *, state: dict[str, Any]) -> None:
    """Write a checkpoint and wait until it is on disk. Collective: every rank calls it between two optimizer steps.

    This function is for tests and benchmarks. Training runs save through saver.py.
    state: must be JSON-serializable. Mappings in it (such as the loader's lanes) are merged across ranks. All other
    values must be equal on all ranks.
    If any rank cannot write (disk full, read-only), every rank raises the same UserError. Earlier checkpoints stay
    intact.
    """
    held, header = fragments(engine), describe(engine, layout, state)
    engine.frozen_store = write(path, held, header, layout, store=engine.frozen_store)


def describe(engine: ShardedModel, layout: Layout, state: dict[str, Any]) -> dict[str, Any]:
    """Return the content of state.json, with this rank's state. The function `write` merges all ranks' states.

    Later optimizer steps do not change the returned values, so a background thread can write them.
    """
    return {
        "format": CHECKPOINT_FORMAT,
        "state": state,
        "optimizer": optimizer_scalars(engine),
        "engine": {"steps": engine.steps, "skipped_steps": engine.skipped_steps},
        "written_by": {
            "world": layout.world,
            "expert": layout.expert,
            "zero_stage": engine.zero_stage,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
    }


def write(
    path: str | Path,
    held: list[Fragment],
    header: dict[str, Any],
    layout: Layout,
    group: dist.ProcessGroup | None = None,
    *,
    store: str | None = None,
) -> str | None:
    """Write this rank's fragments and commit the checkpoint. This is the second half of `save`.

    Collective over `group`, which must contain all ranks. The engine is not used, so a background thread may call this
    function. Such a thread needs its own process group.
    held: this rank's fragments. header: the content of state.json, as returned by `describe`. store: the digest of an
    existing store with the same frozen weights, if there is one.
    Returns the digest of the checkpoint's store of frozen weights, or None if no parameter is frozen.
    """
    path = Path(path)
    partial = partial_path(path)
    what = f"cannot write the checkpoint {path}"
    frozen = [fragment for fragment in held if kind_of(fragment.name) == FROZEN]
    changing = [fragment for fragment in held if kind_of(fragment.name) != FROZEN]
    states, have_frozen = zip(*gather_objects((header["state"], bool(frozen)), group))
    state = merge_states(states)
    digest = keep_store(path, frozen, store, layout, group, what) if any(have_frozen) else None
    with removed_on_error(partial, layout):
        files = write_fragments(partial, changing, layout, group, what)
        with disk_errors(what, group):
            if layout.is_main:
                commit(partial, path, files, header | {"state": state}, digest)
    return digest


def load(path: str | Path, engine: ShardedModel, layout: Layout) -> dict[str, Any]:
    """Verify a checkpoint, load it into the engine and return its state. Collective.

    The engine may have a different layout from the run that wrote the checkpoint. Master weights, moments, the
    optimizer's step, frozen parameters and buffers get exactly the stored values. The working parameters are
    recomputed from the master weights. Raises UserError on every rank if a file is damaged or the checkpoint is of a
    different model.
    """
    path = Path(path)
    metadata = open_index(path, layout)
    header = read_json(path / STATE)
    stored_moments = {kind_of(name) for name in metadata.state_dict_metadata} - set(MODEL_KINDS)
    reset_optimizer(engine, with_moments=bool(stored_moments))
    wanted = fragments(engine)
    _check_same_model(path, wanted, metadata)
    with raise_on_all_ranks():
        if moment_names(engine) != stored_moments:
            ours, theirs = sorted(moment_names(engine)), sorted(stored_moments)
            raise UserError(f"{path} holds the optimizer moments {theirs}, this run's optimizer keeps {ours}")
    read_fragments(path, metadata, wanted)
    set_optimizer_scalars(engine, header["optimizer"])
    refresh_working_parameters(engine)
    engine.steps, engine.skipped_steps = header["engine"]["steps"], header["engine"]["skipped_steps"]
    engine.frozen_store = frozen_digest(path)
    return header["state"]


def open_index(path: Path, layout: Layout) -> Metadata:
    """Verify a checkpoint and return its index. Collective: each rank verifies the checksums of its share of the files.

    Call this before anything else is read from the checkpoint. Raises UserError on every rank if a file is damaged.
    """
    with raise_on_all_ranks():
        verified = verify_checkpoint(path, share=layout.rank, shares=layout.world)
    return read_index(path, verified)  # only after every rank has found its share undamaged


def read_fragments(path: Path, metadata: Metadata, wanted: list[Fragment]) -> None:
    """Read a checkpoint's values into the `wanted` fragments, cast to each fragment's dtype. Collective."""
    with dcp_errors(f"cannot read the checkpoint {path}"):
        dcp.load({}, storage_reader=ShardReader(path, metadata), planner=FragmentLoadPlanner(wanted))


def commit(
    partial: Path, path: Path, files: Iterable[StoredFile], header: dict[str, Any], store: str | None = None
) -> None:
    """Complete the checkpoint folder `partial`, then rename it to `path`. The rename makes the checkpoint visible.

    files: the files already written to the folder. header: the content of state.json. store: the digest of the store
    with the frozen weights, or None if there are none.
    """
    seal(partial, files, header, store)
    replaced = path.with_name(f"{path.name}.replaced{PARTIAL}")
    if path.exists():  # this step was saved before, which does not happen in a run
        path.rename(replaced)
    put_in_place(partial, path)
    shutil.rmtree(replaced, ignore_errors=True)


def seal(partial: Path, files: Iterable[StoredFile], header: dict[str, Any], store: str | None = None) -> None:
    """Write the last two files of a checkpoint folder: state.json, then the manifest of all files.

    The arguments are those of `commit`.
    """
    write_manifest(partial, {*files, write_json(partial / STATE, header)}, store)


def _check_same_model(path: Path, wanted: list[Fragment], metadata: Metadata) -> None:
    """Raise UserError if the model's logical tensors, over all ranks, differ from the checkpoint's. Collective."""
    mine = {f.name: (f.shape, f.tensor.dtype) for f in wanted if kind_of(f.name) in MODEL_KINDS}
    model = {name: form for of_rank in gather_objects(mine) for name, form in of_rank.items()}
    stored = {
        name: (metadata.planner_data[name], entry.properties.dtype)  # type: ignore[union-attr]
        for name, entry in metadata.state_dict_metadata.items()
        if kind_of(name) in MODEL_KINDS
    }
    missing = [name for name in model if name not in stored]
    changed = [name for name in model if name in stored and stored[name] != model[name]]
    surplus = [name for name in stored if name not in model]
    if not (missing or changed or surplus):
        return
    if missing:
        first = f"it has no '{missing[0]}'"
    elif changed:
        first = f"its '{changed[0]}' is {_show(stored[changed[0]])}, the model's is {_show(model[changed[0]])}"
    else:
        first = f"the model has no '{surplus[0]}'"
    raise UserError(
        f"{path} is a checkpoint of another model: {first} (of the model's {len(model)} tensors "
        f"{len(missing)} are missing and {len(changed)} of another shape or type; {len(surplus)} are surplus)"
    )


def _show(form: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{DTYPE_NAMES[form[1]]}{list(form[0])}"
