"""The key-value cache, with which generation continues a sequence token by token without recomputing earlier tokens.

A cache holds S sequences. If the documents of a micro-batch continue cached sequences, their tokens must also attend to
the cached tokens. In this case, attention uses CachedDocuments, which a Decoding provides. A layer with
mixture-of-depths caches only the tokens that it admits, so each layer counts its cached tokens separately. The cached
keys are already rotated by the positions of their tokens.

Shape suffixes: T tokens, N documents of a micro-batch, n tokens of the longest document, S sequences, C capacity
(maximum number of tokens per sequence), L tokens of the longest sequence so far, H heads, G query groups, d size per
head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config.model_section import ModelConfig
from moe_dist.core.batch import TokenInfo


class LayerCache:
    """The cached keys and values of one layer, and the number of cached tokens of each sequence."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype):
        self.key_SCGd, self.value_SCGd = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length_S = torch.zeros(shape[0], device=device, dtype=torch.int64)


class KVCache:
    """The key-value caches of all layers. The generating code owns them, and attention appends to them."""

    def __init__(self, config: ModelConfig, *, sequences: int, capacity: int, device: torch.device, dtype: torch.dtype):
        """Allocate the caches. capacity: the maximum number of tokens per sequence, including the prompt.

        One extra sequence, with the number `padding`, is allocated for padding tokens. Its tokens are discarded after
        each forward pass.
        """
        self.padding = sequences
        shape = (sequences + 1, capacity, config.query_groups, config.size_per_head)
        self.layers = [LayerCache(shape, device, dtype) for _ in range(config.num_layers)]

    def go_on(self, sequences: list[int]) -> Decoding:
        """Return the Decoding for a micro-batch whose documents continue `sequences`.

        sequences: for each document, the number of the sequence that it continues. The numbers must all be different.
        """
        return Decoding(self, torch.tensor(sequences, device=self.layers[0].length_S.device))


@dataclass(frozen=True, slots=True)
class Decoding:
    """The cached sequences that the documents of a micro-batch continue."""

    cache: KVCache
    sequence_N: Tensor  # int64, the sequence that each document continues

    def documents(self, layer: int, info: TokenInfo) -> CachedDocuments:
        """Return the documents that attention uses in one layer. info: facts about the micro-batch's tokens."""
        return CachedDocuments(self.cache.layers[layer], self.cache.padding, self.sequence_N, info.document_T)


@dataclass(frozen=True, slots=True)
class CachedDocuments:
    """Documents that continue sequences in the cache of one layer.

    The method `attend` appends the tokens to the cache, so it must be called only once.
    """

    layer: LayerCache
    padding: int
    sequence_N: Tensor
    document_T: Tensor

    def select(self, info: TokenInfo) -> CachedDocuments:
        """Return a copy that holds only the tokens that `info` describes. The copy's `attend` caches only these tokens.

        info: a result of TokenInfo.select.
        """
        return replace(self, document_T=info.document_T)

    def attend(self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, window: int = 0) -> Tensor:
        """Append the tokens to the cache, then compute attention. Returns [T, H, d].

        Each token attends to itself and to the cached tokens of its sequence that precede it.
        window: the maximum number of tokens that a token attends to, including itself. 0 means no limit.
        """
        layer, document_T, sequence_N = self.layer, self.document_T, self.sequence_N
        count_N = torch.bincount(document_T, minlength=len(sequence_N))
        offset_T = torch.arange(len(document_T), device=document_T.device) - (count_N.cumsum(0) - count_N)[document_T]
        start_N = layer.length_S[sequence_N]
        place_T = start_N[document_T] + offset_T
        layer.key_SCGd[sequence_N[document_T], place_T] = key_TGd
        layer.value_SCGd[sequence_N[document_T], place_T] = value_TGd
        layer.length_S[sequence_N] = start_N + count_N
        layer.length_S[self.padding] = 0

        longest, new = int((start_N + count_N).max()), int(count_N.max())
        query_NnHd = query_THd.new_zeros(len(sequence_N), new, *query_THd.shape[1:])
        query_NnHd[document_T, offset_T] = query_THd
        place_Nn = start_N[:, None] + torch.arange(new, device=document_T.device)
        ahead_NnL = torch.arange(longest, device=document_T.device) - place_Nn[:, :, None]
        seen_NnL = (ahead_NnL <= 0) & (ahead_NnL > -(window or longest))
        y_NHnd = F.scaled_dot_product_attention(
            query_NnHd.transpose(1, 2),
            layer.key_SCGd[sequence_N, :longest].transpose(1, 2),
            layer.value_SCGd[sequence_N, :longest].transpose(1, 2),
            attn_mask=seen_NnL[:, None],
            enable_gqa=key_TGd.shape[1] != query_THd.shape[1],
        )
        return y_NHnd.transpose(1, 2)[document_T, offset_T]
