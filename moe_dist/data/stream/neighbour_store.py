"""RoMA's neighbour store (docs/roma.md): each training sample's routing, and the neighbours whose routing it imitates.

The store is a folder of three files:
  store.json        format, the model's identity, and how the neighbours were found (embedder, settings, sigma)
  samples.safetensors
    sample_N        int64 hash that identifies each sample, in ascending order
    right_N         bool, true if the model answers the sample correctly
    routing_NR      float32 softmax of the routers at the last prompt token, all expert layers concatenated
  neighbours.safetensors
    neighbour_NK    int64 row of each neighbour in samples.safetensors
    weight_NK       float32 weight of each neighbour; a row sums to 1, or is all 0 if the sample has no neighbours
  or, if a sample may have many neighbours (kinds `ball` and `all`):
    mean_NR         float32 weighted mean m_i of the routing r_j of all neighbours
    spread_NR       float32 weighted mean of (r_j - m_i)^2 for each routing value
    weight_N        float32, 1 if the sample has neighbours, otherwise 0

The store is written in two steps: first samples are collected, then neighbours are found. Training needs both. The
tensors are memory-mapped: a rank reads only the rows of its batches, and the ranks of a machine share them.

Shape suffixes: N samples of the store, S samples of a micro-batch, K neighbours, R routing values of a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.config.losses import NeighbourSettings
from moe_dist.core.batch import Batch
from moe_dist.core.errors import UserError
from moe_dist.core.files import json_text, new_file, read_json, write_file
from moe_dist.core.tensor_files import LazyTensor, read_safetensors, write_safetensors

NEIGHBOURS_FORMAT = 1
ABOUT, SAMPLES, NEIGHBOURS = "store.json", "samples.safetensors", "neighbours.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The content of samples.safetensors: the routing of each sample, and whether the model answers it correctly."""

    sample_N: Tensor
    right_N: Tensor
    routing_NR: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """The content of neighbours.safetensors: each sample's neighbours and their weights."""

    neighbour_NK: Tensor
    weight_NK: Tensor

    @property
    def covered(self) -> int:
        """The number of samples that have neighbours."""
        return int((self.weight_NK > 0).any(dim=1).sum())

    def joined(self, row_S: Tensor, samples: Samples) -> dict[str, Tensor]:
        """Return the tensors that NeighbourStore.join adds to a batch's sidecar.

        row_S: the rows of the batch's samples in `samples`.
        """
        routing_SKR = samples.routing_NR[self.neighbour_NK[row_S]]
        return {"neighbour_routing_SKR": routing_SKR, "neighbour_weights_SK": self.weight_NK[row_S]}


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageNeighbours:
    """The content of neighbours.safetensors if it holds averages over the neighbours instead of a list.

    The mean and the spread of the routing are enough for RoMA's term, because
    sum_j W_ij (r_i - r_j)^2 = (r_i - m_i)^2 + sum_j W_ij (r_j - m_i)^2.
    """

    mean_NR: Tensor
    spread_NR: Tensor
    weight_N: Tensor

    @property
    def covered(self) -> int:
        """The number of samples that have neighbours."""
        return int((self.weight_N > 0).sum())

    def joined(self, row_S: Tensor, samples: Samples) -> dict[str, Tensor]:
        """Return the tensors that NeighbourStore.join adds to a batch's sidecar.

        row_S: the rows of the batch's samples in `samples`.
        """
        return {
            "neighbour_routing_SKR": self.mean_NR[row_S, None],
            "neighbour_weights_SK": self.weight_N[row_S, None],
            "neighbour_spread_SR": self.spread_NR[row_S],
        }


