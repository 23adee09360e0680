"""The start of a run: its own checkpoint, an earlier stage's checkpoint, a Hugging Face folder, or initial values.

A run is refused here if a prerequisite is missing, or if the model it starts from was trained with different
tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.init_from import init_from, loader_state
from moe_dist.checkpoint.manifest import identity, resolve_init
from moe_dist.checkpoint.null_gates import ROUTER_GATE
from moe_dist.checkpoint.stage_account import Account
from moe_dist.checkpoint.train_state import TrainState, check_resumable
from moe_dist.config.prerequisites import missing
from moe_dist.config.recipe import Config, InitFrom
from moe_dist.convert.pretrained import PretrainedModel
from moe_dist.core.errors import UserError
from moe_dist.core.name_patterns import matches_any
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.layout import Layout
from moe_dist.training.engine import Engine
from moe_dist.training.pretrained_start import check_tokenizer, find_pretrained, pretrained_identity


def check_needs(config: Config, *, resumes: bool) -> None:
    """Check that the files and folders that the recipe lists under `needs` exist.

    Only paths that this run reads are checked. For example, a path that an override has replaced is not checked. If the
    run resumes, paths that only a new run reads are not checked either. Raises UserError if a path is missing. The
    message names the path and the command that makes it.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The checkpoint that a run starts from. If all fields are None, the run starts from initial values.

    If the run resumes, resume_from is its own checkpoint, and state is the training state of that checkpoint. If the
    run starts from an earlier stage, source names the checkpoint of that stage. If the run starts from a Hugging Face
    folder, source names the folder, and pretrained is the folder's model.

    If the run starts from `source` and the recipe has a neighbour store, identity is a digest of the model in `source`.
    The store must have been collected with that model.
    """

    resume_from: Path | None = None
    state: TrainState | None = None
    source: InitFrom | None = None
    pretrained: PretrainedModel | None = None
    identity: str | None = None

    def check(self, vocabulary: Vocabulary) -> None:
        """Check the tokenizers of the checkpoint or folder against the recipe's.

        Raises UserError if the run resumes and its checkpoint was made with different tokenizers, or if
        check_tokenizer() refuses the Hugging Face folder.
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
        """Return True if `fill` does not load the model's tensor `name`, so that it keeps its initial values."""
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

    Raises UserError if the stage or folder is incomplete, or if the recipe's model differs from the folder's model.
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
