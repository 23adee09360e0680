"""Train the tokenizers of a corpus: python launch/train_tokenizers.py shards=DIR out=DIR [vq.image_size=64]

Writes OUT/text.model and OUT/vq. All keys and their defaults are listed in TokenizerRecipe
(moe_dist/data/tokenizers/tokenizer_training.py).
"""

from __future__ import annotations

import sys
from typing import Any

from moe_dist.core.strict import apply_override, validate
from moe_dist.data.tokenizers.tokenizer_training import TokenizerRecipe, train_tokenizers
from moe_dist.parallel.discovery import run_rank


def main(arguments: list[str]) -> None:
    settings: dict[str, Any] = {}
    for argument in arguments:
        apply_override(settings, argument)
    recipe = validate(TokenizerRecipe, settings, "train_tokenizers.py")
    text, quality = train_tokenizers(recipe)
    print(f"{recipe.out}/text.model: {text.size} pieces")
    if quality is not None:
        print(f"{recipe.out}/vq: held-out {quality}")


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
