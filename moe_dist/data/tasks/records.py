"""Forms of instruction records: each JSON object in one of these forms becomes an Instruction.

  prompt and answer   the fields of Instruction (data/tasks/instructions.py)
  messages            [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]
  conversations       [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}, ...] (LLaVA)
  Alpaca              `instruction`, `input` (may be empty or missing) and `output`

Every form may have a `domain`. In a record with messages or conversations, `image` or the list `images` names the
picture. The picture is another member of the sample. If a `content` is a list of parts, the parts of type `text` are
joined. Messages after the last answer are not used. The prompt of a conversation is the text of all messages before
the first answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import AliasChoices, ConfigDict, Field

from moe_dist.core.errors import cut
from moe_dist.core.strict import Strict, validate
from moe_dist.data.tasks.instructions import ASSISTANT, DOMAIN, Filled, Instruction, Message, read_instruction

ROLES = {"human": "user", "user": "user", "gpt": ASSISTANT, ASSISTANT: ASSISTANT, "system": "system"}
IMAGE_PLACEHOLDER = "<image>"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
FORM_FIELDS = {  # the fields that are read of each form
    "prompt": frozenset(Instruction.model_fields) - {"messages", "picture"},
    "messages": frozenset({"messages", "image", "images", "domain"}),
    "conversations": frozenset({"conversations", "image", "images", "domain"}),
    "alpaca": frozenset({"instruction", "input", "output", "domain"}),
}


class BadRecord(Exception):
    """Raised for a record that has the right fields but cannot be learned from. The message is the reason."""


class _Record(Strict):
    model_config = ConfigDict(extra="ignore")


class _Part(_Record):
    type: str
    text: str = ""


class _Message(_Record):
    role: Filled
    content: str | list[_Part] | None = None
    tool_calls: list[Any] | None = None


class _Pictured(_Record):
    """A record that may name a picture."""

    image: str | list[str] | None = None
    images: list[str] | None = None
    domain: Filled = DOMAIN

    @property
    def pictures(self) -> int:
        """Return the number of pictures that the record names."""
        named = [self.image] if isinstance(self.image, str) else self.image or []
        return len([name for name in (*named, *(self.images or [])) if name])


class _Messages(_Pictured):
    messages: list[_Message]


class _Turn(_Record):
    speaker: Filled = Field(validation_alias=AliasChoices("from", "role"))
    value: str = Field(validation_alias=AliasChoices("value", "content"))


class _Conversations(_Pictured):
    conversations: list[_Turn]


class _Alpaca(_Record):
    instruction: Filled
    input: str | None = None
    output: str
    domain: Filled = DOMAIN


def form_of(record: Mapping[str, object]) -> str | None:
    """Return the key of the record's form in FORM_FIELDS, or None if the record is not an instruction.

    If a record has the fields of several forms, the first of these forms is used: prompt and answer, messages,
    conversations, Alpaca.
    """
    if "prompt" in record and "answer" in record:
        return "prompt"
    lists = [name for name in ("messages", "conversations") if isinstance(record.get(name), list)]
    if lists:
        return lists[0]
    if "instruction" in record and "output" in record:
        return "alpaca"
    return "prompt" if "prompt" in record or "answer" in record else None


def to_instruction(record: Mapping[str, Any], where: str) -> Instruction:
    """Validate a record in one of the supported forms, and return it as an Instruction.

    Raises UserError if a field is missing or has the wrong type; the message begins with `where` and names the field.
    Raises BadRecord if there is nothing to learn: an empty answer, an unknown speaker, no prompt or no answer.
    """
    form = form_of(record)
    raw = {name: value for name, value in record.items() if name in FORM_FIELDS[form or "prompt"]}
    if form == "messages":
        return _from_messages(validate(_Messages, raw, where))
    if form == "conversations":
        return _from_turns(validate(_Conversations, raw, where))
    if form == "alpaca":
        return _from_alpaca(validate(_Alpaca, raw, where))
    return read_instruction(raw, where)


def _from_messages(record: _Messages) -> Instruction:
    if any(message.tool_calls for message in record.messages):
        raise BadRecord("message with tool_calls, which are not supported")
    parts = [part.type for message in record.messages if isinstance(message.content, list) for part in message.content]
    if unknown := sorted(set(parts) - {"text", "image"}):
        raise BadRecord(f"message part of type {cut(unknown[0])}")
    messages = [Message(message.role, _text(message.content)) for message in record.messages]
    if not record.pictures:  # then `<image>` is text
        return _conversation(messages, record.domain, pictures=parts.count("image"))
    return _with_placeholders(messages, record)


def _text(content: str | list[_Part] | None) -> str:
    return "".join(part.text for part in content) if isinstance(content, list) else content or ""


def _from_turns(record: _Conversations) -> Instruction:
    if unknown := [turn.speaker for turn in record.conversations if turn.speaker not in ROLES]:
        raise BadRecord(f"conversation with the unknown speaker '{cut(unknown[0])}'")
    return _with_placeholders([Message(ROLES[turn.speaker], turn.value) for turn in record.conversations], record)


def _with_placeholders(messages: Sequence[Message], record: _Pictured) -> Instruction:
    """Make an instruction from messages in which `<image>` marks the place of the picture."""
    placed = sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages)
    plain = [Message(message.role, _without_placeholder(message.content)) for message in messages]
    return _conversation(plain, record.domain, pictures=max(placed, record.pictures))


def _without_placeholder(text: str) -> str:
    """Remove `<image>` and the line break that divides it from the text."""
    for written in (f"{IMAGE_PLACEHOLDER}\n", f"\n{IMAGE_PLACEHOLDER}", IMAGE_PLACEHOLDER):
        text = text.replace(written, "")
    return text


def _conversation(messages: Sequence[Message], domain: str, *, pictures: int) -> Instruction:
    if pictures > 1:
        raise BadRecord("conversation with several pictures")
    answers = [number for number, message in enumerate(messages) if message.role == ASSISTANT]
    if not answers:
        raise BadRecord("conversation without an answer")
    if not all(messages[number].content.strip() for number in answers):
        raise BadRecord("conversation with an empty answer")
    prompt = "\n".join(message.content for message in messages[: answers[0]])
    if not prompt.strip():
        raise BadRecord("conversation without a prompt")
    used = tuple(messages[: answers[-1] + 1])
    answer = messages[answers[0]].content
    return Instruction(prompt=prompt, answer=answer, domain=domain, messages=used, picture=pictures == 1)


def _from_alpaca(record: _Alpaca) -> Instruction:
    """Make an instruction with the prompt of Stanford Alpaca. Raises BadRecord if the output is empty.

    The answer begins with a space. Without it, many tokenizers would join the answer to the `:` at the end of the
    prompt.
    """
    if not record.output.strip():
        raise BadRecord("empty output")
    form = ALPACA_WITH_INPUT if record.input and record.input.strip() else ALPACA
    prompt = form.format(instruction=record.instruction, input=record.input)
    return Instruction(prompt=prompt, answer=f" {record.output.lstrip()}", domain=record.domain)
