"""Set-up of a run: checking its recipe, opening its data, and loading the checkpoint that the model starts from.

A run is refused here if a prerequisite is missing, or if the model in the checkpoint was trained with different
tokenizers. The numbers of used, skipped and lost samples and the first sample are printed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.init_from import init_from, loader_state
from moe_dist.checkpoint.manifest import identity, resolve_init
from moe_dist.checkpoint.null_gates import ROUTER_GATE
from moe_dist.checkpoint.stage_account import Account
from moe_dist.checkpoint.train_state import TrainState, check_resumable
from moe_dist.config.losses import ManifoldSettings
from moe_dist.config.model_section import ModelConfig, MoEFFN
from moe_dist.config.prerequisites import missing
from moe_dist.config.recipe import Config, DataConfig, InitFrom
from moe_dist.convert.pretrained import PretrainedModel
from moe_dist.core.errors import UserError
from moe_dist.core.name_patterns import matches_any
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
from moe_dist.training.engine import Engine
from moe_dist.training.pretrained_start import check_tokenizer, find_pretrained, pretrained_identity
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


def check_needs(config: Config, *, resumes: bool) -> None:
    """Check that the files and folders that the recipe lists under `needs` exist.

    Only those that this run reads are checked. For example, a path that an override has replaced is not checked. If the
    run resumes, paths that only a new run reads are not checked either. If one is missing, raises UserError naming it
    and the command that makes it.
    """
    data = config.data
    read = [data.shards, data.validation_shards, data.text_tokenizer, data.image_tokenizer]
    if not resumes:
        read += [data.neighbours, config.init_from.checkpoint if config.init_from else None]
    paths = {Path(path) for given in read if given for path in ([given] if isinstance(given, str) else given)}
    gone = [path for path in paths if not path.exists()]
    for needed in missing(config) if gone else ():
        if not needed.folder.exists() and any(needed.folder in (path, *path.parents) for path in gone):
            raise UserError(f"the recipe needs {needed.folder}, which is missing: `{needed.command}` makes it")


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

    If samples are bad or have a lost part, also print a warning with their numbers and the reasons.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The checkpoint that a run starts from.

    If the run resumes, resume_from is its own checkpoint, and state is the training state in it. If the run starts from
    an earlier stage, source is the checkpoint of that stage. If source is a Hugging Face folder, pretrained is its
    model. If all are None, the run starts from initial values. If the recipe has a neighbour store, identity is a
    digest of source, with which the store must have been collected.
    """

    resume_from: Path | None = None
    state: TrainState | None = None
    source: InitFrom | None = None
    pretrained: PretrainedModel | None = None
    identity: str | None = None

    def check(self, vocabulary: Vocabulary) -> None:
        """Raise UserError if the run resumes and its checkpoint was made with different tokenizers.

        If the run starts from a Hugging Face folder, raise UserError if the folder's tokenizer is different.
        """
        if self.pretrained is not None and self.source is not None:
            check_tokenizer(self.pretrained, self.source, vocabulary)
        if self.state is not None and self.state.vocabulary != vocabulary.fingerprint():
            raise UserError(f"{self.resume_from} was trained with other tokenizers than {vocabulary.describe()}")

    def fill(self, engine: Engine, layout: Layout, vocabulary: Vocabulary) -> Account | None:
        """Load the checkpoint, if there is one, into a new engine. Collective.

        If the checkpoint is from an earlier training stage, returns an Account of which parameters were loaded.
        Otherwise returns None.
        """
        if self.resume_from is not None:
            checkpoint.load(self.resume_from, engine, layout)
        if self.source is None:
            return None
        if self.pretrained is not None:
            account = init_from(self.source, engine, layout, self.pretrained.tensors)
            return replace(account, dropped=self.pretrained.dropped)
        return start_from(self.source, engine, layout, vocabulary)

    def is_new(self, name: str) -> bool:
        """Return True if the model's tensor `name` keeps its initial values, because `fill` does not load it."""
        if self.resume_from is not None:
            return False
        if self.source is None or matches_any(name, self.source.new):
            return True
        return self.source.null_gates == "fresh" and name.endswith(ROUTER_GATE)

    @property
    def loader_state(self) -> dict[str, Any] | None:
        """The loader state to continue from, or None to start at the beginning of the data."""
        if self.state is not None:
            return self.state.loader
        return None if self.source is None or self.pretrained is not None else loader_state(self.source)


def find_origin(config: Config) -> Origin:
    """Find the checkpoint that a run starts from. Collective.

    Raises UserError if an entry of the recipe's `needs` is missing, if the run's own checkpoint cannot be resumed with
    this recipe, or if the recipe's model is not that of the Hugging Face folder that it starts from.
    """
    resume_from = checkpoint.resolve_resume(config)
    with raise_on_all_ranks():
        check_needs(config, resumes=resume_from is not None)
    if resume_from is None:
        return find_start(config)
    with raise_on_all_ranks():
        state = TrainState.from_json(checkpoint.read_state(resume_from))
        check_resumable(state.config, config)
    return Origin(resume_from=resume_from, state=state)


def find_start(config: Config) -> Origin:
    """Find the earlier stage or the Hugging Face folder that a run of this recipe starts from. Collective.

    Raises UserError if it is incomplete, or if the recipe's model is not that of the folder.
    """
    pretrained = find_pretrained(config)
    source = config.init_from if pretrained is not None else resolve_init(config)
    digest = None
    if config.data.neighbours is not None and source is not None:
        digest = identity(source.checkpoint) if pretrained is None else pretrained_identity(pretrained)
    return Origin(source=source, pretrained=pretrained, identity=digest)


def start_from(source: InitFrom, engine: Engine, layout: Layout, vocabulary: Vocabulary) -> Account:
    """Load the checkpoint of an earlier training stage into a new model. Collective.

    Returns an Account of which parameters were loaded. Raises UserError if the embedding is loaded and the earlier
    stage used different tokenizers.
    """
    account = init_from(source, engine, layout)
    if "embedding.weight" in account.loaded:
        with raise_on_all_ranks():
            check_vocabulary(source, vocabulary)
    return account


def check_vocabulary(source: InitFrom, vocabulary: Vocabulary) -> None:
    """Raise UserError if the checkpoint of an earlier stage was made with different tokenizers."""
    before = checkpoint.read_state(source.checkpoint).get("vocabulary", vocabulary.fingerprint())
    if before != vocabulary.fingerprint():
        raise UserError(f"{source.checkpoint} was trained with other tokenizers than {vocabulary.describe()}")


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

    Unless the run resumes, the store must have been collected with the model of `origin`.
    """
    if config.data.neighbours is None:
        return None
    term = config.losses.get("manifold")
    settings = term.neighbours if isinstance(term, ManifoldSettings) else None
    return NeighbourStore(config.data.neighbours, model=origin.identity, settings=settings)
