"""Safetensors files: strict reading, and streamed writing with a hash and fsync."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_dist.core.errors import UserError
from moe_dist.core.files import StoredFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor of known shape and dtype that is read from the disk or computed only when needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read or compute the whole tensor."""
        tensor = self.make()
        if (tuple(tensor.shape), tensor.dtype) != (self.shape, self.dtype):
            raise RuntimeError(f"{tensor.dtype}{list(tensor.shape)} was made, not {self.dtype}{list(self.shape)}")
        return tensor

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file for a `with` block.

    Raises UserError if the file is missing, damaged or not a safetensors file, or if the block requests a tensor that
    the file does not contain.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is missing, damaged or not a safetensors file: {error}") from None


def read_safetensors(file: Path, after: str = "") -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, keyed by name. Raises UserError if the file is missing or damaged.

    after: if given, read only the tensors whose names contain this text. Their keys in the dict are then the parts of
    the names that follow the text.
    """
    with open_safetensors(file) as opened:
        names = [name for name in opened.keys() if after in name]  # noqa: SIM118 - not a mapping
        return {name.partition(after)[2] if after else name: opened.get_tensor(name) for name in names}


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> StoredFile:
    """Write a safetensors file, one tensor at a time, and fsync it. Return its name, size and SHA-256.

    The library's own safetensors.save_file would need a second copy of all tensors.
    """
    order = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)  # aligned, as the library itself orders them
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    size = 0
    for key in order:
        tensor = tensors[key]
        end = size + tensor.nbytes
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        head: Iterable[Any] = (struct.pack("<Q", len(text)), text)
        for data in chain(head, (_bytes_of(tensors[key].read()) for key in order)):
            stream.write(data)
            digest.update(data)
        stream.flush()
        os.fsync(stream.fileno())
    return StoredFile(path.name, path.stat().st_size, digest.hexdigest())


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
