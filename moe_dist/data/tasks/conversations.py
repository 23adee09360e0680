"""Token ids of instructions, and which of them are learned.

A conversation is written by the tokenizer's chat template and tokenised as one text. The template also writes the
beginnings of the conversation: up to the place where an answer begins, and up to the place where it ends. The ids of a
beginning must be the first ids of the conversation. Their number is the position at which the answer begins or ends. An
answer includes what the template writes at its end, such as an end-of-turn token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from moe_dist.data.tasks.instructions import (
    ASSISTANT,
    Instruction,
    InstructionPrompt,
    Message,
    NoBoundary,
    instruction_ids,
)
from moe_dist.data.tokenizers.chat_template import ChatTemplate, RefusedConversation
from moe_dist.data.tokenizers.text_tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation as text and as ids."""

    chat: ChatTemplate
    text: str
    ids: list[int]

    def through_answer(self, begun: str, ended: str, answer: str) -> str:
        """Return the text up to the end of an answer.

        Usually, this is `ended`. However, some templates write the last answer of a conversation differently from
        earlier ones. For example, Qwen3's template adds empty thoughts to it. In this case, search the text for the
        answer after `begun`. The answer must be followed by the same text as in `ended`, such as an end-of-turn token.
        If it is not found, return `ended`.

        begun: the conversation up to the beginning of the answer. ended: the conversation up to the end of the answer.
        """
        _, found, closing = ended.rpartition(answer)
        at = self.text.find(answer, len(begun))
        through = self.text[: at + len(answer)] + closing
        usable = found and closing and at >= 0 and self.text.startswith(through)
        return through if usable and not self.text.startswith(ended) else ended

    def place(self, beginning: str) -> int:
        """Return the number of ids of `beginning`, a beginning of the text.

        Raises NoBoundary if the text does not start with `beginning`, or if the ids of `beginning` are not the first
        ids of the text.
        """
        if beginning == self.text:
            return len(self.ids)
        if not self.text.startswith(beginning):
            raise NoBoundary("the chat template rewrites earlier messages")
        for start in (beginning, beginning.rstrip()):  # blanks may belong to the same token as what follows them
            before = self.chat.encode(start)
            if self.ids[: len(before)] == before:
                return len(before)
        raise NoBoundary("prompt and answer merge")


def tokenised(tokenizer: TextTokenizer, instruction: Instruction, sample: int) -> tuple[list[int], InstructionPrompt]:
    """Return the ids of an instruction without the markers that packing adds, and its prompts.

    Raises NoBoundary if the ids of a prompt cannot be separated from those of an answer, or if the chat template
    refuses the conversation. Raises UserError if there is no chat template or if it fails.

    sample: the sample_hash.
    """
    if instruction.messages:
        try:
            return _conversation(tokenizer, instruction, sample)
        except RefusedConversation as reason:
            raise NoBoundary(f"refused by the chat template ({reason})") from None
    prompt, answer = instruction_ids(tokenizer, instruction.prompt, instruction.answer)
    return prompt + answer, InstructionPrompt(len(prompt), instruction.domain, sample)


def _conversation(
    tokenizer: TextTokenizer, instruction: Instruction, sample: int
) -> tuple[list[int], InstructionPrompt]:
    messages, chat = instruction.messages, tokenizer.chat
    text = chat.render(_plain(messages), generation=False)
    rendered = _Rendered(chat, text, chat.encode(text))
    answers = []
    for number in (number for number, message in enumerate(messages) if message.role == ASSISTANT):
        begun = chat.render(_plain(messages[:number]), generation=True)
        ended = chat.render(_plain(messages[: number + 1]), generation=False)
        through = rendered.through_answer(begun, ended, messages[number].content.strip())
        start, end = rendered.place(begun), rendered.place(through)
        if not start < end:
            raise NoBoundary("the chat template drops an answer")
        answers.append((start, end))
    own_bos = tokenizer.bos is not None and rendered.ids[:1] == [tokenizer.bos]
    cut = int(own_bos)  # packing adds BOS
    if answers[0][0] <= cut:
        raise NoBoundary("the chat template drops the prompt")
    later = [(end - cut, start - cut) for (_, end), (start, _) in pairwise(answers) if end < start]
    prompt = InstructionPrompt(
        length=answers[0][0] - cut,
        domain=instruction.domain,
        sample=sample,
        later=tuple(later),
        bos=tokenizer.bos is not None,
        eos=tokenizer.eos not in rendered.ids[answers[-1][0] :],
    )
    return rendered.ids[cut:], prompt


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
