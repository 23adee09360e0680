"""Keys and values of what attention has seen, so that a document goes on token by token without being read again.

A cache holds S sequences. A micro-batch whose documents go on where sequences have ended is read with a Decoding in
place of the micro-batch's own Documents. Every layer keeps count for itself: where a layer lets a token pass by
(mixture-of-depths), that layer's part of the sequence is shorter. Positions come from TokenInfo, and keys are turned by
them before they are stored, so a sequence may have gaps.

Shape suffixes: T tokens, N documents of a micro-batch, n tokens of the longest of them, S sequences, C capacity (tokens
of a sequence), L tokens of the longest sequence so far, H heads, G query groups, d size per head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config.recipe import ModelConfig
from moe_dist.core.batch import TokenInfo


class LayerCache:
    """One layer's keys and values, and how many of each sequence there are."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype):
        self.key_SCGd, self.value_SCGd = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length_S = torch.zeros(shape[0], device=device, dtype=torch.int64)


class KVCache:
    """The caches of all layers. Belongs to whoever generates; attention adds to it."""

    def __init__(self, config: ModelConfig, *, sequences: int, capacity: int, device: torch.device, dtype: torch.dtype):
        """capacity: tokens that a sequence may have, prompt included. One sequence more is `padding`, never kept."""
        self.padding = sequences
        shape = (sequences + 1, capacity, config.query_groups, config.size_per_head)
        self.layers = [LayerCache(shape, device, dtype) for _ in range(config.num_layers)]

    def go_on(self, sequences: list[int]) -> Decoding:
        """A micro-batch whose documents, in order, continue these sequences (each at most once)."""
        return Decoding(self, torch.tensor(sequences, device=self.layers[0].length_S.device))


@dataclass(frozen=True, slots=True)
class Decoding:
    """Which sequence of a cache each document of a micro-batch continues."""

    cache: KVCache
    sequence_N: Tensor  # int64

    def documents(self, layer: int, info: TokenInfo) -> CachedDocuments:
        """What the attention of a layer needs."""
        return CachedDocuments(self.cache.layers[layer], self.cache.padding, self.sequence_N, info.document_T)


@dataclass(frozen=True, slots=True)
class CachedDocuments:
    """Documents that continue cached sequences. `attend` first adds the tokens to the cache: once for each layer."""

    layer: LayerCache
    padding: int
    sequence_N: Tensor
    document_T: Tensor

    def select(self, info: TokenInfo) -> CachedDocuments:
        """The same where the layer sees only the tokens of `info`: it keeps no others."""
        return replace(self, document_T=info.document_T)

    def attend(self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor) -> Tensor:
        """Each token attends to its sequence up to itself: [T, H, d]."""
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
        seen_NnL = torch.arange(longest, device=document_T.device) <= place_Nn[:, :, None]
        y_NHnd = F.scaled_dot_product_attention(
            query_NnHd.transpose(1, 2),
            layer.key_SCGd[sequence_N, :longest].transpose(1, 2),
            layer.value_SCGd[sequence_N, :longest].transpose(1, 2),
            attn_mask=seen_NnL[:, None],
            enable_gqa=key_TGd.shape[1] != query_THd.shape[1],
        )
        return y_NHnd.transpose(1, 2)[document_T, offset_T]
