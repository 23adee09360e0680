"""The values that the loader passes to the model: tokens, and facts about each token.

Shape suffixes: T tokens of one micro-batch (concatenated sequences), V valid (non-padding) tokens, K selected tokens.

A *selection group* is the set of packed sequences whose tokens compete with each other in expert-choice routing.
A micro-batch consists of whole groups, so routing does not depend on the parallel layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

MODALITIES = ("text", "image")
TEXT, IMAGE = range(len(MODALITIES))
CPU = torch.device("cpu")
Made = TypeVar("Made")
Record = TypeVar("Record", "TokenInfo", "Batch")


@dataclass(frozen=True, kw_only=True)  # no slots: cached properties need a __dict__
class TokenInfo:
    """Facts about the T tokens of a micro-batch.

    Tensors are on the model's device. Tuples are on the host, so reading a tuple needs no sync. The methods `once` and
    `once_per_token` cache results that every layer derives from these facts. A copy made by dataclasses.replace starts
    with empty caches.
    """

    modality_T: Tensor  # int64, index into MODALITIES
    valid_T: Tensor  # bool, False for padding
    document_T: Tensor  # int64, number of the token's document within the micro-batch, non-decreasing
    position_T: Tensor  # int64, restarts at 0 in every document
    token_id_T: Tensor  # int64, unique over the whole run and the same in every parallel layout
    by_modality_V: Tensor  # int64, indices of valid tokens, sorted by (modality, group, index)
    modality_counts: tuple[tuple[int, ...], ...]  # [modality][group] number of valid tokens
    sequence_counts: tuple[int, ...]  # number of valid tokens of each packed sequence
    document_lengths: tuple[int, ...]  # sums to T: every token belongs to one document, padding too
    causal: bool = False  # no decision may depend on later tokens: auxiliary routers decide (docs/moma.md)

    @classmethod
    def build(
        cls,
        *,
        modality_T: Tensor,
        valid_T: Tensor,
        position_T: Tensor,
        token_id_T: Tensor,
        document_lengths: Sequence[int],
        num_groups: int,
        num_sequences: int | None = None,
    ) -> TokenInfo:
        """Build a TokenInfo from CPU tensors. The fields that are not given are computed.

        Selection groups are contiguous and of equal size, and so are packed sequences.
        num_sequences: the number of packed sequences. If it is None, each group is one sequence.
        Raises ValueError if the tokens cannot be divided into equal sequences or the sequences into equal groups, or if
        the sum of document_lengths is not the number of tokens.
        """
        num_tokens, sequences = modality_T.numel(), num_sequences or num_groups
        if num_tokens % sequences or sequences % num_groups or sum(document_lengths) != num_tokens:
            raise ValueError(
                f"{num_tokens} tokens do not form {num_groups} groups, {sequences} sequences and documents "
                f"{document_lengths}"
            )
        group_T = torch.arange(num_tokens) // (num_tokens // num_groups)
        key_T = modality_T * num_groups + group_T
        valid_V = valid_T.nonzero().squeeze(1)
        order_V = key_T[valid_V].sort(stable=True).indices
        counts = torch.bincount(key_T[valid_V], minlength=len(MODALITIES) * num_groups).view(-1, num_groups)
        lengths = torch.tensor(document_lengths)
        return cls(
            modality_T=modality_T,
            valid_T=valid_T,
            document_T=torch.repeat_interleave(torch.arange(len(document_lengths)), lengths),
            position_T=position_T,
            token_id_T=token_id_T,
            by_modality_V=valid_V[order_V],
            modality_counts=tuple(tuple(row) for row in counts.tolist()),
            sequence_counts=tuple(valid_T.view(sequences, -1).sum(1).tolist()),
            document_lengths=tuple(document_lengths),
        )

    @property
    def num_tokens(self) -> int:
        return self.valid_T.numel()

    @property
    def num_groups(self) -> int:
        return len(self.modality_counts[0])

    @cached_property
    def _made(self) -> dict[Any, Any]:
        return {}

    @cached_property
    def _made_per_token(self) -> dict[str, Tensor]:
        return {}

    def once(self, name: Any, make: Callable[[], Made]) -> Made:
        """Return make() and cache the result. Later calls with the same `name` return the cached result."""
        if name not in self._made:
            self._made[name] = make()
        made: Made = self._made[name]
        return made

    def once_per_token(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return make(), an int64 tensor [T], and cache it as `once` does.

        A TokenInfo from `of_modality` shares this cache. A TokenInfo from `select` starts with the cached values of the
        selected tokens.
        """
        if name not in self._made_per_token:
            self._made_per_token[name] = make()
        return self._made_per_token[name]

    def of_modality(self, modality: int) -> TokenInfo:
        """Return a TokenInfo of the same tokens in which only the tokens of one modality are valid."""
        return self.once(("modality", modality), lambda: self._of_modality(modality))

    def _of_modality(self, modality: int) -> TokenInfo:
        sizes = [sum(row) for row in self.modality_counts]
        part = replace(
            self,
            valid_T=self.valid_T & (self.modality_T == modality),
            by_modality_V=self.by_modality_V.split(sizes)[modality],
            modality_counts=tuple(
                row if index == modality else (0,) * len(row) for index, row in enumerate(self.modality_counts)
            ),
        )
        part.__dict__["_made_per_token"] = self._made_per_token
        return part

    def competing(self, scope: str = "group") -> tuple[Tensor, list[int]]:
        """Divide the valid tokens into sets. The tokens of a set compete with each other.

        Returns the indices of the tokens, one set after another, and the number of tokens in each set.
        If `scope` is "group", a set contains the tokens of one selection group. Its text tokens precede its image
        tokens. If `scope` is "modality", a set contains the tokens of one modality in one selection group. If `scope`
        is "sequence", a set contains the tokens of one packed sequence.
        """
        return self.once(("competing", scope), lambda: self._competing(scope))

    def _competing(self, scope: str) -> tuple[Tensor, list[int]]:
        if scope == "sequence":
            return _first(self.valid_T, len(self.by_modality_V)), list(self.sequence_counts)
        if scope == "modality":
            return self.by_modality_V, [count for row in self.modality_counts for count in row]
        sizes = [sum(column) for column in zip(*self.modality_counts)]
        if self.num_groups == 1 or sum(any(row) for row in self.modality_counts) <= 1:
            return self.by_modality_V, sizes  # already in this order
        return torch.cat(self.members()), sizes

    def members(self, modality: int | None = None) -> list[Tensor]:
        """Return one tensor per selection group: the indices of its valid tokens, text before images.

        modality: if given, return only the tokens of this modality.
        """
        flat = [count for row in self.modality_counts for count in row]
        pieces = self.by_modality_V.split(flat)
        groups = self.num_groups
        if modality is not None:
            return list(pieces[modality * groups : (modality + 1) * groups])
        return [torch.cat([pieces[m * groups + g] for m in range(len(MODALITIES))]) for g in range(groups)]

    def select(self, keep_T: Tensor, read: Callable[[Tensor], list[int]]) -> tuple[Tensor, TokenInfo]:
        """Select the tokens for which keep_T is true. Returns their indices token_K, ascending, and their TokenInfo.

        keep_T: must be false for padding.
        read: a function that copies int64 counts to the host (split_sizes in model/moe/dispatch.py). It is called once.
        The documents keep their numbers. A document without selected tokens has length 0 in document_lengths.
        """
        of_groups = [count for row in self.modality_counts for count in row]
        keep = keep_T.index_select(0, self.once("orders", self._orders))  # keep_T in three orders, see _orders
        keep_V = keep[: len(self.by_modality_V)]
        counts = read(_sums(keep, [*of_groups, *self.sequence_counts, *self.document_lengths]))
        groups, sequences = counts[: len(of_groups)], counts[len(of_groups) : -len(self.document_lengths)]
        lengths, each = counts[-len(self.document_lengths) :], self.num_groups
        token_K = _first(keep_T, sum(lengths))
        place_T = keep_T.cumsum(0) - 1
        kept, made = self._of_tokens(token_K)
        inner = replace(
            self,
            **kept,
            by_modality_V=place_T.index_select(0, self.by_modality_V.index_select(0, _first(keep_V, sum(lengths)))),
            modality_counts=tuple(tuple(groups[i : i + each]) for i in range(0, len(groups), each)),
            sequence_counts=tuple(sequences),
            document_lengths=tuple(lengths),
        )
        inner._made_per_token.update(made)
        return token_K, inner

    def _orders(self) -> Tensor:
        """Return three lists of token indices, concatenated into one tensor.

        The first list contains the valid tokens, sorted by modality and group. The second list contains the valid
        tokens, sorted by sequence. The third list contains all tokens. With these lists, `select` counts the selected
        tokens of each group, sequence and document.
        """
        all_T = torch.arange(self.num_tokens, device=self.valid_T.device)
        return torch.cat([self.by_modality_V, self.competing("sequence")[0], all_T])

    def _of_tokens(self, token_K: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Gather the facts about the valid tokens token_K. One index_select gathers all of them.

        Returns two dicts of tensors [K], keyed by name. The first contains the per-token fields of the TokenInfo that
        `select` makes. The second contains the cached results of once_per_token.
        """
        numbers = {name: getattr(self, name) for name in _OF_EACH_TOKEN} | self._made_per_token
        table_FT = self.once(("table", *numbers), lambda: torch.stack(list(numbers.values())))
        found = dict(zip(numbers, table_FT.index_select(1, token_K).unbind()))
        fields_K: dict[str, Any] = {name: found.pop(name) for name in _OF_EACH_TOKEN}
        return fields_K | {"valid_T": torch.ones_like(token_K, dtype=torch.bool)}, found

    def causally(self) -> TokenInfo:
        """Return a copy that requests causal routing, for inference.

        With causal routing, auxiliary routers replace routers whose choice depends on later tokens.
        """
        return replace(self, causal=True)

    def to(self, device: torch.device | str) -> TokenInfo:
        return _each(self, lambda tensor: tensor.to(device, non_blocking=True))


_OF_EACH_TOKEN = ("modality_T", "document_T", "position_T", "token_id_T")  # int64


def _sums(keep: Tensor, lengths: Sequence[int]) -> Tensor:
    """Divide `keep` into consecutive runs of the given lengths. Return the number of true values in each run."""
    ends = torch.tensor([0, *accumulate(lengths)], device="cpu").to(keep.device, non_blocking=True)
    return F.pad(keep.cumsum(0), (1, 0)).index_select(0, ends).diff()


def _first(keep: Tensor, number: int) -> Tensor:
    """Return the indices where `keep` is true. `number` is their known count, so no host sync is needed."""
    return torch.nonzero_static(keep, size=number).squeeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch: its tokens, their targets and facts about them. It consists of whole selection groups."""

    tokens_T: Tensor  # int64 vocabulary ids
    targets_T: Tensor  # int64, the next token of the same document
    loss_mask_T: Tensor  # bool: whether the prediction at this position counts
    target_modality_T: Tensor  # int64, modality of the target
    info: TokenInfo
    sidecar: Mapping[str, Tensor] = field(default_factory=dict)  # optional tensors, such as neighbours

    def causally(self) -> Batch:
        """Return a copy that requests causal routing (TokenInfo.causally)."""
        return replace(self, info=self.info.causally())

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Return a copy in page-locked host memory, so that copies to a GPU can be asynchronous. Needs CUDA."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        sidecar = {name: change(value) for name, value in self.sidecar.items()}
        return replace(_each(self, change), info=_each(self.info, change), sidecar=sidecar)


def _each(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """Return a copy of a dataclass with `change` applied to each of its tensors."""
    found = {f.name: getattr(record, f.name) for f in fields(record)}
    changed: dict[str, Any] = {name: change(value) for name, value in found.items() if isinstance(value, Tensor)}
    return replace(record, **changed)
