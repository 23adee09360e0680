"""Causal attention over packed documents.

A micro-batch is a concatenation of documents, T tokens in all. A token attends to itself and to the earlier tokens of
the same document. With a sliding window, it attends only to the most recent of these tokens. No T x T mask is built:
the document boundaries are computed once per micro-batch and shared by all layers.

Shape suffixes: T tokens, H heads, G query groups (G divides H; the heads of a group share key and value), d size per
head, P padded tokens (P >= T).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from moe_dist.core.batch import TokenInfo
from moe_dist.core.errors import UserError
from moe_dist.model.rope import rotate

_MULTIPLE = 16  # documents are padded to a multiple of 16: few distinct lengths, at most 15 padding tokens each


class Attending(Protocol):
    """Interface for causal attention in which a token sees only tokens of its own document."""

    def attend(self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor) -> Tensor:
        """Compute softmax attention, scaled by 1/sqrt(d) and causal within each document. Returns [T, H, d]."""
        ...


class Documents(Protocol):
    """Interface for the document boundaries of a micro-batch.

    An implementation also computes the attention within each document.
    """

    def attend(self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, window: int = 0) -> Tensor:
        """Compute softmax attention, scaled by 1/sqrt(d) and causal within each document. Returns [T, H, d].

        window: the maximum number of tokens that a token attends to, including itself. 0 means no limit.
        """
        ...

    def select(self, info: TokenInfo) -> Documents:
        """Return the same documents, restricted to the tokens that `info` describes.

        info: a result of TokenInfo.select.
        """
        ...


def locate_documents(lengths: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> Documents:
    """Build the Documents of a micro-batch from the lengths of its concatenated documents.

    lengths: values on the host. device, dtype: the device and the dtype of the hidden states. They decide which
    attention kernel is used.
    """
    if _uses_flash(device, dtype):
        return VarlenDocuments.build(lengths, device)
    return BucketedDocuments.build(lengths, device)


def check_head_size(size: int, *, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if the attention kernel for this device and dtype does not support heads of this size."""
    if _uses_flash(device, dtype) and (size % 8 or size > 256):
        raise UserError(
            f"heads of size {size} (model.head_size, by default hidden_size / num_heads) do not fit flash attention, "
            "which bf16 on a GPU uses: choose a multiple of 8 up to 256, or deepspeed.bf16.enabled=false"
        )


