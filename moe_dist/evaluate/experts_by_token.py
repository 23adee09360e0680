"""The number of experts that tokens take: by layer, by class of token, and by token of the vocabulary.

With null experts (AdaMoE, arXiv 2406.13233) or expert choice, tokens take different numbers of experts. This module
shows which tokens take many experts and which take few. Null experts are not counted.

Shape suffixes: L expert layers, V vocabulary, T tokens of a micro-batch, C classes of token.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_dist.core.batch import Batch
from moe_dist.core.errors import UserError
from moe_dist.core.step import ModelOutput
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.parallel.collectives import sum_over_ranks
from moe_dist.parallel.layout import Layout

CLASSES = ("word start", "inside a word", "number", "punctuation", "other text", "marker", "image code")
EXTREMES = 20  # tokens of the vocabulary in each list of extremes
RARE = 20  # a token with fewer occurrences is left out of the lists


@dataclass(frozen=True, slots=True)
class ExpertsByToken:
    """Counts for each token of the vocabulary: its occurrences in a split, and its experts in each layer.

    Padding is not counted.
    """

    layers: tuple[int, ...]  # the expert layers
    experts_LV: Tensor  # int64: (token, expert) assignments of each token of the vocabulary
    seen_V: Tensor  # int64: occurrences

    def summary(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """Return the mean numbers of experts as a JSON-serializable mapping.

        It contains the means over all tokens, by layer and by class of token. It also lists the tokens with the lowest
        and the highest means.
        """
        seen_V, experts_V = self.seen_V.double(), self.experts_LV.double().sum(0)
        mean_V = experts_V / seen_V.clamp(min=1) / len(self.layers)
        frequent = (self.seen_V >= RARE).nonzero().flatten().tolist()
        ordered = sorted(frequent, key=lambda token: (float(mean_V[token]), token))

        def described(tokens: Sequence[int]) -> list[dict[str, Any]]:
            names = [_text(vocabulary, token) for token in tokens]
            return [
                {"token": token, "text": name, "count": int(self.seen_V[token]), "experts": float(mean_V[token])}
                for token, name in zip(tokens, names, strict=True)
            ]

        return {
            "tokens": int(self.seen_V.sum()),
            "experts_per_token": float(experts_V.sum() / seen_V.sum() / len(self.layers)),
            "layers": {
                layer: float(row.sum() / seen_V.sum()) for layer, row in zip(self.layers, self.experts_LV.double())
            },
            "classes": self._classes(vocabulary),
            "fewest": described(ordered[:EXTREMES]),
            "most": described(ordered[::-1][:EXTREMES]),
        }

    def _classes(self, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
        """Return the number of tokens and the mean number of experts in each layer, for each class that occurs."""
        seen = self.seen_V.nonzero().flatten()
        class_of = torch.tensor([CLASSES.index(token_class(vocabulary, token)) for token in seen.tolist()])
        seen_C = torch.zeros(len(CLASSES), dtype=torch.int64).index_add(0, class_of, self.seen_V[seen])
        experts_LC = torch.zeros(len(self.layers), len(CLASSES), dtype=torch.int64)
        experts_LC = experts_LC.index_add(1, class_of, self.experts_LV[:, seen])
        return {
            name: {"tokens": int(seen_C[place]), "experts": (experts_LC[:, place] / seen_C[place]).tolist()}
            for place, name in enumerate(CLASSES)
            if seen_C[place]
        }


@torch.no_grad()
def count_experts(
    forward: Callable[[Batch], ModelOutput], batches: Iterable[Batch], vocabulary_size: int, layout: Layout
) -> ExpertsByToken:
    """Count how many experts each valid token in the batches is sent to. Collective.

    Raises UserError if the model has no expert layers, or if there are no tokens.
    """
    layers: tuple[int, ...] = ()
    experts_LV = torch.zeros(0, vocabulary_size, dtype=torch.int64, device=layout.device)
    seen_V = torch.zeros(vocabulary_size, dtype=torch.int64, device=layout.device)
    for batch in batches:
        batch = batch.to(layout.device)
        records = forward(batch).records
        if not records:
            raise UserError("the model is dense: no token has a choice of experts")
        if not layers:
            layers = tuple(record.layer for record in records)
            experts_LV = experts_LV.new_zeros(len(layers), vocabulary_size)
        tokens_T, valid_T = batch.tokens_T, batch.info.valid_T.long()
        seen_V.index_add_(0, tokens_T, valid_T)
        for row, record in enumerate(records):
            experts_LV[row].index_add_(0, tokens_T, record.experts_of_T(len(tokens_T)) * valid_T)
    experts_LV, seen_V = sum_over_ranks([experts_LV, seen_V], layout.dp_group)
    if not int(seen_V.sum()):
        raise UserError("the held-out split has no tokens")
    return ExpertsByToken(layers, experts_LV, seen_V)


def token_class(vocabulary: Vocabulary, token: int) -> str:
    """Return the class of a token of the vocabulary, one of CLASSES.

    A text token has the class of its first character that is not a space. A token made of letters is the start of a
    word if a space precedes the letters.
    """
    if token >= vocabulary.first_image_code:
        return "image code"
    text = _text(vocabulary, token)
    if token >= vocabulary.text.size or token in (vocabulary.pad, vocabulary.bos, vocabulary.eos):
        return "marker"
    first = text.lstrip()[:1]
    if first.isalpha():
        return "word start" if text[0].isspace() else "inside a word"
    if first.isnumeric():
        return "number"
    return "punctuation" if first and unicodedata.category(first)[0] in "PS" else "other text"


def _text(vocabulary: Vocabulary, token: int) -> str:
    """Return the text that a token adds when it follows another token, including any leading space.

    If the text tokenizer does not have the token, return its id in angle brackets.
    """
    if token >= vocabulary.text.size:
        return f"<{token}>"
    anchor = vocabulary.text.encode("a")
    return vocabulary.text.decode([*anchor, token]).removeprefix(vocabulary.text.decode(anchor))
