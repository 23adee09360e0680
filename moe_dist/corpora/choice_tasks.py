"""Multiple-choice questions from WordNet and emojibase, in six tasks. Wrong options are added in choice_corpus.py.

The tasks, their questions, and the words to which a question is restricted:

  definition  which word has this definition        nouns and verbs in their most common sense
  category    what kind of thing is it              nouns whose senses are all of one kind
  hypernym    what is the more general word         nouns
  synonym     which word means the same
  antonym     which word is the opposite
  emoji       which emoji has these keywords

Words that give the answer away are removed from a question. If too few words remain, the question is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_dist.corpora.emoji import base_concept
from moe_dist.corpora.wordnet import NOUN_FIELDS, Synset, WordNet, is_plain
from moe_dist.data.shards.tars import Split, split_of

BLANK = "___"  # replaces a word that gives the answer away
FEWEST_WORDS = 3  # least number of words in a definition, not counting blanks and words of up to 3 letters
FEWEST_KEYWORDS = 1


@dataclass(frozen=True, slots=True)
class Question:
    task: str
    id: str  # id of the synset or code of the emoji
    concept: str  # base emoji without variants, or the synset's set of opposites; determines the split in all tasks
    text: str
    answer: str
    categories: tuple[str, str]  # a narrow and a wide category, from which wrong options are drawn
    excluded: frozenset[str]  # options that would also be correct, or nearly so

    @property
    def key(self) -> str:
        return f"{self.task}-{self.id}"

    @property
    def split(self) -> Split:
        return split_of(self.concept)


def related(one: str, other: str) -> bool:
    """Return whether two words look like forms of the same word, such as happy and unhappy, or decide and decision."""
    short, long = sorted((one.lower(), other.lower()), key=len)
    if len(short) <= 3:
        return long.startswith(short) and len(long) - len(short) <= 3
    same = next((i for i, pair in enumerate(zip(short, long)) if pair[0] != pair[1]), len(short))
    return short in long or same >= max(4, len(short) - 3)


def gives_away(text: str, answer: str) -> bool:
    """Return whether the text gives the answer away: one of its words looks like a form of a word in the answer."""
    return any(related(word, part) for word in _words(text) for part in _words(answer))


def opposites(wordnet: WordNet) -> dict[str, str]:
    """Map each synset's id to an id that it shares with its opposites, the opposites of its opposites, and so on.

    The shared id is the smallest of their ids.
    """
    concept: dict[str, str] = {}
    for first in sorted(wordnet.synsets):
        reached = [first]
        while reached:
            id = reached.pop()
            if concept.setdefault(id, first) == first:
                reached += [other for _, other, _ in wordnet.synsets[id].antonyms if other not in concept]
    return concept


def wordnet_questions(wordnet: WordNet) -> Iterator[Question]:
    """Yield the questions of all tasks except emoji, in the order of the synsets in WordNet's files."""
    concepts = opposites(wordnet)
    for synset in wordnet.synsets.values():
        word = wordnet.headword(synset)
        drafts = {"antonym": _antonym(wordnet, synset)}
        if word is not None:
            drafts["synonym"] = _synonym(wordnet, synset, word)
            if synset.id[0] in "nv":
                drafts["definition"] = _definition(wordnet, synset, word)
            if synset.id[0] == "n":
                drafts |= {"category": _category(wordnet, synset, word), "hypernym": _hypernym(wordnet, synset, word)}
        for task, draft in drafts.items():
            if draft is not None:
                text, answer, excluded = draft
                part = synset.id[0]
                categories = (part, part) if task == "category" else (f"{part}{synset.field}", part)
                yield Question(task, synset.id, concepts[synset.id], text, answer, categories, frozenset(excluded))


def emoji_questions(emoji: Mapping[str, Mapping[str, Any]]) -> Iterator[Question]:
    """Yield the questions of the emoji task: at most one for each emoji, whatever the number of its variants.

    The question is about the variant with the shortest code.

    emoji: maps each code to the emoji's label, keywords and group, as returned by emoji.read_captions.
    """
    first: dict[str, str] = {}
    for code in sorted(emoji, key=lambda code: (len(code), code)):
        first.setdefault(base_concept(code), code)
    for concept, code in first.items():
        name = emoji[code]["label"]
        keywords = [word for word in emoji[code]["keywords"] if not gives_away(word, name)]
        if len(keywords) >= FEWEST_KEYWORDS:
            fitting = {e["label"] for e in emoji.values() if {*keywords} <= {*e["keywords"], *_words(e["label"])}}
            text = f"Which emoji has the keywords {', '.join(keywords)}?"
            yield Question("emoji", code, concept, text, name, (emoji[code]["group"], "emoji"), frozenset(fitting))


Draft = tuple[str, str, set[str]]  # text, answer, excluded


def _definition(wordnet: WordNet, synset: Synset, word: str) -> Draft | None:
    blanked = re.sub(r"[A-Za-z]+", lambda found: BLANK if related(found[0], word) else found[0], synset.definition)
    if sum(len(found) > 3 for found in _words(blanked)) < FEWEST_WORDS:
        return None
    near = {*synset.words, *(other for id in synset.hypernyms for other in wordnet.synsets[id].words)}
    return f"Which word means: {blanked}?", word, near


def _category(wordnet: WordNet, synset: Synset, word: str) -> Draft | None:
    fields = {sense.field for sense in wordnet.synsets_of("n", word)}
    if len(fields) > 1 or synset.noun_field == NOUN_FIELDS[0] or gives_away(word, synset.noun_field):
        return None
    return f"What kind of thing is {word}?", synset.noun_field, set()


def _hypernym(wordnet: WordNet, synset: Synset, word: str) -> Draft | None:
    parents = [wordnet.synsets[id] for id in synset.hypernyms]
    more_general = next((name for parent in parents if (name := wordnet.headword(parent))), None)
    if more_general is None or gives_away(word, more_general):
        return None
    above = {name for ancestor in wordnet.ancestors(synset) for name in ancestor.words}
    return f"Which is a more general word for {word}?", more_general, {*above, word}


def _synonym(wordnet: WordNet, synset: Synset, word: str) -> Draft | None:
    others = [other for other in synset.words[1:] if is_plain(other) and not related(word, other)]
    if not others:
        return None
    same = {other for sense in wordnet.synsets_of(synset.id[0], word) for other in sense.words}
    return f"Which word means the same as {word}?", others[0], same


def _antonym(wordnet: WordNet, synset: Synset) -> Draft | None:
    for word, id, opposite in synset.antonyms:
        if is_plain(word) and is_plain(opposite) and not related(word, opposite):
            right = {word, *synset.words, *wordnet.synsets[id].words}
            for sense in wordnet.synsets_of(synset.id[0], word):
                right |= {other for _, _, other in sense.antonyms}
            return f"Which word is the opposite of {word}?", opposite, right
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)