def _uses_flash(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class BucketedDocuments:
    """Document boundaries for attention on any device and in any dtype.

    Each document is padded to a multiple of 16 tokens. Documents with equal padded lengths form a bucket, and attention
    is computed as one dense batch per bucket. The padded length of a document depends only on the document's own
    length, not on its neighbours. Padding repeats the last token of the document. Padding comes after all real tokens,
    so no real query sees it. The output at padding positions is dropped, so padding gets zero gradient.
    """

    gather_P: Tensor  # int64, the token at each padded position
    scatter_T: Tensor  # int64, the padded position of each token
    buckets: tuple[tuple[int, int], ...]  # (documents, padded length) of each bucket, in order

    @classmethod
    def build(cls, lengths: Sequence[int], device: torch.device) -> BucketedDocuments:
        length_N = torch.tensor([length for length in lengths if length], dtype=torch.int64, device="cpu")
        start_N = length_N.cumsum(0) - length_N
        padded_N = (length_N + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE
        scatter_T = torch.empty(sum(lengths), dtype=torch.int64, device="cpu")
        gather, buckets, places = [], [], 0
        for padded in padded_N.unique().tolist() or [_MULTIPLE]:  # if there are no tokens: one bucket of 0 documents
            members = (padded_N == padded).nonzero()
            offset = torch.arange(padded, device="cpu")
            token = start_N[members] + offset.minimum(length_N[members] - 1)
            place = places + torch.arange(token.numel(), device="cpu").view_as(token)
            real = offset < length_N[members]
            scatter_T[token[real]] = place[real]
            gather.append(token.flatten())
            buckets.append((len(members), padded))
            places += token.numel()
        return cls(
            torch.cat(gather).to(device, non_blocking=True), scatter_T.to(device, non_blocking=True), tuple(buckets)
        )

    def select(self, info: TokenInfo) -> BucketedDocuments:
        return self.build(info.document_lengths, self.gather_P.device)

    def attend(self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, window: int = 0) -> Tensor:
        grouped = key_TGd.shape[1] != query_THd.shape[1]
        sizes = [documents * padded for documents, padded in self.buckets]
        pieces = [x.index_select(0, self.gather_P).split(sizes) for x in (query_THd, key_TGd, value_TGd)]
        outputs = []
        for bucket, *qkv in zip(self.buckets, *pieces):
            query, key, value = (x.unflatten(0, bucket).transpose(1, 2) for x in qkv)
            seen = _sliding_window(bucket[1], window, query.device)
            output = F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, is_causal=seen is None, enable_gqa=grouped
            )
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        output_PHd = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return output_PHd.index_select(0, self.scatter_T)


def _sliding_window(length: int, window: int, device: torch.device) -> Tensor | None:
    """Return a mask of the keys that each query of a document may see, bool [length, length].

    Return None if there is no window or the document fits into it. Plain causal attention then gives the same result.
    """
    if not 0 < window < length:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


@dataclass(frozen=True, slots=True)
class VarlenDocuments:
    """Document boundaries as cumulative lengths, which is the format that the flash attention kernel expects.

    The kernel needs CUDA and half precision. On machines without a GPU, tests replace the kernel with a stand-in that
    checks the arguments of the call.
    """

    ends: Tensor  # int32: 0, then the end of each document
    longest: int

    @classmethod
    def build(cls, lengths: Sequence[int], device: torch.device) -> VarlenDocuments:
        # The kernel refuses an empty list of documents, so if there are no tokens, pass one document of length 0.
        real = [length for length in lengths if length] or [0]
        ends = torch.tensor([0, *accumulate(real)], dtype=torch.int32, device="cpu")
        return cls(ends.to(device, non_blocking=True), max(real))

    def select(self, info: TokenInfo) -> VarlenDocuments:
        return self.build(info.document_lengths, self.ends.device)

    def attend(self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, window: int = 0) -> Tensor:
        ends, longest, grouped = self.ends, self.longest, key_TGd.shape[1] != query_THd.shape[1]
        # torch 2.12 needs enable_gqa if there are fewer key-value heads than query heads. torch 2.11 does not have it.
        extra: dict[str, Any] = {"enable_gqa": True} if grouped and _accepts(varlen_attn, "enable_gqa") else {}
        span = (window - 1, 0)  # tokens to the left and right; -1: no limit
        output = varlen_attn(query_THd, key_TGd, value_TGd, ends, ends, longest, longest, window_size=span, **extra)
        assert isinstance(output, Tensor)  # a tuple is returned only if further outputs are requested
        return output


@cache
def _accepts(function: Callable, name: str) -> bool:
    """Return True if `function` has a parameter called `name`."""
    return name in inspect.signature(function).parameters


@dataclass(frozen=True, slots=True)
class RotatedDocuments:
    """Attention that first applies the rotary embedding to queries and keys.

    clip: if given, queries, keys and values are clamped to [-clip, clip] before the rotary embedding (OLMoE, arXiv
    2409.02060).
    """

    documents: Documents
    turn_2T1d: Tensor
    window: int = 0  # see Documents.attend
    clip: float | None = None

    def attend(self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor) -> Tensor:
        if self.clip is not None:
            query_THd, key_TGd, value_TGd = (x.clamp(-self.clip, self.clip) for x in (query_THd, key_TGd, value_TGd))
        cos_T1d, sin_T1d = self.turn_2T1d.unbind()
        query_THd, key_TGd = (rotate(x, cos_T1d, sin_T1d) for x in (query_THd, key_TGd))
        return self.documents.attend(query_THd, key_TGd, value_TGd, self.window)
