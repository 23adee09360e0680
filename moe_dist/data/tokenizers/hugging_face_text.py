"""A text tokenizer read from a Hugging Face folder: tokenizer.json and the names of the special tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moe_dist.core.errors import UserError, cut
from moe_dist.core.files import read_json
from moe_dist.data.tokenizers.chat_template import ChatTemplate, read_template

TOKENIZER, TOKENIZER_CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
MOST_IDS = 1 << 22


class HuggingFaceTokenizer:
    """A TextTokenizer read from a Hugging Face folder. Raises UserError if the folder holds no tokenizer.

    The tokens bos, eos and pad are those that tokenizer_config.json (or special_tokens_map.json) names. If there is no
    pad token, eos is used for padding. This leaves a pretrained model's vocabulary size unchanged, and it is safe
    because padding is masked.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            content = (folder / TOKENIZER).read_text(encoding="utf-8")
        except OSError:
            raise UserError(f"{folder} holds no {TOKENIZER} (data.text_tokenizer)") from None
        except UnicodeDecodeError:
            content = ""  # no tokenizer
        with _failures(f"{folder / TOKENIZER} is not a tokenizer"):
            self._tokenizer = Tokenizer.from_str(content)
        self._file = folder / TOKENIZER
        self._tokenizer.encode_special_tokens = True  # text that spells a special token is encoded as plain text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None  # or a text would get other ids at every call
        self.size: int = max(self._tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
        if self.size > MOST_IDS:
            raise UserError(f"{self._file} has the id {self.size - 1}, but ids must be below {MOST_IDS}")
        named: dict[str, Any] = {}
        for file in (folder / SPECIAL, folder / TOKENIZER_CONFIG):
            named |= read_json(file) if file.is_file() else {}
        self.bos, self.eos, self.pad = (self._id(named.get(f"{key}_token"), folder) for key in ("bos", "eos", "pad"))
        if self.pad is None:
            self.pad = self.eos
        self.chat = self._chat(folder, named)
        self.sha256 = hashlib.sha256(f"{content} {self.bos} {self.eos} {self.pad}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Encode a text as ids, without BOS or EOS. Raises UserError if the library fails to encode it."""
        with _failures(f"{self._file} cannot encode {cut(repr(text))}"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, dropping special tokens. Raises UserError if the library fails at these ids."""
        with _failures(f"{self._file} cannot decode {cut(repr(ids))}"):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _chat(self, folder: Path, named: dict[str, Any]) -> ChatTemplate:
        written = {key: _written(value) for key, value in named.items() if key.endswith("_token")}
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        names = {key: value for key, value in written.items() if value is not None}
        return ChatTemplate(folder, read_template(folder, named), self._encode_rendered, names, special)

    def _encode_rendered(self, text: str, special: bool) -> list[int]:
        """Encode a text.

        special: if True, the name of a special token in the text is encoded as this token. If False, it is encoded as
        plain text.
        """
        self._tokenizer.encode_special_tokens = not special
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def _id(self, token: object, folder: Path) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return None
        if not isinstance(content, str):
            raise UserError(
                f"{folder} names the special token {cut(repr(token))}, which is neither a text nor has a 'content'"
            )
        found = self._tokenizer.token_to_id(content)
        if found is None:
            raise UserError(f"{folder} names the special token {cut(repr(content))}, which its {TOKENIZER} lacks")
        return found


def _written(token: object) -> str | None:
    """Return the text of a special token in tokenizer_config.json, or None if there is none.

    token: either the text itself or a mapping with the text under `content`.
    """
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


@contextmanager
def _failures(sentence: str) -> Iterator[None]:
    """Raise UserError if the tokenizers library raises an exception in the `with` block.

    The message begins with `sentence`. The library raises plain Exception. If the library's Rust code panics, it
    raises PanicException, which is a BaseException.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{sentence}: {cut(str(error))}") from None
