"""WordNet 3.0 (Princeton), read from Debian's wordnet-base: its synsets, and each word's senses, most common first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_dist.corpora.packages import read_debian

WORDNET_PACKAGE = "wordnet-base"
FOLDER = "usr/share/wordnet"
PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}  # file suffix -> part of speech
NOUN_FIELDS = (  # names of lexicographer files 3 to 28, see lexnames(5WN)
    "unique beginner",
    "act",
    "animal",
    "artifact",
    "attribute",
    "body part",
    "thought",
    "communication",
    "event",
    "feeling",
    "food",
    "group",
    "place",
    "motive",
    "natural object",
    "person",
    "natural phenomenon",
    "plant",
    "possession",
    "process",
    "quantity",
    "relation",
    "shape",
    "state",
    "substance",
    "time",
)
FIRST_NOUN_FIELD = 3


@dataclass(frozen=True, slots=True)
class Synset:
    id: str  # part of speech and offset, e.g. n02084071: the same in every copy of WordNet 3.0
    field: int  # number of its lexicographer file, which is a topic for nouns and verbs only
    words: tuple[str, ...]
    definition: str
    hypernyms: tuple[str, ...]  # ids
    antonyms: tuple[tuple[str, str, str], ...]  # word of this synset, id of the other synset, its word

    @property
    def noun_field(self) -> str:
        return NOUN_FIELDS[self.field - FIRST_NOUN_FIELD]


@dataclass(frozen=True, slots=True)
class WordNet:
    synsets: dict[str, Synset]
    senses: dict[tuple[str, str], tuple[str, ...]]  # (part of speech, word) -> ids of its synsets, most common first

    @classmethod
    def read(cls, downloads: Path) -> WordNet:
        names = {f"{FOLDER}/{kind}.{part}" for kind in ("data", "index") for part in PARTS}
        contents = read_debian(WORDNET_PACKAGE, downloads, names.__contains__)
        files = {path: content.decode() for path, content in contents.items()}
        rows: dict[str, tuple[str, str, str]] = {}
        senses = {}
        for part, pos in PARTS.items():
            rows |= {pos + line[:8]: line.partition("|") for line in _lines(files[f"{FOLDER}/data.{part}"])}
            for line in _lines(files[f"{FOLDER}/index.{part}"]):
                fields = line.split()
                offsets = fields[-int(fields[2]) :]
                senses[pos, fields[0].replace("_", " ")] = tuple(pos + offset for offset in offsets)
        words = {id: _words(head.split()) for id, (head, _, _) in rows.items()}
        return cls({id: _synset(id, head.split(), gloss, words) for id, (head, _, gloss) in rows.items()}, senses)

    def synsets_of(self, pos: str, word: str) -> list[Synset]:
        """Return the synsets of all senses of a word, with the most common sense first.

        pos: the part of speech, one of the values of PARTS.
        """
        return [self.synsets[id] for id in self.senses.get((pos, word.lower()), ())]

    def headword(self, synset: Synset) -> str | None:
        """Return the synset's first word if this synset is the word's most common sense.

        Return None otherwise, or if the word does not consist of lower-case letters only.
        """
        word = synset.words[0]
        return word if is_plain(word) and self.senses[synset.id[0], word][0] == synset.id else None

    def ancestors(self, synset: Synset) -> Iterator[Synset]:
        """Yield the synset's hypernyms, direct and indirect. Those of a dog are canine, carnivore, animal and so on."""
        for id in synset.hypernyms:
            yield self.synsets[id]
            yield from self.ancestors(self.synsets[id])


def is_plain(word: str) -> bool:
    """Return True if `word` consists of lower-case letters only. Names and phrases contain other characters."""
    return re.fullmatch(r"[a-z]+", word) is not None


def _lines(content: str) -> Iterator[str]:
    return (line for line in content.splitlines() if not line.startswith("  "))  # skip the licence at the top


def _words(fields: list[str]) -> tuple[str, ...]:
    """Return the words of a synset, read from a line of WordNet's data files.

    An adjective's position marker is removed: `galore(ip)` -> `galore`.

    fields: the fields before the definition; see wndb(5WN).
    """
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    return tuple(word.partition("(")[0].replace("_", " ") for word in words)


def _synset(id: str, fields: list[str], gloss: str, words: dict[str, tuple[str, ...]]) -> Synset:
    at = 4 + 2 * int(fields[3], 16)
    pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
    targets = [(symbol, part.replace("s", "a") + offset, places) for symbol, offset, part, places in pointers]
    antonyms = [
        (words[id][int(places[:2], 16) - 1], other, words[other][int(places[2:], 16) - 1])
        for symbol, other, places in targets
        if symbol == "!"
    ]
    return Synset(
        id=id,
        field=int(fields[1]),
        words=words[id],
        definition=re.sub(r'[;,:]?\s*"[^"]*"?.*', "", gloss).strip(" ;"),
        hypernyms=tuple(other for symbol, other, _ in targets if symbol in ("@", "@i")),
        antonyms=tuple(antonyms),
    )
