"""Starting a run from a Hugging Face folder: opening it, and comparing its model and tokenizer with the recipe's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_dist.config.model_section import ModelConfig
from moe_dist.config.recipe import Config, InitFrom
from moe_dist.convert.pretrained import (
    EMBEDDING,
    PretrainedModel,
    folder_digest,
    is_pretrained,
    open_pretrained,
)
from moe_dist.core.errors import UserError
from moe_dist.core.name_patterns import matches_any
from moe_dist.data.tokenizers.hugging_face_text import TOKENIZER
from moe_dist.data.tokenizers.text_tokenizer import SENTENCEPIECE, SentencePieceTokenizer, load_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.parallel.agreement import gather_objects, raise_on_all_ranks
from moe_dist.parallel.discovery import is_main_process

# Keys of `model:` that a stage may choose freely: they add new parameters, or do not change the model.
FREE = ("lora", "depth", "init_std", "embedding_init_std", "recompute")


def find_pretrained(config: Config) -> PretrainedModel | None:
    """Open the Hugging Face folder that `init_from` names. Returns None if it names none. Collective.

    Raises UserError if the folder holds no complete, supported model, or if that model does not fit the recipe. Also
    raises UserError if `init_from.data_position` is set, because a folder has no position in the data.
    """
    settings = config.init_from
    if settings is None or not any(gather_objects(is_pretrained(settings.checkpoint))):
        return None
    with raise_on_all_ranks():
        if settings.data_position:
            raise UserError(f"init_from.data_position: {settings.checkpoint} is not a checkpoint of a run")
        found = open_pretrained(settings.checkpoint)
        check_model(found, config.model, settings)
    return found


def pretrained_identity(found: PretrainedModel) -> str:
    """Return a digest that identifies the model of a Hugging Face folder. Collective.

    Rank 0 computes it from config.json and the weights.
    """
    digest = None
    with raise_on_all_ranks(patient=True):  # the others wait; tens of GB take minutes
        if is_main_process():
            digest = folder_digest(found.folder)
    return next(text for text in gather_objects(digest) if text is not None)


def check_model(found: PretrainedModel, model: ModelConfig, settings: InitFrom) -> None:
    """Raise UserError naming the first key of the recipe's `model:` section that differs from the folder's model.

    The keys in FREE may differ. If the embedding is left out, vocab_size may differ too. If `settings` renames tensors,
    lists new or left-out tensors, or sets null_gates, parts of the model whose `type` differs are not compared. The
    account of all tensors then shows what was loaded.
    """
    free = [*FREE, *(["vocab_size"] if matches_any(EMBEDDING, settings.left_out) else [])]
    given = found.model.model_dump(exclude_unset=True)
    theirs = {key: given[key] if isinstance(given.get(key), dict) else value for key, value in _values(found.model)}
    changes = bool(settings.rename or settings.new or settings.left_out or settings.null_gates)
    ours = dict(_values(model))
    difference = next(_differences(ours, {k: v for k, v in theirs.items() if k not in free}, "model", changes), None)
    if difference is not None:
        raise UserError(
            f"the recipe's {difference} according to {found.folder} (launch/convert.py model writes the section of a "
            "folder)"
        )


def _values(model: ModelConfig) -> Iterator[tuple[str, Any]]:
    """Yield each key of the `model:` section with its value. Defaults that depend on other keys are filled in."""
    yield from (model.model_dump() | {"num_query_groups": model.query_groups, "head_size": model.size_per_head}).items()


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str, changes: bool) -> Iterator[str]:
    """Yield a description of each key of `theirs` that has another value in `ours`.

    path: the name of the mapping in the recipe, for the description.
    changes: whether to skip nested mappings with different values of `type`.
    """
    for key, value in theirs.items():
        mine, name = ours.get(key), f"{path}.{key}"
        if not isinstance(mine, dict) or not isinstance(value, dict):
            if mine != value:
                yield f"{name} is {mine!r}, but must be {value!r}"
        elif not changes or mine.get("type") == value.get("type"):
            yield from _differences(mine, value, name, changes)


def check_tokenizer(found: PretrainedModel, settings: InitFrom, vocabulary: Vocabulary) -> None:
    """Raise UserError if the folder's embedding is loaded but its text tokenizer differs from the recipe's.

    A SentencePiece tokenizer is compared with the folder's tokenizer.model, a Hugging Face tokenizer with the folder's
    tokenizer.json. If this file is missing, nothing is compared.
    """
    is_sentencepiece = isinstance(vocabulary.text, SentencePieceTokenizer)
    path = found.folder / SENTENCEPIECE if is_sentencepiece else found.folder
    left_out = matches_any(EMBEDDING, settings.left_out)
    if left_out or not (path.is_file() if is_sentencepiece else (path / TOKENIZER).is_file()):
        return
    if load_text_tokenizer(path).sha256 != vocabulary.text.sha256:
        raise UserError(f"{found.folder} was trained with another tokenizer than {vocabulary.describe()}")
