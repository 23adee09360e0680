"""Inputs of the efficiency study on one GPU: batches drawn once through the loader, stored in one small file.

The file is an xz-compressed npz of token ids and document lengths, from which `Packed.batch` rebuilds the loader's
batches exactly. Pictures and texts recur over the epochs, and xz compresses the repetition: 30 M tokens take a few MB.

Shape suffixes: B micro-batches, T tokens of one, N documents of all of them.
"""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu.findings import ROOT
from moe_dist.config.recipe import load_config
from moe_dist.core.batch import IMAGE, TEXT, Batch, TokenInfo
from moe_dist.data.cache.token_cache import TokenStore, build_cache, load_vocabulary, open_store
from moe_dist.data.shards.tars import Split
from moe_dist.data.stream.held_out_batches import held_out_batches
from moe_dist.data.stream.loader import make_loader

XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**27}]  # the dictionary holds all of the tokens
FULL = 0.5  # a held-out batch with a smaller fraction of valid tokens (the end of a split) is left out
SPLITS: tuple[Split, ...] = ("train", "validation", "test")  # all but the first are held out: they are small


@dataclass(frozen=True)
class Packed:
    """Micro-batches of one split as arrays."""

    tokens_BT: np.ndarray  # uint16
    lengths_N: np.ndarray  # uint16, document lengths, one micro-batch after another
    counts_B: np.ndarray  # int64, number of documents of each micro-batch
    facts: dict[str, Any]  # of the vocabulary and the corpus, see `facts_of`

    def __len__(self) -> int:
        return len(self.tokens_BT)

    @property
    def batch_tokens(self) -> int:
        return self.tokens_BT.shape[1]

    @cached_property
    def _ends_B(self) -> np.ndarray:
        return self.counts_B.cumsum()

    @cached_property
    def _modality_of(self) -> torch.Tensor:
        ids = torch.arange(self.facts["vocab_size"])
        return torch.where(ids < self.facts["first_image_code"], TEXT, IMAGE)

    def batch(self, number: int) -> Batch:
        """Return micro-batch `number` exactly as the loader made it, on the CPU."""
        end = int(self._ends_B[number])
        lengths = self.lengths_N[end - int(self.counts_B[number]) : end].astype(np.int64)
        length_T, start_T = (np.repeat(x, lengths) for x in (lengths, lengths.cumsum() - lengths))
        position_T = np.arange(self.batch_tokens) - start_T
        tokens = self.tokens_BT[number].astype(np.int64)
        pad = self.facts["pad"]
        has_target = (tokens != pad) & (position_T < length_T - 1)
        targets_T = torch.from_numpy(np.where(has_target, np.roll(tokens, -1), pad))
        tokens_T = torch.from_numpy(tokens)
        info = TokenInfo.build(
            modality_T=self._modality_of[tokens_T],
            valid_T=tokens_T != pad,
            position_T=torch.from_numpy(position_T),
            token_id_T=torch.arange(self.batch_tokens) + number * self.batch_tokens,
            document_lengths=lengths.tolist(),
            num_groups=1,
            num_sequences=self.batch_tokens // self.facts["sequence_length"],
        )
        return Batch(
            tokens_T=tokens_T,
            targets_T=targets_T,
            loss_mask_T=torch.from_numpy(has_target),
            target_modality_T=self._modality_of[targets_T],
            info=info,
        )

    def times_seen(self, number: int) -> dict[str, float]:
        """Return how often the first `number` micro-batches contain each picture and each text, on average."""
        tokens = self.tokens_BT[:number]
        image = int((tokens >= self.facts["first_image_code"]).sum())
        text = int((tokens < self.facts["text_pieces"]).sum() - (tokens == self.facts["pad"]).sum())
        found = {"image": image / self.facts["image_tokens"], "text": text / self.facts["text_tokens"]}
        return {name: round(value, 2) for name, value in found.items()}


def write_inputs(file: Path, overrides: Sequence[str], *, batches: int, held_out: int) -> None:
    """Draw micro-batches of one selection group each from the corpora of a recipe and write them.

    held_out: number of selection groups of each held-out split; fewer if the split ends earlier.
    """
    config = load_config(ROOT / "configs" / "moma_quickstart.yaml", ["run.dir=none", *overrides])
    vocabulary = load_vocabulary(config.data)
    for split in SPLITS:
        build_cache(config.data, split, vocabulary)
    documents, *others = (open_store(config.data, split, vocabulary) for split in SPLITS)
    loader = make_loader(documents, vocabulary, config.data, seed=config.seed, dp_rank=0, dp=1, batch_groups=1)
    held_out_split = chain.from_iterable(
        held_out_batches(store, vocabulary, config.data, groups=held_out, dp_rank=0, dp=1, batch_groups=1)
        for store in others
    )
    facts = facts_of(documents) | {
        "vocab_size": vocabulary.size,
        "first_image_code": vocabulary.first_image_code,
        "pad": vocabulary.pad,
        "text_pieces": vocabulary.text.size,
        "sequence_length": config.data.sequence_length,
    }
    assert vocabulary.size <= 2**16
    arrays = _arrays("train", (batch for batch, *_ in islice(loader, batches)))
    full = (batch for batch in held_out_split if batch.info.valid_T.float().mean() >= FULL)
    arrays |= _arrays("held_out", full)
    buffer = io.BytesIO()
    np.savez(buffer, facts=np.array(json.dumps(facts)), **arrays)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(lzma.compress(buffer.getvalue(), filters=XZ))


def facts_of(store: TokenStore) -> dict[str, int]:
    pictures = int(np.asarray(store.has_image).sum())
    return {
        "documents": len(store),
        "pictures": pictures,
        "texts": len(store) - pictures,
        "image_tokens": store.image_tokens,
        "text_tokens": store.text_tokens,
    }


def _arrays(name: str, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    tokens, lengths, counts = [], [], []
    for batch in _counted(name, batches):
        tokens.append(batch.tokens_T.numpy().astype(np.uint16))
        lengths += batch.info.document_lengths
        counts.append(len(batch.info.document_lengths))
    found = {"tokens": np.stack(tokens), "lengths": np.array(lengths, dtype=np.uint16), "counts": np.array(counts)}
    return {f"{name}_{key}": value for key, value in found.items()}


def _counted(name: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    for number, batch in enumerate(batches, 1):
        if number % 50 == 0:
            print(f"{name}: {number} batches", flush=True)
        yield batch


def read_inputs(file: Path) -> tuple[Packed, Packed]:
    """Read the training and the held-out micro-batches."""
    with lzma.open(file) as opened:
        arrays = np.load(io.BytesIO(opened.read()))
    facts = json.loads(str(arrays["facts"]))
    train, held_out = (
        Packed(*(arrays[f"{name}_{key}"] for key in ("tokens", "lengths", "counts")), facts)
        for name in ("train", "held_out")
    )
    return train, held_out
