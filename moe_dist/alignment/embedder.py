"""Sentence embeddings from a pretrained model in Hugging Face format, mean-pooled and normalised (Sentence-BERT).

Shape suffixes: N texts, P tokens of the longest text, E embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.core.errors import UserError
from moe_dist.core.extras import require_extra

MAX_TOKENS = 256  # the length all-MiniLM-L6-v2 was trained with
TEXTS_AT_ONCE = 64


@torch.no_grad()
def embed(texts: Sequence[str], folder: Path) -> Tensor:
    """Embed texts as unit vectors, float32 [N, E]. Raises UserError if the folder holds no sentence-embedding model."""
    require_extra("transformers", "models", f"the embedding model {folder}")
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no sentence-embedding model: {str(error).splitlines()[0]}") from None
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # batch texts of similar length: less padding
    rows: list[Tensor] = []
    for start in range(0, len(order), TEXTS_AT_ONCE):
        some = [texts[i] for i in order[start : start + TEXTS_AT_ONCE]]
        inputs = tokenizer(some, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        hidden_NPE, mask_NP1 = model(**inputs).last_hidden_state, inputs["attention_mask"][:, :, None]
        rows.append(F.normalize((hidden_NPE * mask_NP1).sum(1) / mask_NP1.sum(1), dim=1))
    return torch.cat(rows)[torch.tensor(order).argsort()]
