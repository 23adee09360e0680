"""Writing of generated samples: a PNG file for every image, samples.jsonl for everything else, and a contact sheet."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from moe_dist.data.tokenizers.image_tokenizer import ImageTokenizer
from moe_dist.data.tokenizers.pixels import to_pixels
from moe_dist.generate.prompt import Task

CELL, MARGIN, LINES = 160, 8, 6  # side of a picture and gap in pixels; lines of text below a picture
LINE_HEIGHT, CHARACTERS, COLUMNS = 14, 27, 6


@dataclass(frozen=True, slots=True)
class Generated:
    """A finished sample. `parts` holds the generated texts and images, each image as a list of codes."""

    number: int
    task: Task
    prompt: tuple[str | Image.Image, ...]
    parts: list[str | list[int]]
    tokens: list[int]  # generated vocabulary ids

    @property
    def given(self) -> str:
        return " ".join(part if isinstance(part, str) else "[picture]" for part in self.prompt)

    @property
    def text(self) -> str:
        return " ".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[list[int]]:
        return [part for part in self.parts if not isinstance(part, str)]

    @property
    def names(self) -> list[str]:
        """Return the file names of the sample's generated images."""
        return [f"{self.number:04d}{f'_{i}' if i > 1 else ''}.png" for i in range(1, len(self.images) + 1)]

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "task": self.task,
            "prompt": self.given,
            "text": self.text,
            "images": self.names,
            "tokens": self.tokens,
        }


def write_generated(folder: Path, samples: Sequence[Generated], image: ImageTokenizer | None, settings: dict) -> None:
    """Write samples.jsonl, the contact sheet sheet.png, and each sample's images (Generated.names) to a new folder.

    Each line of samples.jsonl describes one sample and repeats `settings`.
    """
    folder.mkdir(parents=True)
    lines = [sample.to_json() | settings for sample in samples]  # written first: an error in an image loses none
    (folder / "samples.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    cells: list[tuple[Image.Image | None, str]] = []
    for sample in samples:
        pictures = [_draw(codes, image) for codes in sample.images]
        for name, picture in zip(sample.names, pictures, strict=True):
            picture.save(folder / name)
        shown: list[Image.Image | None] = [*pictures]
        shown = shown or [part for part in sample.prompt if not isinstance(part, str)] or [None]
        words = {"image": sample.given, "text": sample.text, "mixed": f"{sample.given} | {sample.text}"}[sample.task]
        cells += [(picture, words) for picture in shown]
    contact_sheet(cells).save(folder / "sheet.png")


def _draw(codes: Sequence[int], image: ImageTokenizer | None) -> Image.Image:
    assert image is not None
    return Image.fromarray(to_pixels(image.decode(torch.tensor([codes])))[0])


def contact_sheet(cells: Sequence[tuple[Image.Image | None, str]]) -> Image.Image:
    """Draw a sheet that shows the cells in rows. A cell is a picture (empty if None) above its text."""
    columns = min(COLUMNS, len(cells))
    width, height = CELL + MARGIN, CELL + LINES * LINE_HEIGHT + MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, -(-len(cells) // columns) * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for index, (picture, text) in enumerate(cells):
        x, y = MARGIN + index % columns * width, MARGIN + index // columns * height
        if picture is not None:
            sheet.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
        lines = textwrap.wrap(text, CHARACTERS, max_lines=LINES, placeholder=" ...")
        draw.text((x, y + CELL + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return sheet
