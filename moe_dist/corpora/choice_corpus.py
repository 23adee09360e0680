"""Corpus of multiple-choice questions about words (WordNet, Princeton's licence) and emoji (emojibase, MIT).

Each question has four options. The tasks are defined in choice_tasks.py.

Wrong options are drawn by hash from the answers to other questions of the same task, split and category. An answer that
occurs more often is drawn more often. Therefore a model cannot recognise a wrong option by its category, by its
frequency, or because it was never an answer in training. In every task and split, each letter is correct equally often.

All questions about a synset (a set of synonyms in WordNet) and its opposites are in the same split, whatever their
task. All questions about one emoji are in the same split, too.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from moe_dist.core.strict import Positive, Strict
from moe_dist.corpora.choice_tasks import Question, emoji_questions, gives_away, wordnet_questions
from moe_dist.corpora.emoji import NAMES, read_captions
from moe_dist.corpora.packages import fetch_debian, fetch_npm
from moe_dist.corpora.wordnet import WORDNET_PACKAGE, WordNet
from moe_dist.data.shards.tars import Sample

OPTION_LETTERS = "ABCD"
TRIES = 200  # number of draws for wrong options in the narrow category, and then again in the wide one


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    question: Question
    options: tuple[str, ...]
    correct: int


class MultipleChoice(Strict):
    """Corpus of multiple-choice questions about words and emoji.

    per_task: maximum number of questions per task, over all splits. The questions are chosen by hash.
    answer: the form of the answer. With "letter", options A to D follow the question, and the answer is a letter. With
    "text", the options precede the question, and the answer is the text of an option. A small model is correct much
    more often with "text" (docs/roma.md).
    """

    licence: ClassVar[str] = "WordNet 3.0 licence (Princeton University); emojibase MIT"

    per_task: Positive | None = None
    answer: Literal["letter", "text"] = "letter"

    def fetch(self, downloads: Path) -> None:
        fetch_debian([WORDNET_PACKAGE], downloads)
        fetch_npm([NAMES], downloads)

    def entries(self, downloads: Path) -> list[ChoiceQuestion]:
        questions = [*wordnet_questions(WordNet.read(downloads)), *emoji_questions(read_captions(downloads, base=True))]
        return balanced(with_wrong_options(questions), self.per_task)

    def sample(self, entry: ChoiceQuestion) -> Sample:
        question = entry.question
        prompt, answer = (by_letter if self.answer == "letter" else by_text)(entry)
        meta: dict[str, Any] = {
            "prompt": prompt,
            "answer": answer,
            "domain": question.task,
            "question": question.text,
            "options": list(entry.options),
            "correct": entry.correct,
            "concept": question.concept,
        }
        return Sample(question.key.lower(), question.split, None, None, meta)


def by_letter(choice: ChoiceQuestion) -> tuple[str, str]:
    """Return the prompt and the answer of a question. The answer is the letter of the correct option."""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(OPTION_LETTERS, choice.options, strict=True))
    return f"{choice.question.text}\n{options}\nAnswer:", f" {OPTION_LETTERS[choice.correct]}"


def by_text(choice: ChoiceQuestion) -> tuple[str, str]:
    """Return the prompt and the answer of a question. The answer is the text of the correct option."""
    prompt = f"Options: {', '.join(choice.options)}\nQuestion: {choice.question.text}\nAnswer:"
    return prompt, f" {choice.options[choice.correct]}"


def with_wrong_options(questions: Sequence[Question]) -> Iterator[tuple[Question, list[str]]]:
    """Yield each question with three wrong options, leaving out questions for which three cannot be found."""
    answers: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for question in questions:
        for category in set(question.categories):
            answers[question.task, question.split, category].append(question.answer)
    for question in questions:
        wrong: list[str] = []
        for attempt in range(2 * TRIES):
            pool = answers[question.task, question.split, question.categories[attempt // TRIES]]
            option = pool[_hash(f"{question.key} {attempt}") % len(pool)]
            if option not in question.excluded | {question.answer, *wrong} and not gives_away(question.text, option):
                wrong.append(option)
            if len(wrong) == len(OPTION_LETTERS) - 1:
                yield question, wrong
                break


def balanced(questions: Iterable[tuple[Question, list[str]]], per_task: int | None) -> list[ChoiceQuestion]:
    """Choose at most `per_task` questions per task (None: all), and assign a letter to each question's correct option.

    In every task and split, each letter is correct equally often.
    """
    seen: dict[str, int] = defaultdict(int)
    placed: dict[tuple[str, str], int] = defaultdict(int)
    choices = []
    for question, wrong in sorted(questions, key=lambda item: _hash(f"order {item[0].key}")):
        seen[question.task] += 1
        if per_task is None or seen[question.task] <= per_task:
            correct = placed[question.task, question.split] % len(OPTION_LETTERS)
            placed[question.task, question.split] += 1
            choices.append(ChoiceQuestion(question, (*wrong[:correct], question.answer, *wrong[correct:]), correct))
    return choices


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
