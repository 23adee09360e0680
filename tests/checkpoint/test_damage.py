"""Truncated, flipped, lost or exchanged files: damage at seeded places is always detected and named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.checkpoint import verify_checkpoint
from moe_dist.checkpoint.storage import read_index
from moe_dist.core.errors import UserError
from tests.support.checkpoint_jobs import MOMENTS, Job, account, assert_same, build
from tests.support.distributed import run_ranks

FILES = ["rank_00000.safetensors", "rank_00001.safetensors", "index.json", "state.json", "manifest.json"]
PLACES = 8  # of each damage in each file


def flip(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def overwrite(file: Path, chance: random.Random) -> None:
    """Overwrite a block, as file systems may do after a crash."""
    data = bytearray(file.read_bytes())
    start = chance.randrange(len(data))
    end = min(start + 512, len(data))
    data[start:end] = chance.randbytes(end - start)
    file.write_bytes(data)


def extend(file: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes() + chance.randbytes(chance.randint(1, 100)))


def delete(file: Path, chance: random.Random) -> None:
    file.unlink()


def replace_by_folder(file: Path, chance: random.Random) -> None:
    file.unlink()
    file.mkdir()


def exchange(file: Path, chance: random.Random) -> None:
    """Exchange a file with another one of the checkpoint."""
    other = file.with_name(chance.choice([name for name in FILES if name != file.name]))
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


Damage = Callable[[Path, random.Random], None]
DAMAGES: list[Damage] = [flip, truncate, overwrite, extend, delete, replace_by_folder, exchange]


def damaged(folder: Path, whole: Path, places: int) -> Iterator[str]:
    """Damage every file in every way at several places, one at a time. Yields a description of each damage."""
    for name in FILES:
        for damage in DAMAGES:
            for seed in range(places):
                shutil.rmtree(folder)
                shutil.copytree(whole, folder)
                damage(folder / name, random.Random(f"{name} {damage.__name__} {seed}"))
                yield f"{damage.__name__} {name} {seed}"


def says_what_it_is(sentence: str, folder: Path) -> bool:
    """Check that a sentence names a file of the checkpoint and its fault."""
    return str(folder) in sentence and any(
        text in sentence for text in ("is damaged", "is missing", "bytes, not", "cannot be read", "is not known")
    )


def test_every_damage_is_found(saved, copied):
    whole, (folder, _) = Path(saved[0].save), copied
    verify_checkpoint(folder)
    manifest, found = json.loads((whole / "manifest.json").read_text()), 0
    for what in damaged(folder, whole, PLACES):
        try:
            read_index(folder, verify_checkpoint(folder))
            checkpoint.read_state(folder)
        except UserError as error:
            assert says_what_it_is(str(error), folder), (what, str(error))
            found += 1
        else:  # the damage has hit white space
            assert "manifest" in what and json.loads((folder / "manifest.json").read_text()) == manifest, what
    assert found >= 0.95 * len(FILES) * len(DAMAGES) * PLACES


def test_every_single_bit_of_the_manifest(copied):
    """The manifest has no checksum: each flipped bit is an error, or does not change the meaning."""
    folder, _ = copied
    file = folder / "manifest.json"
    data = file.read_bytes()
    meaning, found = json.loads(data), 0
    for place in range(len(data)):
        for bit in range(8):
            file.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
            try:
                read_index(folder, verify_checkpoint(folder))
            except UserError:
                found += 1
            else:
                assert json.loads(file.read_text()) == meaning, (place, bit)
    assert found > 7 * len(data)


def _load_damaged(rank: int, job: Job, folder: Path, whole: Path) -> tuple[list[tuple[str, str | None]], dict]:
    """Return each damage with the sentence that loading raised. At the end, load the undamaged checkpoint."""
    engine, layout = build(job)
    told: list[tuple[str, str | None]] = []
    cases = damaged(folder, whole, 1)
    while True:
        case = [next(cases, None) if layout.is_main else None]
        dist.broadcast_object_list(case, src=0)
        if case[0] is None:
            break
        try:
            checkpoint.load(folder, engine, layout)
            told.append((case[0], None))
        except UserError as error:
            told.append((case[0], str(error).removesuffix(" (rank 0)").removesuffix(" (rank 1)")))
    checkpoint.load(whole, engine, layout)
    return told, account(engine, MOMENTS[job.optimizer])


def test_every_rank_tells_the_same(saved, copied):
    (job, source), (folder, resumed) = saved, copied
    results = run_ranks(_load_damaged, 2, replace(resumed, stop=0), folder, Path(job.save))
    assert results[0][0] == results[1][0]
    assert len(results[0][0]) == len(FILES) * len(DAMAGES)
    for what, sentence in results[0][0]:
        assert sentence is not None and says_what_it_is(sentence, folder), what
    for _, held in results:
        assert_same({name: source.at_save[name] for name in held}, held)
