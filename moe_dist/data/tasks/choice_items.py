"""Multiple-choice items, read from the instruction samples in a split's shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.data.shards.sample_report import SampleReport
from moe_dist.data.shards.tars import Split, iterate, resolve_shards
from moe_dist.data.tasks.instructions import Instruction, NoBoundary, instruction_ids
from moe_dist.data.tokenizers.text_tokenizer import TextTokenizer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Choice:
    """The first token of each option of a multiple-choice item, and the correct option."""

    tokens: tuple[int, ...]
    correct: int  # index into tokens

    @property
    def ambiguous(self) -> bool:
        """True if the correct option begins with the same token as another option.

        An option is scored by its first token, so no model can answer such an item.
        """
        return self.tokens.count(self.tokens[self.correct]) > 1


def read_instructions(data: DataConfig, split: Split) -> dict[int, Instruction]:
    """Return the instruction samples of a split, keyed by sample hash (sample_S in the batch's sidecar)."""
    return dict(_instructions(data, split))


def _instructions(data: DataConfig, split: Split) -> Iterator[tuple[int, Instruction]]:
    for shard in resolve_shards(data.shards, split, data.validation_shards, data.validation_fraction):
        for sample in iterate(shard):
            if sample.instruction is not None:
                yield sample.hash, sample.instruction


def read_choices(data: DataConfig, split: Split, tokenizer: TextTokenizer) -> tuple[Mapping[int, Choice], SampleReport]:
    """Return a split's multiple-choice items, keyed by sample hash, and a report on the items that are left out.

    An item is left out if the tokens of its prompt cannot be separated from the tokens of an option. The sample hash
    does not depend on the options. If items with the same hash give different Choices, all of them are left out.

    Raises UserError if a sample is not a multiple-choice item, if items differ in their number of options, if more than
    data.max_bad_fraction of the items are left out, or if all items are ambiguous.
    """
    instructions: dict[int, list[Instruction]] = {}
    for sample, instruction in _instructions(data, split):
        instructions.setdefault(sample, []).append(instruction)
    report = SampleReport(len(instructions))
    choices = {}
    for sample, items in instructions.items():
        try:
            found = {_choice(item, tokenizer): None for item in items}
            if len(found) > 1:
                raise NoBoundary("items with the same prompt and different options")
            choices[sample] = next(iter(found))
        except NoBoundary as reason:
            report.add_bad(str(reason), f"'{items[0].prompt[:60]}...'")
    if report.bad:
        report.check(data.max_bad_fraction)
    _check_options(choices)
    return choices, report


def _check_options(choices: Mapping[int, Choice]) -> None:
    """Raise UserError if items differ in their number of options, or if all items are ambiguous."""
    counts = sorted({len(choice.tokens) for choice in choices.values()})
    if len(counts) > 1:
        raise UserError(
            f"the multiple-choice items have {' or '.join(map(str, counts))} options, but all must have the same number"
        )
    if choices and all(choice.ambiguous for choice in choices.values()):
        raise UserError(
            "in every multiple-choice item the correct option begins with the same token as another one, so no model "
            "can be right: an option is scored by its first token, so answer by letter or use another text tokenizer"
        )


def _choice(instruction: Instruction, tokenizer: TextTokenizer) -> Choice:
    """Return the first token of each option, and the index of the correct option.

    Raises UserError if the sample is not a multiple-choice item. Raises NoBoundary if the ids of the prompt cannot be
    separated from the ids of an option.
    """
    options, correct = written_options(instruction)
    ids = [instruction_ids(tokenizer, instruction.prompt, option)[1] for option in options]
    return Choice(tuple(of_option[0] for of_option in ids), correct)


def written_options(instruction: Instruction) -> tuple[list[str], int]:
    """Return the possible answers to a sample, one for each option, and the index of the correct one.

    If the sample's answer is a letter, all returned answers are letters. Otherwise, they are the texts of the options.
    Each begins with the same whitespace as the sample's answer. Raises UserError if the sample is not a multiple-choice
    item.
    """
    answer, options, correct = instruction.answer, instruction.options, instruction.correct
    blanks = answer[: len(answer) - len(answer.lstrip())]
    for names in (LETTERS, options or ()):
        if options is not None and correct is not None and answer == blanks + names[correct]:
            return [blanks + name for name, _ in zip(names, options)], correct
    raise UserError(
        f"the sample '{instruction.prompt[:60]}...' is not a multiple-choice item: its answer '{instruction.answer}' "
        "is neither the letter nor the text of its correct option"
    )
