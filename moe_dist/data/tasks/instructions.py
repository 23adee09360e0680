"""Instruction samples: a prompt, optionally with an image, and the answer to learn.

The .json member of such a sample has `prompt`, `answer` and `domain`. A multiple-choice item also has `question`,
`options` and `correct`. Other fields are ignored. Training and evaluation use the same layout:

  BOS prompt answer EOS   or   BOS BOI codes EOI prompt answer EOS

Prompt and answer are tokenised as one text, whose ids are cut where the ids of the prompt alone end. A prompt's ids
therefore do not depend on the answer. Only the answer and EOS contribute to the loss.
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
    answer: Filled  # appended to the prompt as it is, so it begins with a space if one is needed
    domain: Filled  # the sample's topic; metrics are reported per domain
    question: Filled | None = None
    options: Annotated[tuple[Filled, ...], Field(min_length=2)] | None = None
    correct: Count | None = None  # index into options

    @model_validator(mode="after")
    def _choice(self):
        if (self.options is None) != (self.correct is None):
            raise ValueError("options and correct belong together")
        if self.options is not None and self.correct is not None and self.correct >= len(self.options):
            raise ValueError(f"correct={self.correct} is not an index into the {len(self.options)} options")
        return self


@dataclass(frozen=True, slots=True)
class InstructionPrompt:
    """The prompt within a tokenised instruction. The instruction's text is the prompt followed by the answer."""

    length: int  # number of prompt ids at the beginning of the text
    domain: str
    sample: int  # sample_hash


def is_instruction(record: dict[str, Any]) -> bool:
    """Return whether a .json member without a caption is an instruction: it has a prompt or an answer."""
    return "prompt" in record or "answer" in record


def read_instruction(record: dict[str, Any], where: str) -> Instruction:
    """Validate a .json member. Raises UserError with a sentence that begins with `where` and names the key."""
    return validate(Instruction, record, where)


class NoBoundary(Exception):
    """Raised if the ids of a prompt joined with its answer cannot be cut between the two.

    The message is the reason in a few words.
    """


def instruction_ids(tokenizer: TextTokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt and of the answer. Joined, they are the ids of prompt + answer.

    The rule is that of lm-evaluation-harness (`_encode_pair`): whitespace at the end of the prompt is moved to the
    answer, prompt and answer are tokenised as one text, and the ids are cut after as many ids as the prompt alone has.
    The rule also holds if the tokenizer adds tokens before every text. Raises NoBoundary if the joined ids do not begin
    with the prompt's ids, or if no ids are left for the answer.
    """
    before = tokenizer.encode(prompt.rstrip())
    joined = tokenizer.encode(prompt + answer)
    if joined[: len(before)] != before:
        raise NoBoundary("prompt and answer merge")
    if len(joined) == len(before):
        raise NoBoundary("the tokenizer drops the answer")
    return before, joined[len(before) :]


def sample_hash(prompt: str, image: bytes = b"") -> int:
    """Return a 63-bit hash that identifies a sample by its prompt and, if it has an image, the image file's content."""
    return int.from_bytes(hashlib.sha256(prompt.encode() + image).digest()[:8]) >> 1
