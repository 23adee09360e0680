"""Sound tokenizers for the tests of this folder."""

import pytest

from tests.support.fuzz_cases import Tokenizers


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    return Tokenizers(tmp_path_factory.mktemp("sound"))
