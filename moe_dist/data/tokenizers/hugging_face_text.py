"""A text tokenizer read from a Hugging Face folder: tokenizer.json and the names of the special tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moe_dist.core.errors import UserError
from moe_dist.core.files import read_json

TOKENIZER, TOKENIZER_CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"


class HuggingFaceTokenizer:
    """A TextTokenizer read from a Hugging Face folder. Raises UserError if the folder holds no tokenizer.

    The tokens bos, eos and pad are those that tokenizer_config.json (or special_tokens_map.json) names. If there is no
    pad token, eos is used for padding. This leaves a pretrained model's vocabulary size unchanged, and it is safe
    because padding is masked.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            content = (folder / TOKENIZER).read_text()
            self._tokenizer = Tokenizer.from_str(content)
        except OSError:
            raise UserError(f"{folder} holds no {TOKENIZER} (data.text_tokenizer)") from None
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{folder / TOKENIZER} is not a tokenizer: {error}") from None
        self._tokenizer.encode_special_tokens = True  # text that spells a special token is encoded as plain text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size: int = self._tokenizer.get_vocab_size()
        named: dict[str, Any] = {}
        for file in (folder / SPECIAL, folder / TOKENIZER_CONFIG):
            named |= read_json(file) if file.is_file() else {}
        self.bos, self.eos, self.pad = (self._id(named.get(f"{key}_token"), folder) for key in ("bos", "eos", "pad"))
        if self.pad is None:
            self.pad = self.eos
        self.sha256 = hashlib.sha256(f"{content} {self.bos} {self.eos} {self.pad}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Encode a text as ids, without BOS or EOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, dropping special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _id(self, token: str | dict | None, folder: Path) -> int | None:
        content = token["content"] if isinstance(token, dict) else token
        if content is None:
            return None
        found = self._tokenizer.token_to_id(content)
        if found is None:
            raise UserError(f"{folder} names the special token {content!r}, which its {TOKENIZER} lacks")
        return found
