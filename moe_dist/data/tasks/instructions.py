"""Instruction samples: a prompt, optionally with an image, and the answer to learn.

A record of such a sample has the fields `prompt`, `answer` and possibly `domain`. A multiple-choice item also has
`options` and `correct`, and can have `question`. Other fields are ignored. Records in other forms, such as
conversations, are converted (data/tasks/records.py). Training and evaluation use the same layout:

  BOS prompt answer EOS   or   BOS BOI codes EOI prompt answer EOS

Prompt and answer are tokenised as one text. Its ids must begin with the ids of the prompt alone (see instruction_ids).
The remaining ids are the answer's. Only the answer and EOS contribute to the loss. For conversations, see
data/tasks/conversations.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from moe_dist.core.strict import Count, Strict, validate
from moe_dist.data.tokenizers.text_tokenizer import TextTokenizer


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


Filled = Annotated[str, AfterValidator(_filled)]
DOMAIN = "instructions"  # domain of the samples that name none
ASSISTANT = "assistant"  # role of the messages to be learned


class Message(NamedTuple):
    """A message of a conversation."""

    role: str
    content: str


class Instruction(Strict):
    """A validated instruction. If it is a conversation, `messages` holds all of its messages."""

    model_config = ConfigDict(extra="ignore")

    prompt: Filled
    answer: Filled  # appended to the prompt as it is, so it begins with a space if one is needed
    domain: Filled = DOMAIN  # the sample's topic; metrics are reported per domain
    question: Filled | None = None
    options: Annotated[tuple[Filled, ...], Field(min_length=2)] | None = None
    correct: Count | None = None  # index into options
    messages: tuple[Message, ...] = ()  # of a conversation: all messages. `prompt` and `answer` are the first ones
    picture: bool = False  # whether the record names a picture

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the text of each message. If there are no messages, return the prompt and answer as one text."""
        return tuple(message.content for message in self.messages) or (self.prompt + self.answer,)

    @model_validator(mode="after")
    def _choice(self):
        if (self.options is None) != (self.correct is None):
            raise ValueError("options and correct belong together")
        if self.options is not None and self.correct is not None and self.correct >= len(self.options):
            raise ValueError(f"correct={self.correct} is not an index into the {len(self.options)} options")
        return self


@dataclass(frozen=True, slots=True)
class InstructionPrompt:
    """The prompts, domain and sample hash of a tokenised instruction, and whether BOS and EOS are added to its text.

    The text of a tokenised instruction is the prompt followed by the answer. In a conversation, further prompts and
    answers follow.
    """

    length: int  # number of prompt ids at the beginning of the text
    domain: str
    sample: int  # sample_hash
    later: tuple[tuple[int, int], ...] = ()  # start and end of each further prompt in the text
    bos: bool = True  # whether BOS is put before the text
    eos: bool = True  # whether EOS is put after it; false if the chat template writes its own


def read_instruction(record: dict[str, Any], where: str) -> Instruction:
    """Validate an instruction's record and return it as an Instruction.

    Raises UserError if a field is missing or invalid. The error message begins with `where` and names the field.
    """
    return validate(Instruction, record, where)


class NoBoundary(Exception):
    """Raised if the ids of a prompt cannot be separated from those of its answer (see instruction_ids), or if the
    tokenizer returns no ids for a text.

    The exception's message gives the reason in a few words.
    """


def instruction_ids(tokenizer: TextTokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt and the ids of the answer. Together, they are the ids of the joined text.

    As in lm-evaluation-harness (`_encode_pair`), whitespace at the end of the prompt is moved to the answer, and both
    are tokenised as one text. The prompt gets the first n ids, where n is the number of ids of the prompt alone. This
    also works if the tokenizer adds tokens before every text. Raises NoBoundary if the first n ids are not those of the
    prompt alone, or if no ids remain for the answer.
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
