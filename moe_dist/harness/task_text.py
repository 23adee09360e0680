"""Conversion of the texts of tasks to token ids.

The rules are those of lm_eval's own class for Hugging Face models (HFLM), so a text gets the same ids here as in an
evaluation of the exported model. With the tokenizer of a Hugging Face folder, the rules differ from those of training
(data/tasks/instructions.py) in two points:
- The tokenizer decides whether a text begins with BOS.
- The name of a special token in a text is encoded as this token. Chat templates write special tokens by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moe_dist.core.errors import UserError
from moe_dist.core.extras import require_extra
from moe_dist.data.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


class TaskText(Protocol):
    """Interface for the conversion between the texts of tasks and token ids."""

    name: str
    prefix: int  # the token that precedes a text without a context
    eos: str | None  # the text of EOS, if it can be written
    template: str | None  # the chat template

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Encode a text.

        special: whether to add the tokenizer's special tokens, such as BOS. None: add them unless the text already
        begins with BOS.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids, dropping special tokens."""

    def chat(self, messages: Messages, *, prompt: bool) -> str:
        """Apply the chat template to messages and return the text.

        prompt: if True, the text ends with the beginning of an answer. If False, the last message is not closed, so the
        model can continue it.
        Raises UserError if there is no template or if the template fails.
        """


class HuggingFaceTaskText:
    """The TaskText of a Hugging Face folder. It uses the folder's tokenizer, loaded by transformers."""

    def __init__(self, folder: str) -> None:
        require_extra("transformers", "eval", "evaluating tasks with a Hugging Face tokenizer")
        from transformers import AutoTokenizer

        self.name = folder
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if eos is None:
            raise UserError(f"the tokenizer {folder} names no EOS token (eos_token), which the tasks of lm-eval need")
        self.prefix = eos if bos is None else bos
        self._begin = str(self._tokenizer.decode(self.prefix))
        self.eos: str | None = str(self._tokenizer.decode(eos))
        self.template: str | None = self._tokenizer.chat_template

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        if special is None:
            special = not text.startswith(self._begin)
        return self._tokenizer.encode(text, add_special_tokens=special)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def chat(self, messages: Messages, *, prompt: bool) -> str:
        if self.template is None:
            raise UserError(f"the tokenizer {self.name} has no chat template (chat_template in tokenizer_config.json)")
        for tried in (messages, [message for message in messages if message["role"] != "system"]):
            try:
                return str(
                    self._tokenizer.apply_chat_template(
                        tried, tokenize=False, add_generation_prompt=prompt, continue_final_message=not prompt
                    )
                )
            # Many templates refuse a system message, so try once more without it. A template may raise any error.
            except Exception as problem:
                error = " ".join(str(problem).split())
        raise UserError(f"the chat template of the tokenizer {self.name} fails: {error}")


class SentencePieceTaskText:
    """The TaskText of a SentencePiece file. By default, BOS is added before every text."""

    eos: str | None = None
    template: str | None = None

    def __init__(self, path: str, vocabulary: Vocabulary) -> None:
        self.name, self._vocabulary, self.prefix = path, vocabulary, vocabulary.bos

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        return [self.prefix] * (special is not False) + self._vocabulary.text.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._vocabulary.text.decode([token for token in ids if token < self._vocabulary.text.size])

    def chat(self, messages: Messages, *, prompt: bool) -> str:
        raise UserError(f"the tokenizer {self.name} is a SentencePiece file, which has no chat template")


def load_task_text(path: str, vocabulary: Vocabulary) -> TaskText:
    """Load the TaskText of a tokenizer. Raises UserError if the tokenizer has no EOS token.

    path: the recipe's data.text_tokenizer.
    """
    return HuggingFaceTaskText(path) if Path(path).is_dir() else SentencePieceTaskText(path, vocabulary)
