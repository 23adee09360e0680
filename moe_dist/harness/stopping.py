"""The format of generated text: text tokens until a stop string, the end of the document or a maximum length.

Shape suffixes: K kinds of token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_dist.core.batch import TEXT
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.generate.prompt import GenerationState, Prompt


@dataclass(frozen=True, slots=True)
class StopSettings:
    """Settings that determine when a continuation ends."""

    until: tuple[str, ...]  # stop strings
    max_tokens: int


class TextUntil:
    """The rules for a continuation: which tokens may come next, and when it ends. Any text token may come next,
    including markers.

    Implements DocumentFormat (generate/decode.py).
    context: the maximum number of tokens of a prompt and its continuation.
    """

    def __init__(self, vocabulary: Vocabulary, context: int, settings: StopSettings) -> None:
        self.vocabulary, self.context, self.settings = vocabulary, context, settings
        self.masks_KV: Tensor = (vocabulary.modality_of == TEXT)[None]

    def start_text(self, number: int, prompt: tuple[int, ...]) -> GenerationState:
        """Create the initial state of a continuation, before any token is generated.

        number: the index of the continuation, from which its random draws are derived.
        """
        limit = len(prompt) + self.settings.max_tokens
        return GenerationState(number, Prompt("text", (), prompt), limit)

    def next(self, sample: GenerationState) -> int:
        """Return 0, the index of the only row of masks_KV. This row allows all text tokens."""
        return 0

    def add(self, sample: GenerationState, token: int) -> None:
        """Append a token, and mark the continuation as done if it is complete.

        It is complete if the token is EOS, if the maximum length is reached, or if the text contains a stop string.
        """
        sample.generated.append(token)
        ended = sample.length == sample.limit or token == self.vocabulary.eos
        sample.done = ended or self._has_stop_string(sample)

    def _has_stop_string(self, sample: GenerationState) -> bool:
        v = self.vocabulary
        text = v.text.decode([token for token in sample.generated if token < v.text.size])
        return any(stop in text for stop in self.settings.until if stop)
