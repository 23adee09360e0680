"""The training loader: `batch, state, waited = next(loader)`.

For any number of ranks, selection group j of a run is group j // lanes of lane j mod lanes. Data-parallel rank r of dp
reads the groups with j mod dp == r, batch_groups of them per micro-batch. After n micro-batches on every rank, the run
has read exactly its first n * batch_groups * dp groups.

A rank's state consists of the number of groups that the run has read, and of the states of the rank's lanes. A
checkpoint merges the states of all ranks (checkpoint/train_state.py) into one state that does not depend on the layout.
From the merged state, any number of ranks that divides the number of lanes can continue the same sequence of groups. A
state that was saved with different data or settings is refused.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from moe_dist.config.recipe import DataConfig
from moe_dist.core.batch import CPU, Batch
from moe_dist.core.errors import UserError
from moe_dist.data.stream.lanes import Lanes, make_lanes
from moe_dist.data.stream.neighbour_store import NeighbourStore
from moe_dist.data.stream.packing import SHORTEST_PIECE, Assembler, DocumentStore, collate
from moe_dist.data.tokenizers.vocabulary import Vocabulary

SHARDS = "shards"  # key of a loader state's digest over the shards' content
SHARDS_SHOWN = 3
LoaderState = dict[str, Any]  # JSON-able


class ShardStore(DocumentStore, Protocol):
    """Interface for a document store that can say from which shards it was made."""

    digest: str  # over the content of all shards

    def replaced(self) -> list[str]: ...  # names of shards that seem to have replaced others


class Loaded(NamedTuple):
    """A micro-batch on the host, the loader's state after this batch, and how long next() waited for the batch."""

    batch: Batch
    state: LoaderState  # a loader restored from it continues after this batch
    waited: float  # seconds that next() waited for the batch


class Loader:
    """Endless iterator over micro-batches. A thread prepares the next batch.

    If the thread fails, next() raises its error.

    device: the device to which the caller will copy the batches. For a GPU, the thread puts them in page-locked memory.
    """

    def __init__(
        self,
        lanes: Lanes,
        assembler: Assembler,
        identity: LoaderState,
        *,
        dp_rank: int,
        dp: int,
        batch_groups: int,
        neighbours: NeighbourStore | None,
        device: torch.device,
    ):
        self._lanes = lanes
        self._assembler = assembler
        self._identity = identity
        self._neighbours = neighbours
        self._dp_rank, self._dp, self._batch_groups = dp_rank, dp, batch_groups
        self._groups = 0  # groups read so far, over all ranks
        self._lane_states = {str(number): lane.state() for number, lane in lanes.items()}
        self._pin = device.type == "cuda"
        start = partial(torch.cuda.set_device, device) if self._pin else None  # otherwise a new thread uses GPU 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader", initializer=start)
        self._ahead: Future[tuple[Batch, LoaderState]] | None = None

    def restore(self, state: LoaderState) -> None:
        """Continue after the batch that next() returned together with `state`. Call this before the first next()."""
        self._groups = state["groups"]
        for number, lane in self._lanes.items():
            lane.restore(state["lanes"][str(number)])
            self._lane_states[str(number)] = lane.state()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Loaded:
        started = time.perf_counter()
        ahead = self._ahead or self._thread.submit(self._produce)
        self._ahead = ahead
        batch, state = ahead.result()  # an error stays in `ahead`, so every later call raises it again
        self._ahead = self._thread.submit(self._produce)
        return Loaded(batch, state, time.perf_counter() - started)

    def _produce(self) -> tuple[Batch, LoaderState]:
        first = self._groups + (self._dp_rank - self._groups) % self._dp
        groups = []
        for number in range(first, first + self._batch_groups * self._dp, self._dp):
            index = number % self._identity["data.lanes"]
            groups.append((number, self._lanes[index].next_group()))
            self._lane_states[str(index)] = self._lanes[index].state()
        self._groups += self._batch_groups * self._dp
        assembler, instructions = self._assembler, bool(self._assembler.store.domains)
        batch = collate(groups, assembler.vocabulary, assembler.sequence_length, instructions=instructions)
        if self._neighbours is not None:
            batch = self._neighbours.join(batch)
        if self._pin:
            batch = batch.pinned()
        return batch, {"groups": self._groups, "lanes": dict(self._lane_states), "of": self._identity}


