"""Multiple-choice items, read from the instruction samples in a split's shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.data.shards.tars import Split, iterate, resolve_shards
from moe_dist.data.tasks.instructions import Instruction
from moe_dist.data.tokenizers.text_tokenizer import TextTokenizer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Choice:
    """The first token of each option of a multiple-choice item, and the correct option."""

    tokens: tuple[int, ...]
    correct: int  # index into tokens


def read_instructions(data: DataConfig, split: Split) -> dict[int, Instruction]:
    """Read the instruction samples of a split by sample hash, which is sample_S in the batch's sidecar."""
    return {
        sample.hash: sample.instruction
        for shard in resolve_shards(data.shards, split, data.validation_shards)
        for sample in iterate(shard)
        if sample.instruction is not None
    }


def read_choices(data: DataConfig, split: Split, tokenizer: TextTokenizer) -> Mapping[int, Choice]:
    """Read a split's multiple-choice items by sample hash.

    Raises UserError if a sample is not a multiple-choice item, or if items differ in their number of options.
    """
    instructions = read_instructions(data, split)
    choices = {sample: _choice(instruction, tokenizer) for sample, instruction in instructions.items()}
    counts = sorted({len(choice.tokens) for choice in choices.values()})
    if len(counts) > 1:
        raise UserError(
            f"the multiple-choice items have {' or '.join(map(str, counts))} options, but all must have the same number"
        )
    return choices


def _choice(instruction: Instruction, tokenizer: TextTokenizer) -> Choice:
    """Tokenize the options as the answer is written: by letter or by their text. Raises UserError."""
    options, correct = instruction.options, instruction.correct
    for names in (LETTERS, options or ()):
        if options is not None and correct is not None and instruction.answer == f" {names[correct]}":
            tokens = [tokenizer.encode_continuation(f" {name}")[0] for name, _ in zip(names, options)]
            return Choice(tuple(tokens), correct)
    raise UserError(
        f"the sample '{instruction.prompt[:60]}...' is not a multiple-choice item: its answer '{instruction.answer}' "
        "is neither the letter nor the text of its correct option"
    )
