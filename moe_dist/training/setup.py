"""Set-up of a run: checking its recipe, and opening its data.

For each split that is opened, the contents and the first sample are printed. If samples were skipped or have lost
parts, a warning is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import torch

from moe_dist.config.losses import ManifoldSettings
from moe_dist.config.model_section import ModelConfig, MoEFFN
from moe_dist.config.recipe import Config, DataConfig
from moe_dist.core.errors import UserError
from moe_dist.data.cache.split_checks import repeated_shards, shared_shards
from moe_dist.data.cache.token_cache import TokenStore, build_cache, open_store
from moe_dist.data.shards.sample_report import KEYS_SHOWN, readable
from moe_dist.data.shards.tars import Split, unread_shards
from moe_dist.data.stream.loader import Loader, check_data, make_loader
from moe_dist.data.stream.neighbour_store import NeighbourStore
from moe_dist.data.stream.packing import Document
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.model.attention import check_head_size
from moe_dist.model.moe.moe_layer import routers
from moe_dist.model.moe.placement import make_placement
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.layout import Layout, check_layout
from moe_dist.parallel.signals import StopSignals
from moe_dist.training.deepspeed_config import accumulation_steps
from moe_dist.training.origin import Origin
from moe_dist.training.trainable import freeze_others

TRAINING_SPLITS: tuple[Split, Split] = ("train", "validation")
SHOWN = 100  # characters of the first sample's texts


@raise_on_all_ranks()  # no rank may fail while another still sets up its groups
def check_recipe(config: Config, layout: Layout) -> None:
    """Check a recipe before any data are read. Collective.

    Raises UserError if the recipe contradicts itself or does not fit the number of ranks.

    The model is built on the meta device, so that the checks of routers, experts and frozen parameters run.
    """
    of_depth = {"causal_routers"} if config.model.depth else set()
    if not isinstance(config.model.ffn, MoEFFN) and (lost := [name for name in config.losses if name not in of_depth]):
        raise UserError(f"the loss '{lost[0]}' needs routers, and the model is dense")
    accumulation_steps(config.train, layout.dp)
    dtype = torch.bfloat16 if config.deepspeed.bf16.enabled else torch.float32
    check_head_size(config.model.size_per_head, device=layout.device, dtype=dtype)
    check_data(config.data, dp=layout.dp)
    if config.data.neighbours is not None and config.init_from is None:
        raise UserError("data.neighbours needs init_from: a store belongs to the checkpoint it was collected with")
    with torch.device("meta"):
        model = Transformer(config.model, 1, Layout(), config.seed)
    check_layout(world=layout.world, expert=layout.expert)
    if isinstance(config.model.ffn, MoEFFN):
        make_placement(routers(model)[0].expert_groups, layout.expert, config.model.ffn.slices)
    freeze_others(model, config.trainable)


def embedding_rows(model: ModelConfig, vocabulary: Vocabulary) -> int:
    """Return the number of rows of the embedding: model.vocab_size, by default the size of the vocabulary.

    Raises UserError if there are fewer rows than ids.
    """
    if model.vocab_size is not None and model.vocab_size < vocabulary.size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is less than {vocabulary.size}, the number of ids of "
            f"{vocabulary.describe()} with the special tokens that they lack"
        )
    return model.vocab_size or vocabulary.size


def open_data(
    data: DataConfig,
    vocabulary: Vocabulary,
    layout: Layout,
    stop: StopSignals,
    splits: Sequence[Split] = TRAINING_SPLITS,
) -> tuple[TokenStore, ...]:
    """Open the tokens of the given splits. Splits that are not tokenised yet are tokenised first. Collective.

    Raises Stopped on every rank if `stop` has received a signal on any rank.
    """
    with raise_on_all_ranks(patient=True):  # each rank tokenises its share of the shards
        for split in splits:
            build_cache(
                data, split, vocabulary, rank=layout.rank, world=layout.world, device=layout.device, stop=stop.pending
            )
    stop.check(layout.device)
    with raise_on_all_ranks():
        stores = tuple(open_store(data, split, vocabulary) for split in splits)
    if layout.is_main:
        for split, store in zip(splits, stores, strict=True):
            _show(split, store, vocabulary)
        _warn(data, dict(zip(splits, stores, strict=True)))
    return stores


def _warn(data: DataConfig, stores: Mapping[Split, TokenStore]) -> None:
    """Print a warning if tars in the folders are not read, are read twice, or are both trained on and held out."""
    trained = stores["train"].shards if "train" in stores else []
    twice = [name for store in stores.values() for name in repeated_shards(store.shards)]
    held_out = [name for split in stores if split != "train" for name in shared_shards(trained, stores[split].shards)]
    for names, meaning in (
        (unread_shards(data.shards, data.validation_shards), "files in the shard folders are read by no split"),
        (twice, "shards have the content of another one, so their samples count twice"),
        (held_out, "held-out shards are trained on, too, so the held-out loss does not show how a model generalises"),
    ):
        if names:
            more = ", ..." if len(names) > KEYS_SHOWN else ""
            listed = ", ".join(map(readable, names[:KEYS_SHOWN]))
            print(f"warning: {len(names)} {meaning} ({listed}{more})", file=sys.stderr, flush=True)


def _show(split: Split, store: TokenStore, vocabulary: Vocabulary) -> None:
    """Print what a split contains, which parts of its samples are unused by design, and its first sample.

    If samples are unusable or have lost parts, also print a warning that counts them and gives the reasons.
    """
    unused = ", ".join(f"{name} ({number})" for name, number in store.report.unused.most_common())
    lines = [f"{split}: {store.contents}" + (f"; unused by design: {unused}" if unused else "")]
    if store.report.bad or store.report.lost:
        lines.append(f"warning: {split}: {store.report.summary()}")
    if not store.pairs and 0 < store.texts < len(store):
        lines.append(f"warning: {split}: no sample has a picture and a text; the members of a sample belong in one tar")
    if len(store):
        lines.append(f"{split}: the first sample: {_describe(store.document(0), vocabulary)}")
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def _describe(document: Document, vocabulary: Vocabulary) -> str:
    """Describe a document by its number of image codes and the beginnings of its texts, decoded from their ids.

    The texts of a conversation are a prompt and an answer in turn.
    """
    parts = [] if document.image is None else [f"a picture of {len(document.image)} codes"]
    prompt = document.prompt
    cuts = [] if prompt is None else [prompt.length, *(place for span in prompt.later for place in span)]
    names = cycle(("prompt", "answer")) if prompt else ("text" if document.image is None else "caption",)
    for name, ids in zip(names, np.split(document.text, cuts), strict=False):
        if len(ids):
            text = vocabulary.text.decode(ids.tolist())
            parts.append(f"{name} {text[:SHOWN]!r}" + ("..." if len(text) > SHOWN else ""))
    return ", ".join(parts)


def open_loader(
    config: Config, documents: TokenStore, vocabulary: Vocabulary, layout: Layout, origin: Origin
) -> Loader:
    """Open this rank's training loader at the position where the run starts."""
    return make_loader(
        documents,
        vocabulary,
        config.data,
        seed=config.seed,
        dp_rank=layout.dp_rank,
        dp=layout.dp,
        batch_groups=config.train.micro_batch_groups,
        neighbours=open_neighbours(config, origin),
        state=origin.loader_state,
        device=layout.device,
    )


def open_neighbours(config: Config, origin: Origin) -> NeighbourStore | None:
    """Open the recipe's neighbour store. Returns None if data.neighbours is not set.

    Raises UserError if the store is incomplete, if it was collected with a model other than that of `origin`, or if its
    neighbours were found with other settings than the recipe's. On resume, the model is not checked.
    """
    if config.data.neighbours is None:
        return None
    term = config.losses.get("manifold")
    settings = term.neighbours if isinstance(term, ManifoldSettings) else None
    return NeighbourStore(config.data.neighbours, model=origin.identity, settings=settings)
