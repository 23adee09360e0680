"""Random numbers that depend only on names and ids, not on the rank, the device, the layout or earlier draws.

The function `hash_ids` hashes token and expert ids on the device. The functions `uniform`, `logistic` and `dropout`
draw from such a hash, and `seeded_normal_` initialises a parameter from its name.

Shape suffixes: R rows, D columns.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from moe_dist.core.expert_rows import expert_ids
from moe_dist.core.fused import fused
from moe_dist.core.initial_values import set_initial

_MASK = (1 << 64) - 1
_CHUNK = 1 << 15  # elements drawn at a time; a multiple of 16. Larger chunks would not stay in the cache
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def fold_key(*parts: int | str) -> int:
    """Hash the parts, for example (seed, name), to a signed 64-bit number. It is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True)


def hash_ids(key: int, *ids: Tensor) -> Tensor:
    """Return an int64 hash of `key` and `ids`. The integer tensors `ids` are broadcast against each other.

    Each tensor is hashed by one round of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
    Generators", OOPSLA 2014).
    """
    return _hash(_state(key, ids[0].device), *ids)


def _state(key: int, device: torch.device) -> Tensor:
    return torch.full((), key, dtype=torch.int64, device=device)


def _hash(state: Tensor, *ids: Tensor) -> Tensor:
    for id_ in ids:
        state = _splitmix64(state ^ id_)
    return state


def uniform(key: int, *ids: Tensor) -> Tensor:
    """Draw a float64 in (0, 1) for each element of the broadcast ids.

    Each value is the centre of one of 2^40 equal intervals.
    """
    return (_shift_right(hash_ids(key, *ids), 24).double() + 0.5) * 2.0**-40


def logistic(key: int, *ids: Tensor) -> Tensor:
    """Draw a float64 from the standard logistic distribution for each element of the broadcast ids."""
    return uniform(key, *ids).logit()


def dropout(x_RD: Tensor, token_id_R: Tensor, *, key: int, rate: float) -> Tensor:
    """Zero each element with probability `rate` and scale the others by 1 / (1 - rate).

    Whether an element is zeroed depends only on `key`, the token's id and the column. The random numbers have 16 bits,
    so `rate` is rounded to a multiple of 2^-16.
    """
    return _drop(x_RD, token_id_R, _state(key, x_RD.device), round(rate * 2**16))


@fused
def _drop(x_RD: Tensor, token_id_R: Tensor, state: Tensor, dropped: int) -> Tensor:
    word_W = torch.arange((x_RD.shape[1] + 3) // 4, device=x_RD.device)
    shift_4 = torch.arange(0, 64, 16, device=x_RD.device)
    bits_RD = (_hash(state, token_id_R[:, None], word_W)[:, :, None] >> shift_4 & 0xFFFF).flatten(1)
    keep_RD = bits_RD[:, : x_RD.shape[1]] >= dropped
    return torch.where(keep_RD, x_RD / (1 - dropped / 2**16), 0.0)


def _splitmix64(z: Tensor) -> Tensor:
    z = z + _signed(_GOLDEN)  # int64 arithmetic wraps around, as the algorithm requires
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift `z` to the right, filling with zeros. On int64, the operator `>>` alone fills with the sign bit."""
    return (z >> bits) & (_MASK >> bits)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def seeded_normal_(parameter: Tensor, *, seed: int, name: str, std: float) -> None:
    """Draw the initial values of a parameter from N(0, std^2), seeded by (seed, name).

    Each row of a stacked expert parameter is seeded by (seed, name, expert). Therefore the weights do not depend on
    the distribution of experts over ranks. The rows are drawn in parallel.
    """
    set_initial(parameter, partial(_draw, seed=seed, name=name, std=std))


def _draw(parameter: Tensor, *, seed: int, name: str, std: float) -> None:
    experts = expert_ids(parameter)
    pieces = [((), parameter)] if experts is None else [((expert,), row) for expert, row in zip(experts, parameter)]
    drawing = [partial(_draw_piece, piece, fold_key(seed, name, *expert), std) for expert, piece in pieces]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for done in [pool.submit(draw) for draw in drawing]:
            done.result()


@torch.no_grad()
def _draw_piece(piece: Tensor, key: int, std: float) -> None:
    """Fill a contiguous tensor with std * torch.randn(...), drawn by a CPU generator that is seeded with `key`.

    To save memory, the tensor is filled in chunks. The values equal those of a single draw, because torch draws 16
    values at a time. If a length is not a multiple of 16, torch draws the last 16 values again. Therefore only the last
    chunk may have such a length.
    """
    generator = torch.Generator(device="cpu").manual_seed(key)
    flat, buffer = piece.view(-1), torch.empty(_CHUNK + 15, dtype=torch.float32, device="cpu")
    ends = [*range(_CHUNK, flat.numel() - 15, _CHUNK), flat.numel()]
    for start, end in zip([0, *ends], ends):
        flat[start:end].copy_(buffer[: end - start].normal_(generator=generator).mul_(std))
