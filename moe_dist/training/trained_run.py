"""A trained run, or the model that a recipe starts from, opened for evaluation or sampling.

It is opened without an optimizer. Its layout may differ from the layout in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.manifest import require_checkpoint, resolve_resume
from moe_dist.checkpoint.stored_weights import copy_tensors, fill_model
from moe_dist.checkpoint.train_state import TrainState, check_resumable
from moe_dist.config.recipe import Config
from moe_dist.core.batch import Batch
from moe_dist.core.errors import UserError
from moe_dist.core.initial_values import give_memory, none_new
from moe_dist.core.step import ModelOutput
from moe_dist.data.cache.token_cache import TokenStore, load_vocabulary
from moe_dist.data.shards.tars import Split
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.evaluate.held_out_split import HeldOutSplit
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.model.attention import check_head_size
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.parallel.signals import StopSignals
from moe_dist.training.deepspeed import init_distributed
from moe_dist.training.origin import Origin, check_vocabulary, find_start
from moe_dist.training.setup import embedding_rows, open_data


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """The checkpoint of a run, and the run's recipe with overrides. The weights and the data have not been read yet."""

    config: Config
    checkpoint: Path
    device: torch.device

    @classmethod
    def find(cls, folder: RunFolder, overrides: Sequence[str]) -> TrainedRun:
        """Start torch.distributed and find a run's recipe and checkpoint. Collective.

        Raises UserError if the run has no valid recipe or no checkpoint, or if an override is invalid.
        """
        device = init_distributed()
        with raise_on_all_ranks():
            config = folder.evaluation_config(overrides)
            newest = require_checkpoint(folder.path)
        return cls(config=config, checkpoint=resolve_resume(config) or newest, device=device)

    def open(self, *splits: Split) -> OpenedRun:
        """Build the model, load the checkpoint, and open the tokens of `splits`. Collective.

        Splits that are not tokenised yet are tokenised first. Raises UserError if the checkpoint is damaged or was made
        with a different model or different tokenizers. If any splits are given, also raises UserError if the recipe
        differs from the checkpoint's recipe in a key that may not change on resume (checkpoint/train_state.py).
        """
        config, layout = self.config, make_layout(expert=self.config.parallel.expert, device=self.device)
        dtype = torch.bfloat16 if config.deepspeed.bf16.enabled else torch.float32
        with raise_on_all_ranks():
            check_head_size(config.model.size_per_head, device=layout.device, dtype=dtype)
            state = TrainState.from_json(checkpoint.read_state(self.checkpoint))
            if splits:
                check_resumable(state.config, config)
            vocabulary = load_vocabulary(config.data)
            if state.vocabulary != vocabulary.fingerprint():
                raise UserError(f"{self.checkpoint} was trained with other tokenizers than {vocabulary.describe()}")
            rows = embedding_rows(config.model, vocabulary)
        stores = open_data(config.data, vocabulary, layout, StopSignals(), splits)
        model = _empty_model(config, rows, layout, dtype)
        fill_model(model, self.checkpoint, layout)
        return OpenedRun(
            config=config,
            layout=layout,
            vocabulary=vocabulary,
            model=model.eval(),
            step=state.step,
            documents=dict(zip(splits, stores, strict=True)),
        )


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A trained model, with its vocabulary and the documents to evaluate it on."""

    config: Config
    layout: Layout
    vocabulary: Vocabulary
    model: Transformer
    step: int  # optimizer steps done
    documents: Mapping[Split, TokenStore]  # of the splits that were opened

    @torch.no_grad()
    def forward(self, batch: Batch) -> ModelOutput:
        """Return the model's output for one micro-batch on the device. Collective."""
        return self.model(batch.tokens_T, batch.info)

    @property
    def held_out_split(self) -> HeldOutSplit:
        """The share of the held-out split that this rank evaluates."""
        return HeldOutSplit.of(self.config, self.vocabulary, self.layout)


def open_start(config: Config, *splits: Split) -> tuple[OpenedRun, Origin]:
    """Open the model that a recipe starts from, and the tokens of `splits`. Collective.

    Returns the opened model and its origin. The weights come from the checkpoint or Hugging Face folder that init_from
    names.

    Raises UserError if the recipe has no init_from, or if the recipe's parameters or tokenizers differ from
    those of the checkpoint or folder.
    """
    device = init_distributed()
    layout = make_layout(expert=config.parallel.expert, device=device)
    dtype = torch.bfloat16 if config.deepspeed.bf16.enabled else torch.float32
    origin = find_start(config)
    with raise_on_all_ranks():
        if origin.source is None:
            raise UserError("the recipe has no init_from, so there is no model to open")
        check_head_size(config.model.size_per_head, device=layout.device, dtype=dtype)
        vocabulary = load_vocabulary(config.data)
        origin.check(vocabulary)
        if origin.pretrained is None:
            check_vocabulary(origin.source, vocabulary)
        rows = embedding_rows(config.model, vocabulary)
    stores = open_data(config.data, vocabulary, layout, StopSignals(), splits)
    model = _empty_model(config, rows, layout, dtype)
    if origin.pretrained is None:
        fill_model(model, origin.source.checkpoint, layout)
    else:
        copy_tensors(model, origin.pretrained.tensors, origin.pretrained.folder)
    documents = dict(zip(splits, stores, strict=True))
    run = OpenedRun(
        config=config, layout=layout, vocabulary=vocabulary, model=model.eval(), step=0, documents=documents
    )
    return run, origin


def _empty_model(config: Config, rows: int, layout: Layout, dtype: torch.dtype) -> Transformer:
    """Build the recipe's model on the device, with parameters that are not initialised. Collective."""
    with raise_on_all_ranks():
        with torch.device("meta"):
            model = Transformer(config.model, rows, layout, config.seed)
        give_memory(model, layout.device, dtype, is_new=none_new)
    return model
