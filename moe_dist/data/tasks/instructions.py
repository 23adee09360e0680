"""Instruction samples: a prompt, with or without an image beside it, and the answer that is to be learnt.

The .json member of such a sample holds `prompt`, `answer` and `domain`; a multiple-choice item also `question`,
`options` and `correct`. Other fields are ignored. Training and evaluation lay one out alike:

  BOS prompt answer EOS   or   BOS BOI codes EOI prompt answer EOS

Prompt and answer are tokenised apart, so a prompt has the same ids whatever answer follows. The loss falls on the
answer and EOS only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from moe_dist.core.strict import Count, Strict, validate
from moe_dist.data.tokenizers.text_tokenizer import TextTokenizer


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


Filled = Annotated[str, AfterValidator(_filled)]


class Instruction(Strict):
    """The .json member of an instruction sample."""

    model_config = ConfigDict(extra="ignore")

    prompt: Filled
    answer: Filled  # goes on where the prompt ends: begins with a blank if one belongs there
    domain: Filled  # what the sample is about: routing is reported by it
    question: Filled | None = None
    options: Annotated[tuple[Filled, ...], Field(min_length=2)] | None = None
    correct: Count | None = None  # index into options

    @model_validator(mode="after")
    def _choice(self):
        if (self.options is None) != (self.correct is None):
            raise ValueError("options and correct belong together")
        if self.options is not None and self.correct is not None and self.correct >= len(self.options):
            raise ValueError(f"correct={self.correct} is none of the {len(self.options)} options")
        return self


@dataclass(frozen=True, slots=True)
class InstructionPrompt:
    """What makes a tokenised document an instruction: its text is a prompt, then the answer."""

    length: int  # ids of the text that are the prompt
    domain: str
    sample: int  # sample_hash


def is_instruction(record: dict[str, Any]) -> bool:
    """Whether a .json member without a caption is meant as one."""
    return "prompt" in record or "answer" in record


def read_instruction(record: dict[str, Any], where: str) -> Instruction:
    """Check a .json member. Raises UserError, one sentence that begins with `where` and names the key."""
    return validate(Instruction, record, where)


def instruction_ids(tokenizer: TextTokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the answer, which together decode to prompt + answer."""
    return tokenizer.encode(prompt), tokenizer.encode_continuation(answer)


def sample_hash(prompt: str, image: bytes = b"") -> int:
    """63 bits that identify a sample by its prompt's text and, where one is beside it, the image file's content."""
    return int.from_bytes(hashlib.sha256(prompt.encode() + image).digest()[:8]) >> 1
