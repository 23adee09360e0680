"""Management of the checkpoints in a run folder: finding, verifying and removing them, and selecting one to start from.

A manifest lists every file of a checkpoint with the file's size and SHA-256. The manifest is written last. The
folder step_XXXXXXXX.tmp is then renamed to step_XXXXXXXX, so a renamed folder was complete. If one of its files is
missing or truncated, the checkpoint was damaged later, and the user must decide whether to continue without it.

Frozen weights are in a store of their own (frozen_store.py), and the checkpoint's manifest holds the store's digest,
which is the SHA-256 of the store's manifest. The store's files are verified like the checkpoint's own files. Only
checkpoints of format 1 contain their frozen weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from moe_dist.config.recipe import Config, InitFrom
from moe_dist.core.errors import UserError
from moe_dist.core.files import PARTIAL, StoredFile, partial_path, read_json, write_json
from moe_dist.parallel.agreement import raise_on_all_ranks

Answer = TypeVar("Answer")

CHECKPOINT_FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
STORES = "frozen"  # the folder of the frozen stores, next to the checkpoints
Entries = dict[str, dict[str, Any]]  # by file: its size ("bytes") and checksum ("sha256")
ASIDE = ".aside"  # suffix of a checkpoint later than the step a run has started from


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the optimizer step at which a checkpoint was saved. The step is read from the folder's name."""
    return int(path.name.removeprefix("step_"))


def store_path(checkpoint: Path, digest: str) -> Path:
    """Return the path of the frozen store with this digest that belongs to a checkpoint."""
    return checkpoint.resolve().parent / STORES / digest


def write_manifest(folder: Path, files: Iterable[StoredFile], store: str | None = None) -> StoredFile:
    """Write the manifest of a checkpoint or frozen store. Return the manifest's own size and SHA-256.

    store: the digest of the checkpoint's frozen store, or None if it has none.
    """
    entries = {file.name: {"bytes": file.size, "sha256": file.sha256} for file in files}
    content = {"format": CHECKPOINT_FORMAT, "files": dict(sorted(entries.items())), "frozen": store}
    return write_json(folder / MANIFEST, content)


def verify_checkpoint(
    path: str | Path, *, share: int = 0, shares: int = 1, known: Set[str] = frozenset()
) -> dict[str, int]:
    """Check the sizes of all files of a checkpoint and its frozen store, and the checksums of one share of the files.

    The files are divided into `shares` shares, numbered from 0. Only the checksums of share number `share` are checked.
    By default, there is one share. The checksums of the files in `known` are never checked.
    Returns the size of each file in bytes, keyed by its path relative to the checkpoint. storage.read_index needs these
    sizes. Raises UserError if a file is missing or damaged. The message names the file.
    """
    path = Path(path)
    files = _manifest(path)
    for name in sorted(files.keys() - known)[share::shares]:
        _verify_checksum(path, name, files)
    return {name: entry["bytes"] for name, entry in files.items()}


def frozen_digest(path: str | Path) -> str | None:
    """Return the digest of a checkpoint's frozen store, or None if the checkpoint has no store.

    Raises UserError if the manifest is damaged, or if a file of the checkpoint is missing or truncated.
    """
    return _parsed(Path(path), STATE)[1]


def read_state(path: str | Path) -> dict[str, Any]:
    """Return the run's state, read from a checkpoint. This is possible before the model is built.

    Raises UserError if the state or the manifest is damaged, or if a file of the checkpoint is missing or truncated.
    """
    path = Path(path)
    _verify_checksum(path, STATE, _manifest(path))
    return read_json(path / STATE)["state"]


def identity(path: str | Path) -> str:
    """Return a digest that identifies a checkpoint or store: the SHA-256 of its manifest, which holds all checksums."""
    return hashlib.sha256((Path(path) / MANIFEST).read_bytes()).hexdigest()


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Return a run's checkpoints, oldest first, including damaged ones but not unfinished saves (.tmp)."""
    folder = Path(run_dir) / "checkpoints"
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)), key=step_of)


def newest_complete(run_dir: str | Path) -> Path | None:
    """Return a run's newest checkpoint, or None if the run has none.

    Unfinished saves (.tmp) are skipped. Raises UserError if files of the newest checkpoint are missing or truncated.
    Older checkpoints are not tried in this case.
    """
    path = next(reversed(checkpoints(run_dir)), None)
    if path is not None:
        try:
            _parsed(path, STATE)
        except UserError as error:
            raise UserError(f"{error}; {_remedy(path)}") from None
        _manifest(path)
    return path


def require_checkpoint(run_dir: str | Path) -> Path:
    """Return a run's newest checkpoint. Raises UserError if the run has none, or if the newest one is damaged."""
    path = newest_complete(run_dir)
    if path is None:
        raise UserError(f"{run_dir} holds no complete checkpoint")
    return path