def write_samples(folder: Path, samples: Samples, about: Mapping[str, Any]) -> None:
    """Create a store with samples but no neighbours yet. An older store in the folder is replaced.

    Raises UserError if the model answered no sample correctly.

    about: how the samples were collected, to be stored in store.json. The entry `model` identifies the model's
    checkpoint.
    """
    right = int(samples.right_N.sum())
    if not right:
        raise UserError(
            f"the success set is empty: the model answers none of {len(samples.sample_N)} samples correctly"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in (ABOUT, NEIGHBOURS):
        (folder / name).unlink(missing_ok=True)
    _write_tensors(folder / SAMPLES, samples)
    counts = {"samples": len(samples.sample_N), "right": right, "routing_values": samples.routing_NR.shape[1]}
    write_file(folder / ABOUT, json_text({"format": NEIGHBOURS_FORMAT, **about, **counts}))


def read_samples(folder: Path) -> tuple[Samples, dict[str, Any]]:
    """Return the samples and the content of store.json.

    Raises UserError if a file is missing or damaged, or if the format of the store is unknown.
    """
    about = read_json(folder / ABOUT)
    if about.get("format") != NEIGHBOURS_FORMAT:
        raise UserError(
            f"{folder / ABOUT}: format {about.get('format')} is not known, this version reads {NEIGHBOURS_FORMAT}"
        )
    return Samples(**read_safetensors(folder / SAMPLES)), about


def write_neighbours(folder: Path, neighbours: Neighbours | AverageNeighbours, about: Mapping[str, Any]) -> None:
    """Add neighbours to the store in `folder`. The store is then complete. Earlier neighbours are replaced.

    about: how the neighbours were found, to be stored in store.json under `neighbours`. Its entry `settings` holds the
    NeighbourSettings.
    """
    stored = read_json(folder / ABOUT)
    _write_tensors(folder / NEIGHBOURS, neighbours)
    write_file(folder / ABOUT, json_text({**stored, "neighbours": dict(about)}))


class NeighbourStore:
    """A complete neighbour store, opened for training.

    For every sample of a batch, join() adds the routing of the sample's neighbours to the batch.
    """

    def __init__(self, folder: str | Path, *, model: str | None, settings: NeighbourSettings | None):
        """Open a store.

        Raises UserError if it is incomplete, if it was collected with a model other than `model`, or if its neighbours
        were found with other settings than `settings`.

        model: the identity of the checkpoint from which training starts. If it is None (on resume), a store of any
        model is accepted.
        settings: the recipe's neighbour settings. If it is None (the recipe has no losses.manifold), a store with
        any settings is accepted.
        """
        self.folder = Path(folder)
        self._samples, about = read_samples(self.folder)
        if model is not None and about["model"] != model:
            raise UserError(
                f"the neighbour store {self.folder} was collected with another model ({about['checkpoint']}) "
                "than init_from starts from"
            )
        if not (self.folder / NEIGHBOURS).is_file():
            raise UserError(f"the neighbour store {self.folder} has no neighbours yet: run launch/align.py neighbours")
        if settings is not None:
            _check_settings(self.folder, about["neighbours"].get("settings"), settings)
        tensors = read_safetensors(self.folder / NEIGHBOURS)
        self._neighbours = AverageNeighbours(**tensors) if "mean_NR" in tensors else Neighbours(**tensors)

    @property
    def identity(self) -> str:
        """Return a digest of the store's samples and neighbours. On resume, it shows whether the store is unchanged."""
        digest = hashlib.sha256()
        for name in (SAMPLES, NEIGHBOURS):
            with (self.folder / name).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def join(self, batch: Batch) -> Batch:
        """Return a copy of the batch whose sidecar also holds the routing and weights of each instruction's neighbours.

        The new entries are neighbour_routing_SKR and neighbour_weights_SK. If the store has means instead of a list of
        neighbours, K is 1 and neighbour_spread_SR is added. Raises UserError if data.shards contains no instructions,
        or if an instruction of the batch is not in the store.
        """
        if "sample_S" not in batch.sidecar:
            raise UserError(f"data.neighbours={self.folder} needs instructions, but data.shards holds none")
        sample_S = batch.sidecar["sample_S"]
        row_S = torch.searchsorted(self._samples.sample_N, sample_S).clamp(max=len(self._samples.sample_N) - 1)
        missing_S = self._samples.sample_N[row_S] != sample_S
        if bool(missing_S.any()):
            raise UserError(
                f"the neighbour store {self.folder} lacks {int(missing_S.sum())} of a batch's {len(sample_S)} samples, "
                f"such as {int(sample_S[missing_S][0])}: collect it from the shards of data.shards"
            )
        joined = self._neighbours.joined(row_S, self._samples)
        return replace(batch, sidecar={**batch.sidecar, **joined})


def _check_settings(folder: Path, stored: Mapping[str, Any] | None, wanted: NeighbourSettings) -> None:
    """Raise UserError if the stored neighbours were found with other settings than the recipe's.

    The message names the first setting that differs.
    """
    expected = wanted.model_dump(mode="json")
    differing = [key for key, value in expected.items() if stored is not None and stored.get(key) != value]
    if stored is None or differing:
        how = f"{differing[0]}={stored.get(differing[0])}" if stored is not None else "an earlier version"
        raise UserError(
            f"the neighbours in {folder} were found with {how}, not with losses.manifold.neighbours of the recipe"
            + (f" ({differing[0]}={expected[differing[0]]})" if differing else "")
            + ": run launch/align.py neighbours"
        )


def _write_tensors(path: Path, tensors: Samples | Neighbours | AverageNeighbours) -> None:
    with new_file(path) as partial:
        write_safetensors(partial, {name: LazyTensor.of(tensor) for name, tensor in asdict(tensors).items()})
