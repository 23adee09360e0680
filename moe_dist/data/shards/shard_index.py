"""The index of a local shard: its number of samples, size and checksum.

The index is stored next to the shard as <name>.index.json, or in the user's cache folder if the shard's folder is
read-only.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from moe_dist.core.errors import UserError
from moe_dist.core.files import read_json, write_file
from moe_dist.data.shards.jsonl import is_jsonl, jsonl_samples
from moe_dist.data.shards.sample_groups import sample_groups
from moe_dist.data.shards.strict_tar import DAMAGE, explain, tar_entries

CHANGED = "if you changed it on purpose, delete the index (NAME.index.json)"


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The number of samples, the size and the checksum of a shard."""

    count: int  # samples
    bytes: int
    sha256: str


def user_cache() -> Path:
    """Return moe_dist's folder in the user's cache, for files that cannot be stored next to a shard."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_dist"


def local_path(url: str) -> Path | None:
    """Return the local path that a URL refers to, or None if the URL is remote."""
    parsed = urlparse(url)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    return None if parsed.scheme else Path(url)


def verify_shard(shard: str | Path, *, content: bool = True) -> ShardIndex:
    """Check a shard against its index, and return the index. If there is no index, read the whole shard and build it.

    Raises UserError naming the shard if it is damaged, contains no samples or does not match its index. Raises
    UserError if the index cannot be read or written, and OSError if the shard cannot be opened.

    content: if false, an existing index is compared only with the shard's size, without reading the shard.
    """
    shard = Path(shard)
    index = _read_index(shard)
    if index is None:
        index = _scan(shard)
        _write_index(shard, index)
        return index
    size = shard.stat().st_size
    if size != index.bytes:
        sizes = f"{size} bytes, its index says {index.bytes}"
        raise UserError(f"shard {shard} is truncated or was replaced: {sizes}; {CHANGED}")
    if content and _sha256(shard) != index.sha256:
        raise UserError(f"shard {shard} is corrupt or was replaced: its sha256 is not the one in its index; {CHANGED}")
    return index


def _scan(shard: Path) -> ShardIndex:
    with shard.open("rb") as stream:
        try:
            names = ((name, None) for name, _ in tar_entries(stream))
            lines = is_jsonl(shard.name)
            samples = jsonl_samples(stream, str(shard)) if lines else sample_groups(names, str(shard))
            count = sum(1 for _ in samples)
        except DAMAGE as error:
            raise UserError(f"shard {shard} is corrupt or truncated: {explain(error)}") from None
    return ShardIndex(count, shard.stat().st_size, _sha256(shard))


def _sha256(shard: Path) -> str:
    with shard.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _index_paths(shard: Path) -> tuple[Path, Path]:
    name = hashlib.sha256(str(shard.resolve()).encode(errors="surrogateescape")).hexdigest()[:32]
    return shard.with_name(shard.name + ".index.json"), user_cache() / "shards" / f"{name}.index.json"


def _read_index(shard: Path) -> ShardIndex | None:
    path = next((path for path in _index_paths(shard) if path.is_file()), None)
    if path is None:
        return None
    try:
        return ShardIndex(**read_json(path))
    except (UserError, TypeError):
        raise UserError(f"the shard index {path} is unreadable; delete it to have it built again") from None


def _write_index(shard: Path, index: ShardIndex) -> None:
    beside, cached = _index_paths(shard)
    try:
        write_file(beside, json.dumps(asdict(index)), shared=True)
    except OSError:  # a read-only folder
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_file(cached, json.dumps(asdict(index)), shared=True)
        except OSError as error:
            tried = f"tried {beside.parent} and {cached.parent} ({error.strerror or error})"
            raise UserError(f"the index of shard {shard} cannot be written: {tried}") from None