def prune(run_dir: str | Path, keep: int, keep_every: int = 0) -> None:
    """Remove old checkpoints and the leftovers of interrupted saves. Only one rank may call this function.

    The newest `keep` complete checkpoints are kept. If `keep_every` is not 0, checkpoints whose step is a multiple of
    it are kept, too. Damaged checkpoints are kept for inspection. Frozen stores that no checkpoint refers to are
    removed, unless there is a damaged checkpoint. Errors are ignored: a checkpoint that cannot be removed stays.
    """
    complete = [path for path in checkpoints(run_dir) if is_complete(path)]
    for path in complete[:-keep]:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        with suppress(OSError):
            path.rename(partial_path(path))  # so that a half-removed one never looks complete
    for path in (Path(run_dir) / "checkpoints").glob(f"step_*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(UserError):
        _prune_stores(Path(run_dir) / "checkpoints")


def _prune_stores(folder: Path) -> None:
    """Remove the frozen stores that no checkpoint refers to. Raises UserError if a checkpoint is damaged."""
    used = {frozen_digest(path) for path in folder.glob("step_*")}
    for store in (folder / STORES).glob("*"):
        if store.name not in used:
            shutil.rmtree(store, ignore_errors=True)


def set_aside_later(run_dir: str | Path, step: int) -> list[Path]:
    """Rename the checkpoints that are later than `step`, the step at which a run starts. Return their former paths.

    These checkpoints are from an earlier run in the same folder. If they kept their names, pruning and the next start
    would treat them as the newest checkpoints of the new run. Only one rank may call this function.
    """
    later = [path for path in checkpoints(run_dir) if step_of(path) > step]
    for path in later:
        aside = path.with_name(path.name + ASIDE)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return later


def resolve_resume(config: Config) -> Path | None:
    """Return the checkpoint that `run.resume` (auto | none | a folder) selects, or None to start fresh.

    Collective: rank 0 decides for all ranks. Raises UserError if the selected checkpoint is missing or damaged.
    """
    return _on_rank_0(lambda: _resolve_resume(config))


def resolve_init(config: Config) -> InitFrom | None:
    """Return the recipe's `init_from`, or None if it is not set.

    If `init_from` names a run folder, this folder is replaced by the path of the run's newest checkpoint.
    Collective: rank 0 decides for all ranks. Raises UserError if the checkpoint is missing or damaged.
    """
    return _on_rank_0(lambda: config.init_from and _resolve_init(config.init_from))


def _on_rank_0(decide: Callable[[], Answer]) -> Answer:
    answer: list[Any] = [None]
    with raise_on_all_ranks():
        if not dist.is_initialized() or dist.get_rank() == 0:
            answer = [decide()]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _resolve_init(settings: InitFrom) -> InitFrom:
    path = _named_checkpoint("init_from.checkpoint", settings.checkpoint)
    return settings.model_copy(update={"checkpoint": str(path)})


def _resolve_resume(config: Config) -> Path | None:
    if config.run.resume == "none":
        return None
    if config.run.resume == "auto":
        return newest_complete(config.run.dir)
    return _named_checkpoint("run.resume", config.run.resume)


def _named_checkpoint(key: str, folder: str) -> Path:
    """Return the checkpoint that a recipe's key names. If `folder` is a run folder, this is its newest checkpoint.

    key: the name of the key, for the error message. folder: the value of the key. Raises UserError if there is no
    complete checkpoint.
    """
    path = newest_complete(folder) or Path(folder)
    try:
        _manifest(path)
    except UserError as error:
        raise UserError(f"{key}={path} is neither a complete checkpoint nor a run folder with one: {error}") from None
    return path


_STORE_REMEDY = "restore it: the checkpoints of this run cannot be read without their frozen weights"


def _remedy(path: Path) -> str:
    return f"restore it, or move {path} away to continue from the checkpoint before it"


def is_complete(path: Path) -> bool:
    """Return True if a checkpoint or frozen store exists, and no file of it is missing or truncated."""
    with suppress(UserError):
        return bool(_store(path) if path.parent.name == STORES else _manifest(path))
    return False


def _verify_checksum(path: Path, name: str, files: Entries) -> None:
    with (path / name).open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != files[name]["sha256"]:
            is_own = "/" not in name
            file, remedy = (path / name, _remedy(path)) if is_own else ((path / name).resolve(), _STORE_REMEDY)
            raise UserError(f"{file} is damaged: its checksum differs from the one in {MANIFEST}; {remedy}")


def _manifest(path: Path) -> Entries:
    """Read the entries of all files of a checkpoint and of its frozen store, keyed by path relative to the checkpoint.

    Raises UserError naming a file that is missing or has the wrong size.
    """
    files, digest = _parsed(path, STATE)
    if digest is None:
        return files
    return files | {f"../{STORES}/{digest}/{name}": entry for name, entry in _store(store_path(path, digest)).items()}


def _store(store: Path) -> Entries:
    """Read the entries of a frozen store's manifest.

    Raises UserError if the manifest does not match the store's name, or a file is missing or has the wrong size.
    """
    try:
        if identity(store) != store.name:
            raise UserError(f"{store / MANIFEST} is damaged")
        return _parsed(store)[0]
    except OSError:
        raise UserError(f"the frozen weights in {store} cannot be read; {_STORE_REMEDY}") from None
    except UserError as error:
        raise UserError(f"{error}; {_STORE_REMEDY}") from None


def _parsed(path: Path, *required: str) -> tuple[Entries, str | None]:
    """Read a folder's manifest: the entries of its files, and the digest of its frozen store or None.

    required: files that must be listed. Raises UserError if a file is missing or has the wrong size. The message names
    the file.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, version = manifest["files"], manifest["format"]
        sizes = {name: int(files[name]["bytes"]) for name in (*required, *files) if files[name]["sha256"]}
        digest = manifest["frozen"] if version == CHECKPOINT_FORMAT else None
        if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(digest)
    except OSError:
        raise UserError(f"{path / MANIFEST} cannot be read") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path / MANIFEST} is damaged") from None
    if version not in (1, CHECKPOINT_FORMAT):
        raise UserError(f"{path / MANIFEST}: format {version} is not known, this version reads formats 1 and 2")
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise UserError(f"{path / name} " + ("is missing" if found is None else f"has {found} bytes, not {size}"))
    return files, digest
