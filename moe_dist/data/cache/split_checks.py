"""Checks of a split's documents: count the captions that do not fit into a sequence, enforce data.expect, and identify
the shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.files import read_json
from moe_dist.data.cache.token_shard import TOKEN_SHARD_MANIFEST, TokenShard
from moe_dist.data.shards.sample_report import Loss, SampleReport, exceeds


def content_digest(shards: Sequence[TokenShard]) -> str:
    """Return one digest over all shards, in their order.

    It covers each shard's content, the split that is read from it and the chat template of its conversations.
    """
    keys = ("identity", "split", "chat_template")
    named = (" ".join(str(shard.manifest[key]) for key in keys) + "\n" for shard in shards)
    return hashlib.sha256("".join(named).encode()).hexdigest()[:32]


def replaced_shards(shards: Sequence[TokenShard]) -> list[str]:
    """Return the names of the shards whose content has changed and whose old tokens are still in the cache."""
    names = []
    for shard in shards:
        name, identity = shard.manifest["shard"], shard.manifest["identity"]
        manifests = map(read_json, shard.folder.parent.glob(f"{name}-*/{TOKEN_SHARD_MANIFEST}"))
        if any(other["shard"] == name and other["identity"] != identity for other in manifests):
            names.append(name)
    return names


def shared_shards(earlier: Sequence[TokenShard], later: Sequence[TokenShard]) -> list[str]:
    """Return the names of the shards in `later` that share samples with a shard in `earlier`.

    Two shards share samples if they have the same content and the splits that are read from them overlap.
    """
    splits: dict[str, set[str | None]] = {}
    for shard in earlier:
        splits.setdefault(shard.manifest["identity"], set()).add(shard.manifest["split"])
    names = []
    for shard in later:
        split, others = shard.manifest["split"], splits.get(shard.manifest["identity"], set())
        if len(shard) and (others if split is None else others & {None, split}):
            names.append(shard.manifest["shard"])
    return names


def repeated_shards(shards: Sequence[TokenShard]) -> list[str]:
    """Return the names of the shards that have the same content as an earlier shard in `shards`."""
    filled = [shard.manifest for shard in shards if len(shard)]
    first = {manifest["identity"]: number for number, manifest in reversed([*enumerate(filled)])}
    return [manifest["shard"] for number, manifest in enumerate(filled) if first[manifest["identity"]] != number]


def count_cut_captions(report: SampleReport, shards: Sequence[TokenShard], room: int) -> None:
    """Record each document with a picture and a caption of more than `room` tokens as a lost part in `report`.

    A document is left out if another part of it is already lost.
    """
    keys = []
    lost = written = 0
    for shard in shards:
        documents, lengths = shard.caption_lengths
        over = np.bincount(documents, np.maximum(lengths - room, 0), len(shard))
        cut = (over > 0) & (shard.image_rows >= 0)
        cut[shard.prompts[:, 0]] = False  # an instruction is never cut
        cut[np.array(shard.manifest["short_documents"], dtype=np.int64)] = False
        keys += [f"{shard.manifest['shard']} number {number}" for number in np.flatnonzero(cut)]
        lost += int(over[cut].sum())
        written += int(lengths[cut[documents]].sum())
    for key in keys:
        report.add_lost(Loss(f"caption cut: {lost} of {written} tokens", key))


def check_expected(data: DataConfig, documents: int, pairs: int, texts: int, contents: str) -> None:
    """Raise UserError if more than data.max_bad_fraction of the documents lack what data.expect requires.

    Also raises UserError if data.image_tokenizer is set but no document has a picture, unless data.expect is `text`.

    pairs: the number of documents with both text and a picture. texts: the number of documents without a picture.
    contents: a description of the documents for the error message.
    """
    if data.image_tokenizer is not None and data.expect != "text" and 0 < documents == texts:
        raise UserError(
            f"data.image_tokenizer is set, but no training sample has a picture ({contents}); leave it out, or set "
            "data.expect=text"
        )
    holding = {"pairs": pairs, "images": documents - texts, "text": pairs + texts, "any": documents}[data.expect]
    if exceeds(documents - holding, data.max_bad_fraction, documents):
        raise UserError(
            f"data.expect={data.expect}, but the training samples are {contents}; mend the shards, or set data.expect"
        )
