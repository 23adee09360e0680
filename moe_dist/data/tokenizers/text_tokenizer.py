"""Text tokenizers: SentencePiece models (trained here on a corpus, or any .model file) and Hugging Face folders."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from moe_dist.core.errors import UserError
from moe_dist.core.files import read_json, write_file
from moe_dist.data.tokenizers.chat_template import CHAT_TEMPLATE, CHAT_TEMPLATE_JSON, ChatTemplate, read_template
from moe_dist.data.tokenizers.hugging_face_text import SPECIAL, TOKENIZER, TOKENIZER_CONFIG, HuggingFaceTokenizer

VOCAB_SIZE = 2048  # default, enough for captions; use 8192 or more for long texts
SENTENCEPIECE = "tokenizer.model"  # in a Hugging Face folder
# The files to copy with a tokenizer
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL, SENTENCEPIECE, CHAT_TEMPLATE, CHAT_TEMPLATE_JSON)
MAX_LINE_BYTES = 1 << 24  # SentencePiece silently skips longer lines; its own default is 4192

logger = logging.getLogger(__name__)


class TextTokenizer(Protocol):
    """Interface for tokenizers that encode text as ids and decode ids to text.

    The ids pad, bos and eos are None if the tokenizer lacks them.
    """

    size: int
    pad: int | None
    bos: int | None
    eos: int | None
    sha256: str  # equal exactly if every text gets the same ids
    chat: ChatTemplate

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def load_text_tokenizer(path: str | Path) -> TextTokenizer:
    """Load a text tokenizer from a Hugging Face folder or a SentencePiece file.

    If a Hugging Face folder has a tokenizer.model and no tokenizer.json, its tokenizer.model is loaded. Raises
    UserError if there is no such folder or file, or if it holds no tokenizer.
    """
    path = Path(path)
    if path.is_dir() and ((path / TOKENIZER).is_file() or not (path / SENTENCEPIECE).is_file()):
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path / SENTENCEPIECE if path.is_dir() else path)


def has_tokenizer(folder: Path) -> bool:
    """Return True if a Hugging Face folder has a tokenizer that load_text_tokenizer can load."""
    return any((folder / name).is_file() for name in (TOKENIZER, SENTENCEPIECE))


class SentencePieceTokenizer:
    """A TextTokenizer read from a SentencePiece file. Raises UserError if the file is missing or is not a model.

    Unknown characters become byte pieces or <unk>. If the model has no PAD, EOS is used for padding. This leaves a
    pretrained model's vocabulary size unchanged, and it is safe because padding is masked.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no SentencePiece model {path} (data.text_tokenizer)")
        content = path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except (RuntimeError, OSError, ValueError):  # ValueError: the library's message is not UTF-8
            raise UserError(f"{path} is not a SentencePiece model") from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.size: int = self._processor.get_piece_size()
        ids = (self._processor.pad_id(), self._processor.bos_id(), self._processor.eos_id())
        self.pad, self.bos, self.eos = (None if i < 0 else i for i in ids)
        if self.pad is None:
            self.pad = self.eos
        self._control = {self._processor.id_to_piece(i): i for i in range(self.size) if self._processor.is_control(i)}
        self.chat = self._chat(path)

    @property
    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(i) for i in range(self.size)]

    def encode(self, text: str) -> list[int]:
        """Encode a text as ids, without BOS or EOS."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, dropping control pieces (pad, bos, eos)."""
        return self._processor.decode([int(i) for i in ids])

    def _chat(self, path: Path) -> ChatTemplate:
        """Return the chat template from the folder of the model file.

        If the folder has no chat template, the returned ChatTemplate raises UserError when it is used.
        """
        config = path.parent / TOKENIZER_CONFIG
        source = read_template(path.parent, read_json(config) if config.is_file() else {})
        ids = {"bos_token": self.bos, "eos_token": self.eos}
        names = {name: self._processor.id_to_piece(i) for name, i in ids.items() if i is not None}
        return ChatTemplate(path, source, self._encode_rendered, names, list(self._control))

    def _encode_rendered(self, text: str, special: bool) -> list[int]:
        """Encode a text that a chat template has written.

        special: if true, each control piece in the text becomes its id, and the parts between control pieces are
        encoded separately. If false, control pieces are encoded like other text.
        """
        if not special or not self._control:
            return self.encode(text)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, self._control))})", text):
            if part:
                ids += [self._control[part]] if part in self._control else self.encode(part)
        return ids


def train_text_tokenizer(texts: Iterable[str], out: str | Path, vocab_size: int = VOCAB_SIZE) -> SentencePieceTokenizer:
    """Train a byte-pair encoding with byte fallback on texts, and write it to `out`.

    The same texts always give the same file. Encoding a text and decoding its ids gives the text back unchanged: there
    is no Unicode normalisation, and spaces are kept. If the texts are too few for vocab_size pieces, log a warning and
    use the largest vocabulary that they allow. Raises UserError if there is no text.
    """
    out = Path(out)
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError("the shards hold no captions or texts to train a text tokenizer on")
    try:
        content = _train(lines, vocab_size)
    except RuntimeError as error:
        allowed = re.search(r"Vocabulary size.*?<= (\d+)", str(error))
        if allowed is None:
            raise UserError(f"a text tokenizer of {vocab_size} pieces cannot be trained: {error}") from None
        logger.warning("the texts are too few for %d pieces: the text tokenizer has %s", vocab_size, allowed[1])
        content = _train(lines, int(allowed[1]))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, content)
    return SentencePieceTokenizer(out)


def _train(lines: Sequence[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=MAX_LINE_BYTES,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
