"""Packing: documents become token pieces, pieces fill sequences, and sequences become a Batch.

Assembly (a document is an image-text pair, a text or an instruction; codes are the tokens of an image):
  pair       BOS BOI codes EOI caption EOS   or   BOS caption BOI codes EOI EOS
  pair whose caption is dropped   BOS BOI codes EOI EOS
  text only  BOS text EOS
  instruction   BOS prompt answer EOS   or   BOS BOI codes EOI prompt answer EOS
A conversation continues with further prompts and answers. It may lack BOS or EOS (data/tasks/conversations.py).
A pair's image comes first with probability data.image_first. Its caption is dropped with probability
data.caption_dropout. If a document has several captions, one of them is drawn. These choices depend only on (seed,
epoch, document number).

Lengths: an image is never split across two sequences. If a pair is longer than a sequence, the end of its caption is
removed. A text may be cut anywhere and continue in a later sequence. Each piece of a cut text is a separate document
for attention and positions. Only the first piece begins with BOS, and only the last piece ends with EOS. An instruction
is never cut: if it does not fit into the rest of a sequence, it goes into a later sequence.

Every token of a piece except the first is predicted. In an instruction, only the answers and EOS are predicted.

Shape suffixes: T tokens of one micro-batch, S its instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from moe_dist.core.batch import Batch, TokenInfo
from moe_dist.core.errors import UserError
from moe_dist.data.tasks.instructions import InstructionPrompt
from moe_dist.data.tokenizers.vocabulary import Vocabulary

NO_DOMAIN = -1  # domain of padding and of all documents that are not instructions
SHORTEST_PIECE = 8  # tokens: a text is not cut to fill less room than this


class Document(Protocol):
    """Interface for a tokenised sample: the vocabulary ids of its text and image, without markers such as BOS."""

    @property
    def text(self) -> np.ndarray: ...  # ids of the caption or text (may be empty), or of a prompt and its answer

    @property
    def image(self) -> np.ndarray | None: ...  # ids of the image codes

    @property
    def prompt(self) -> InstructionPrompt | None: ...  # set for an instruction, which fits a sequence with its markers


class DocumentStore(Protocol):
    """Interface for a random-access collection of tokenised documents. Implemented in data/cache/token_cache.py."""

    has_image: np.ndarray  # bool per document
    lengths: np.ndarray  # text (first caption) and image tokens per document, without markers
    domains: tuple[str, ...]  # sorted names of the instructions' domains; empty without instructions
    part_ends: np.ndarray  # int64: end of each corpus in the concatenated documents

    def __len__(self) -> int: ...

    def document(self, index: int, choice: int = 0) -> Document: ...  # with caption `choice` mod number of captions


def random_bits(seed: int, counter: tuple[int, int, int], count: int) -> np.ndarray:
    """Return `count` uint64 numbers from Philox, a counter-based generator. They depend only on the arguments."""
    mask = (1 << 64) - 1
    key = np.array([seed & mask, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, *counter], dtype=np.uint64)).random_raw(count)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens from an assembled document, beginning at the document's token number `start`.

    The piece ends at the end of the document or, in a text, at a cut.
    """

    epoch: int
    document: int
    start: int
    tokens: np.ndarray  # int64 ids
    image_tokens: int
    prompt_tokens: int = 0  # number of tokens before an instruction's answer
    domain: int = NO_DOMAIN  # index into the store's domains
    sample: int = 0  # InstructionPrompt.sample
    later_prompts: tuple[tuple[int, int], ...] = ()  # start and end of each further prompt of a conversation

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def whole(self) -> bool:
        """True if the piece must not be cut, because it contains an image or is an instruction."""
        return bool(self.image_tokens or self.prompt_tokens)

    def split(self, at: int) -> tuple[Piece, Piece]:
        return (
            replace(self, tokens=self.tokens[:at]),
            replace(self, tokens=self.tokens[at:], start=self.start + at),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembler:
    """Makes pieces from the documents of a store. Call it with an epoch and a document number to get a piece."""

    store: DocumentStore
    vocabulary: Vocabulary
    seed: int
    sequence_length: int
    image_first: float
    caption_dropout: float
    every_caption: bool = True  # each epoch draws one of several captions; False: the first caption is used

    def __call__(self, epoch: int, index: int, start: int = 0) -> Piece:
        """Assemble document number `index` for epoch number `epoch`. The piece begins at the document's token `start`.

        Only texts are cut, so `start` is 0 for all other documents. Raises UserError if the document's image does not
        fit into a sequence.
        """
        draws = random_bits(self.seed, (index, epoch, 0), 3)
        document = self.store.document(index, int(draws[2]) if self.every_caption else 0)
        v, text, image = self.vocabulary, document.text, document.image
        if document.prompt is not None:
            return self._instruction(epoch, index, document, document.prompt)
        if image is None:
            tokens = np.concatenate([[v.bos], text, [v.eos]])
            return Piece(epoch, index, start, tokens.astype(np.int64)[start:], 0)
        room = self.sequence_length - len(image) - 4
        if room < 0:
            raise UserError(
                f"data.sequence_length={self.sequence_length} cannot hold an image: "
                f"its {len(image)} codes and 4 markers need {len(image) + 4}"
            )
        first_draw, second_draw = (draws[:2] >> np.uint64(11)) * 2.0**-53
        image_first, dropped = first_draw < self.image_first, second_draw < self.caption_dropout
        caption = text[: 0 if dropped else room]
        block = [[v.boi], image, [v.eoi]]
        parts = [*block, caption] if image_first else [caption, *block]
        return Piece(epoch, index, 0, np.concatenate([[v.bos], *parts, [v.eos]]).astype(np.int64), len(image))

    def _instruction(self, epoch: int, index: int, document: Document, prompt: InstructionPrompt) -> Piece:
        v, image = self.vocabulary, document.image
        before = [v.bos] * prompt.bos + ([] if image is None else [v.boi, *image, v.eoi])
        tokens = np.concatenate([before, document.text, [v.eos] * prompt.eos]).astype(np.int64)
        domain = self.store.domains.index(prompt.domain)
        codes, shift = 0 if image is None else len(image), len(before)
        later = tuple((start + shift, end + shift) for start, end in prompt.later)
        return Piece(epoch, index, 0, tokens, codes, shift + prompt.length, domain, prompt.sample, later)


def fill_sequence(pending: list[Piece], room: int) -> list[Piece]:
    """Choose pieces of `pending` that fill `room` tokens as well as possible. Remove and return them.

    The list `pending` is ordered from oldest to newest. The oldest piece is taken whenever it fits, so no piece waits
    forever. If room is left, a text that is longer than this room is cut. Its first part is taken, and the rest keeps
    its place in `pending`.
    """
    if not pending:
        return []
    pieces = []
    if _must_cut(pending[0], room):
        pieces.append(_cut(pending, 0, room))
    else:
        chosen = best_subset([len(piece) for piece in pending], room)
        pieces = [pending[i] for i in chosen]
        for i in reversed(chosen):
            del pending[i]
        room -= sum(map(len, pieces))
        longer = next((i for i, piece in enumerate(pending) if _must_cut(piece, room)), None)
        if longer is not None:
            pieces.append(_cut(pending, longer, room))
    return pieces


def _must_cut(piece: Piece, room: int) -> bool:
    return len(piece) > room >= SHORTEST_PIECE and not piece.whole


def _cut(pending: list[Piece], i: int, room: int) -> Piece:
    """Cut up to `room` tokens off the beginning of the text pending[i] and return them. At least two tokens remain."""
    piece, pending[i] = pending[i].split(min(room, len(pending[i]) - 2))
    return piece


def best_subset(lengths: Sequence[int], room: int) -> list[int]:
    """Choose lengths whose sum is as large as possible, but at most `room`, and return their indices.

    Index 0 is included if lengths[0] is at most `room`. Among equally good subsets, earlier items are preferred. In the
    code, bit s of reach[k] is 1 if some of the first k lengths add up to s.
    """
    mask = (1 << (room + 1)) - 1
    reach = [1]
    for k, length in enumerate(lengths):
        with_item = (reach[-1] << length) & mask
        reach.append(with_item if k == 0 and length <= room else reach[-1] | with_item)
    total = reach[-1].bit_length() - 1
    chosen = []
    for k in range(len(lengths) - 1, -1, -1):
        if not (reach[k] >> total) & 1:
            chosen.append(k)
            total -= lengths[k]
    return chosen[::-1]


Group = Sequence[Sequence[Piece]]  # the pieces of each packed sequence of a selection group


def collate(
    groups: Sequence[tuple[int, Group]], vocabulary: Vocabulary, sequence_length: int, *, instructions: bool
) -> Batch:
    """Concatenate groups into one micro-batch on the CPU.

    The target of a token is the next token of the same piece. Three kinds of tokens have no target: padding, the last
    token of a piece, and all tokens of a prompt except its last. Padding at the end of a sequence has its own entry
    in document_lengths.

    groups: pairs of (the group's number in the run, the group).
    instructions: whether the data contain instructions. If so, the sidecar has domain_T (index into the store's
    domains, -1 outside instructions), prompt_end_S (index of the first prompt's last token), sample_S (sample hash).
    """
    group_tokens = len(groups[0][1]) * sequence_length
    num_tokens = len(groups) * group_tokens
    placed, document_lengths = _place([sequence for _, group in groups for sequence in group], sequence_length)
    tokens = np.full(num_tokens, vocabulary.pad, dtype=np.int64)
    targets = np.full(num_tokens, vocabulary.pad, dtype=np.int64)
    valid, has_target = np.zeros(num_tokens, dtype=bool), np.zeros(num_tokens, dtype=bool)
    for at, piece in placed:
        stop = at + len(piece)
        tokens[at:stop] = piece.tokens
        targets[at : stop - 1] = piece.tokens[1:]
        valid[at:stop] = True
        has_target[at + max(piece.prompt_tokens - 1, 0) : stop - 1] = True
        for start, end in piece.later_prompts:
            has_target[at + start - 1 : at + end - 1] = False
    lengths = np.array(document_lengths)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    token_ids = np.concatenate([np.arange(group_tokens) + number * group_tokens for number, _ in groups])
    tokens_T, targets_T = torch.from_numpy(tokens), torch.from_numpy(targets)
    info = TokenInfo.build(
        modality_T=vocabulary.modality_of[tokens_T],
        valid_T=torch.from_numpy(valid),
        position_T=torch.from_numpy(np.arange(num_tokens) - starts),
        token_id_T=torch.from_numpy(token_ids),
        document_lengths=document_lengths,
        num_groups=len(groups),
        num_sequences=num_tokens // sequence_length,
    )
    return Batch(
        tokens_T=tokens_T,
        targets_T=targets_T,
        loss_mask_T=torch.from_numpy(has_target),
        target_modality_T=vocabulary.modality_of[targets_T],
        info=info,
        sidecar=_sidecar(placed, num_tokens) if instructions else {},
    )


def _place(sequences: Group, sequence_length: int) -> tuple[list[tuple[int, Piece]], list[int]]:
    """Find the position of each piece in a micro-batch. Each sequence is padded to sequence_length.

    Returns two lists. The first has (index of the piece's first token in the micro-batch, piece) for each piece. The
    second has the lengths of all pieces and runs of padding, in order.
    """
    placed: list[tuple[int, Piece]] = []
    document_lengths: list[int] = []
    for number, sequence in enumerate(sequences):
        at, end = number * sequence_length, (number + 1) * sequence_length
        for piece in sequence:
            placed.append((at, piece))
            document_lengths.append(len(piece))
            at += len(piece)
        if at < end:
            document_lengths.append(end - at)
    return placed, document_lengths


def _sidecar(placed: Sequence[tuple[int, Piece]], num_tokens: int) -> dict[str, torch.Tensor]:
    domain_T = torch.full((num_tokens,), NO_DOMAIN)
    for at, piece in placed:
        domain_T[at : at + len(piece)] = piece.domain
    prompted = [(at + piece.prompt_tokens - 1, piece.sample) for at, piece in placed if piece.prompt_tokens]
    prompt_end_S, sample_S = torch.tensor(prompted, dtype=torch.int64).view(-1, 2).T.contiguous()
    return {"domain_T": domain_T, "prompt_end_S": prompt_end_S, "sample_S": sample_S}


def reachable_image_fraction(assembler: Assembler) -> float:
    """Return the fraction of image tokens in the store's pairs. data.image_fraction cannot be larger than this.

    The markers of a pair are counted as tokens, but not as image tokens.
    """
    pairs = np.flatnonzero(assembler.store.has_image)
    if not len(pairs):
        return 0.0
    codes = assembler(0, int(pairs[0])).image_tokens
    whole = np.minimum(np.asarray(assembler.store.lengths)[pairs] + 4, assembler.sequence_length).mean()
    return float(codes / (whole + assembler.caption_dropout * (codes + 4 - whole)))
