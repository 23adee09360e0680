"""Prompts for a model, and the tokens that may follow a prompt.

A prompt and the tokens after it form a document in the format of data/stream/packing.py.

  text -> image   BOS caption BOI | codes
  image -> text   BOS BOI codes EOI | caption EOS
  mixed           BOS parts | parts EOS   (a part is a text, or an image as BOI codes EOI)

The model generates the tokens after `|`. An image has exactly the tokenizer's number of codes, and only codes occur
between BOI and EOI. Guidance also needs the logits for the prompt without its caption, BOS BOI. Such sequences occur in
training with data.caption_dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moe_dist.core.batch import IMAGE
from moe_dist.core.errors import UserError
from moe_dist.data.shards.samples import BadSample, decode_image
from moe_dist.data.tokenizers.image_tokenizer import ImageTokenizer
from moe_dist.data.tokenizers.pixels import crop_and_resize, scale_pixels
from moe_dist.data.tokenizers.vocabulary import Vocabulary

Task = Literal["image", "text", "mixed"]
Part = str | Image.Image


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, both as parts (texts and pictures) and as token ids."""

    task: Task
    parts: tuple[Part, ...]
    tokens: tuple[int, ...]
    unconditional: tuple[int, ...] | None = None  # the prompt without its caption, for guidance


@dataclass(slots=True)
class GenerationState:
    """The state of a sample that is being generated: the prompt and the tokens generated so far."""

    number: int  # index among the samples of all ranks; keys the random draws
    prompt: Prompt
    limit: int  # maximum length in tokens, including the prompt
    generated: list[int] = field(default_factory=list)
    codes_left: int = 0  # codes left in the current image; -1: its EOI is next
    done: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + len(self.generated)


