"""2,000 damaged tars, JSON members, tokenizer folders and recipes: each gives a result or one sentence, twice the same.

`make test` tries 200 of them, `make test-long` all. A failure names the case: KIND NUMBER.
`python -m tests.support.fuzz_cases KIND NUMBER NUMBER+1` shows it alone.
"""

import shutil

import pytest

from tests.support.fuzz_cases import CASES, KINDS, run_case
from tests.support.fuzz_launches import launch_case, prepare
from tests.support.long import LONG

CHUNK = 50
LAUNCHES = 20


@pytest.mark.parametrize("first", range(0, CASES if LONG else CHUNK, CHUNK))
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_gives_a_result_or_one_sentence(kind, first, sound, tmp_path, capsys):
    folder = tmp_path / "case"
    for number in range(first, first + CHUNK):
        outcomes = []
        for _ in range(2):
            folder.mkdir()
            try:
                outcomes.append(run_case(kind, number, folder, sound))
            except BaseException as error:
                raise AssertionError(f"{kind} {number}") from error
            shutil.rmtree(folder)
        assert outcomes[0] == outcomes[1], f"{kind} {number}"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(LAUNCHES))
def test_a_launch_on_damaged_input_ends_well_or_with_one_sentence(number, sound, tmp_path):
    launch_case(prepare(number, tmp_path, sound))
