"""The frozen weights of a run, written once. All checkpoints of the run refer to them by digest.

RUN/checkpoints/frozen/DIGEST/
    rank_RRRRR.safetensors, index.json   the logical tensors `frozen/NAME`, stored as in a checkpoint
    manifest.json                        size and SHA-256 of the files above; its own SHA-256 is DIGEST

Training does not change frozen weights, and a resumed run cannot change `trainable` or `init_from` (train_state.py). A
run therefore needs only one store, even if it is resumed in other layouts. The first save writes the store to new.tmp
and renames it. Only then does the checkpoint that refers to it become visible. A resumed run refers to the store of the
checkpoint that it loaded. If that store is in another run's folder, the first save writes a new store for the resumed
run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from moe_dist.checkpoint.fragment_files import disk_errors, removed_on_error, write_fragments
from moe_dist.checkpoint.manifest import is_complete, store_path, write_manifest
from moe_dist.checkpoint.storage import Fragment
from moe_dist.core.files import PARTIAL, StoredFile, put_in_place
from moe_dist.parallel.agreement import gather_objects
from moe_dist.parallel.layout import Layout


def keep_store(
    checkpoint: Path,
    frozen: list[Fragment],
    known: str | None,
    layout: Layout,
    group: dist.ProcessGroup | None,
    what: str,
) -> str:
    """Return the digest of the store that a new checkpoint refers to. Collective over `group`, a group of all ranks.

    If the run already has a store with the digest `known`, and no file of that store is missing or truncated, it is
    reused. Otherwise, a new store is written.

    checkpoint: the path of the checkpoint, which does not exist yet. frozen: this rank's frozen fragments. known: the
    digest of a store with the same values, or None. what: the start of the error message.
    """
    reused = known if layout.is_main and known and is_complete(store_path(checkpoint, known)) else None
    digest = gather_objects(reused, group)[0]
    if digest is not None:
        return digest
    partial = store_path(checkpoint, f"new{PARTIAL}")
    with removed_on_error(partial, layout):
        files = write_fragments(partial, frozen, layout, group, what)
        with disk_errors(what, group):
            digest = _commit(partial, files) if layout.is_main else None
    return gather_objects(digest, group)[0]


def _commit(partial: Path, files: Iterable[StoredFile]) -> str:
    """Complete the store `partial`, rename its folder to its digest, and return the digest.

    If a complete store with this digest already exists, `partial` is removed instead.
    """
    digest = write_manifest(partial, files).sha256
    place = partial.with_name(digest)
    if is_complete(place):
        shutil.rmtree(partial)
    else:
        shutil.rmtree(place, ignore_errors=True)
        put_in_place(partial, place)
    return digest