def make_loader(
    store: ShardStore,
    vocabulary: Vocabulary,
    data: DataConfig,
    *,
    seed: int,
    dp_rank: int,
    dp: int,
    batch_groups: int,
    neighbours: NeighbourStore | None = None,
    state: LoaderState | None = None,
    device: torch.device = CPU,
) -> Loader:
    """Create the loader of one data-parallel rank.

    Raises UserError if `data` does not fit the store or the number of ranks, or if `state` was saved with different
    data or settings.

    batch_groups: the number of selection groups per micro-batch.
    neighbours: if given, the loader adds the neighbours' routing from this store to every batch.
    state: the state that next() returned together with the last batch that was used. If the number of ranks has
    changed, it must be the merged state of all ranks from a checkpoint. If it is None, begin with the first group.
    device: see Loader.
    """
    check_data(data, dp=dp)
    assembler = Assembler(
        store=store,
        vocabulary=vocabulary,
        seed=seed,
        sequence_length=data.sequence_length,
        image_first=data.image_first,
        caption_dropout=data.caption_dropout,
    )
    _check_images(assembler)
    lanes = make_lanes(assembler, data, numbers=range(dp_rank, data.lanes, dp), lanes=data.lanes)
    identity = _identity(store, data, seed, neighbours)
    loader = Loader(
        lanes,
        assembler,
        identity,
        dp_rank=dp_rank,
        dp=dp,
        batch_groups=batch_groups,
        neighbours=neighbours,
        device=device,
    )
    if state is not None:
        _check_identity(state["of"], identity, store)
        loader.restore(state)
    return loader


def check_data(data: DataConfig, *, dp: int) -> None:
    """Check the settings that can be checked without the documents. dp: the number of data-parallel ranks.

    Raises UserError if data.lanes is not a multiple of dp, or if data.sequence_length is too small.
    """
    if data.lanes % dp:
        raise UserError(f"data.lanes={data.lanes} is not a multiple of the {dp} data-parallel ranks")
    if data.sequence_length < SHORTEST_PIECE:
        raise UserError(f"data.sequence_length={data.sequence_length} is below the minimum of {SHORTEST_PIECE}")


def _check_images(assembler: Assembler) -> None:
    """Raise UserError if an image does not fit into a sequence, rather than let the run fail at its first image."""
    pairs = np.flatnonzero(assembler.store.has_image)
    if len(pairs):
        assembler(0, int(pairs[0]))


def _identity(store: ShardStore, data: DataConfig, seed: int, neighbours: NeighbourStore | None) -> LoaderState:
    """Return the values that must be the same when a loader state is saved and when it is restored."""
    keys = ("lanes", "sequence_length", "group_sequences", "image_fraction")
    identity = {
        "seed": seed,
        "documents": len(store),
        SHARDS: store.digest,
        **{f"data.{key}": getattr(data, key) for key in keys},
        "data.weights": None if data.weights is None else list(data.weights),
    }
    return identity if neighbours is None else identity | {"data.neighbours": neighbours.identity}


def _check_identity(saved: LoaderState, now: LoaderState, store: ShardStore) -> None:
    """Raise UserError if a state was saved with other settings or shards.

    Older states have no digest of the shards, so their shards are not checked.
    """
    for key, value in now.items():
        if key != SHARDS and saved.get(key) != value:
            raise UserError(f"the loader state was saved with {key}={saved.get(key)}, this run has {key}={value}")
    if saved.get(SHARDS, store.digest) != store.digest:
        names = ", ".join(store.replaced()[:SHARDS_SHOWN])
        raise UserError(
            f"the shards are not those of the saved loader state: {names or 'a shard'} was replaced by another; "
            "restore the shards, or start a new run"
        )