class Format:
    """The document format for one vocabulary and context length. It builds prompts and says which tokens may follow.

    context: the maximum length of a document in tokens (data.sequence_length).
    """

    TEXT, TEXT_OR_IMAGE, CODE, EOI = range(4)  # kinds of token allowed next

    def __init__(self, vocabulary: Vocabulary, context: int):
        self.vocabulary, self.context = vocabulary, context
        self.num_codes = vocabulary.image.num_codes if vocabulary.image else 0
        self.cannot_draw = self._try_to_draw()  # if set, mixed samples get no images, but prompts may contain them
        code_V = vocabulary.modality_of == IMAGE
        text_V = ~code_V
        for marker in {vocabulary.pad, vocabulary.bos, vocabulary.boi, vocabulary.eoi} - {vocabulary.eos, None}:
            text_V[marker] = False
        boi_V, eoi_V = torch.zeros_like(text_V), torch.zeros_like(text_V)
        if vocabulary.boi is not None:
            boi_V[vocabulary.boi] = eoi_V[vocabulary.eoi] = True
        self.masks_KV: Tensor = torch.stack([text_V, text_V | boi_V, code_V, eoi_V])  # bool; K: kind of token

    def _try_to_draw(self) -> UserError | None:
        """Try to decode an image. Return the error if there is no image tokenizer or no decoder, otherwise None.

        `text_to_image` raises the returned error.
        """
        try:
            self._image_tokenizer("make").decode(torch.zeros(1, self.num_codes, dtype=torch.int64))
        except UserError as error:
            return error
        return None

    # ------------------------------------------------------------------------------------------------------- prompts

    def text_to_image(self, caption: str) -> Prompt:
        """Build a prompt for generating an image from a caption.

        Raises UserError if the caption is not UTF-8, if the prompt with its image is too long, or if images cannot be
        decoded.
        """
        if self.cannot_draw:
            raise self.cannot_draw
        v = self.vocabulary
        assert v.boi is not None
        text = self._text(caption)
        needed = len(text) + self.num_codes + 4
        if needed > self.context:
            raise UserError(
                f"'{_short(caption)}': {len(text)} tokens, an image of {self.num_codes} codes and 4 markers "
                f"need {needed}, and data.sequence_length={self.context} would cut the image"
            )
        return Prompt("image", (caption,), (v.bos, *text, v.boi), (v.bos, v.boi))

    def image_to_text(self, picture: Image.Image) -> Prompt:
        """Build a prompt for generating a picture's caption.

        Raises UserError if the prompt is too long, or if pictures cannot be encoded.
        """
        return self._checked("text", (picture,))

    def mixed(self, parts: Sequence[Part]) -> Prompt:
        """Build a prompt from texts and pictures, to be continued with texts and pictures.

        Raises UserError if a text is not UTF-8, if the prompt is too long, or if pictures cannot be encoded.
        """
        return self._checked("mixed", parts)

    def _checked(self, task: Task, parts: Sequence[Part]) -> Prompt:
        tokens = [self.vocabulary.bos]
        for part in parts:
            tokens += self._text(part) if isinstance(part, str) else self._picture(part)
        if len(tokens) >= self.context:
            raise UserError(
                f"the prompt has {len(tokens)} tokens: data.sequence_length={self.context} has no room for more"
            )
        return Prompt(task, tuple(parts), tuple(tokens))

    def _text(self, text: str) -> list[int]:
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes of a command line that are not UTF-8
            raise UserError(f"the prompt {text!a} is not UTF-8 text")
        return self.vocabulary.text.encode(text)

    def _picture(self, picture: Image.Image) -> list[int]:
        image, v = self._image_tokenizer("read"), self.vocabulary
        assert v.boi is not None and v.eoi is not None
        pixels_1HW3 = np.asarray(crop_and_resize(picture, image.image_size))[None]
        codes = image.encode(scale_pixels(pixels_1HW3))[0]
        return [v.boi, *v.image_code(codes).tolist(), v.eoi]

    def _image_tokenizer(self, verb: str) -> ImageTokenizer:
        if self.vocabulary.image is None:
            raise UserError(f"the model has no image tokenizer (data.image_tokenizer), so it cannot {verb} a picture")
        return self.vocabulary.image

    # ------------------------------------------------------------------------------------------------------- samples

    def start(self, number: int, prompt: Prompt, max_tokens: int) -> GenerationState:
        """Create the initial state of sample `number`, without generated tokens.

        max_tokens: limit on the number of generated tokens. It is ignored if the prompt asks for an image, because an
        image has a fixed number of tokens.
        """
        if prompt.task == "image":
            return GenerationState(number, prompt, len(prompt.tokens) + self.num_codes, codes_left=self.num_codes)
        return GenerationState(number, prompt, min(self.context, len(prompt.tokens) + max_tokens))

    def next(self, sample: GenerationState) -> int:
        """Return which kind of token may come next in the sample: TEXT, TEXT_OR_IMAGE, CODE or EOI.

        The kind is an index into masks_KV: masks_KV[kind] is true for the allowed tokens.
        """
        if sample.codes_left:
            return self.CODE if sample.codes_left > 0 else self.EOI
        fits = sample.length + self.num_codes + 2 <= sample.limit
        return self.TEXT_OR_IMAGE if sample.prompt.task == "mixed" and not self.cannot_draw and fits else self.TEXT

    def add(self, sample: GenerationState, token: int) -> None:
        """Append a token to the sample. If this completes the sample, mark it as done.

        The token must be of the kind that `next` returns.
        """
        sample.generated.append(token)
        if sample.codes_left > 0:
            sample.codes_left -= 1
            if sample.codes_left == 0 and sample.prompt.task == "mixed":
                sample.codes_left = -1
        elif sample.codes_left < 0:
            sample.codes_left = 0
        elif token == self.vocabulary.boi:
            sample.codes_left = self.num_codes
        sample.done = sample.length == sample.limit or token == self.vocabulary.eos

    def parts(self, tokens: Sequence[int]) -> list[str | list[int]]:
        """Split generated tokens into texts (without markers) and images (lists of the image tokenizer's codes)."""
        v = self.vocabulary
        found: list[str | list[int]] = []
        is_code = v.modality_of[torch.tensor(tokens, dtype=torch.int64)] == IMAGE
        start = 0
        while start < len(tokens):
            stop = start + 1
            while stop < len(tokens) and is_code[stop] == is_code[start]:
                stop += 1
            run = tokens[start:stop]
            if is_code[start]:
                found.append([token - v.first_image_code for token in run])
            elif text := v.text.decode([t for t in run if t < v.text.size and t != v.eos]).strip():
                found.append(text)
            start = stop
        return found


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture file. Raises UserError if the file is missing or is not a picture."""
    try:
        return decode_image(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"the picture '{path}' cannot be read: {error.strerror}") from None
    except BadSample as error:
        raise UserError(f"the picture '{path}' cannot be read: {error}") from None


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
