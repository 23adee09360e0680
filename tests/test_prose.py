"""No docstring, comment, message or page has a phrase that CONTRIBUTING.md bans; planted phrases are found."""

import pytest

from tests.support import prose

CLEAN = '"""A module."""\n\n\ndef f():\n    """Return the number of tokens that are looked up, smallest first."""\n'
WRAPPED = "# Whatever was\n# looked\n# at once.\n"


def test_no_file_has_a_banned_phrase_or_a_long_line(capsys):
    assert prose.main() == 0, capsys.readouterr().out


def test_the_command_names_what_it_finds(monkeypatch, capsys):
    monkeypatch.setattr(prose, "project_findings", lambda: ["b.py:1: 'told'"])
    assert prose.main() == 1
    assert capsys.readouterr().out == "b.py:1: 'told'\n"


@pytest.mark.parametrize(
    ("path", "source", "line"),
    [
        ("a.py", '"""Of what the ranks share, the sum."""', 1),
        ("a.py", CLEAN.replace("Return the", "What the"), 5),
        ("a.py", CLEAN.replace("Return the", "Return so\n    many"), 5),
        ("a.py", CLEAN + "\n\nclass A:\n    '''Whether it is.'''\n", 9),
        ("a.py", CLEAN + "    raise ValueError(f'{f} is none of {len(f)}')\n", 6),
        ("a.py", CLEAN + "    x = 1  # it is told\n", 6),
        ("a.py", CLEAN + WRAPPED, 7),
        ("docs/a.md", "A study\nin small, by two.\n", 2),
        ("docs/a.md", "# Title\n\nAnswered rightly.\n", 3),
        ("docs/a.md", "word " * 24 + "\n", 1),
    ],
)
def test_a_planted_phrase_is_found(path, source, line):
    found = list(prose.findings(path, source))
    assert len(found) == 1 and found[0].startswith(f"{path}:{line}: "), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("a.py", CLEAN),
        ("a.py", CLEAN + "    wholly = 'untold'  # Of the two, the first: bf16 logits of in small vocabularies\n"),
        ("a.py", "# one is\n\n# none\n"),
        ("docs/a.md", "An error, if there\nis none.\n"),
        ("docs/a.md", "The flag `is none` and\n\n```python\ntold = 1\n```\n\n    looked at\n"),
        ("docs/a.md", "| " + "cell " * 40 + "|\n"),
        ("docs/a.md", "x" * 119 + "\n"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert not list(prose.findings(path, source))
