"""Launches of launch/train.py on damaged data, tokenizers and recipes: each ends with a trained run or one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from random import Random

import yaml

from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError
from moe_dist.data.cache.token_cache import load_vocabulary, open_store
from tests.support import ROOT
from tests.support.fuzz_cases import (
    Tokenizers,
    damage_recipe,
    damage_tokenizer,
    damaged_records,
    damaged_tar,
    small_recipe,
)
from tests.support.fuzz_checks import Fault, same
from tests.support.fuzz_tars import Member, picture, write_members
from tests.support.launching import ALONE, environment

SECONDS = 120  # a launch takes a few
KINDS = ("tar", "json", "tokenizer", "recipe")


def prepare(number: int, folder: Path, tokenizers: Tokenizers) -> Path:
    """Write the data and the recipe of a launch, of which one is damaged, and return the recipe."""
    kind, draw = KINDS[number % len(KINDS)], Random(f"launch {number}")
    shards = folder / "shards"
    shards.mkdir()
    texts = [Member(f"good{i}.{end}", made) for i in range(12) for end, made in _pair(i)]
    write_members(shards / "good.tar", texts)
    recipe, settings = folder / "recipe.yaml", small_recipe(folder, tokenizers)
    if kind == "tar":
        damaged_tar(draw, shards)
    elif kind == "json":
        damaged_records(draw, shards)
    elif kind == "tokenizer":
        name = draw.choice(("text", "hugging_face", "vq"))
        own = Path(shutil.copytree(tokenizers.path(name), folder / name))
        damage_tokenizer(draw, own)
        key = "image_tokenizer" if name == "vq" else "text_tokenizer"
        settings["data"] |= {key: str(own / "text.model" if name == "text" else own)}
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False))
    if kind == "recipe":
        _damage(draw, recipe, readable=number % 8 == 7)
    return recipe


def _damage(draw: Random, recipe: Path, *, readable: bool) -> None:
    """Damage a recipe. readable: until its settings are valid, so that the run finds what is wrong with them."""
    sound = recipe.read_text()
    damage_recipe(draw, recipe)
    while readable and not _is_valid(recipe):
        recipe.write_text(sound)
        damage_recipe(draw, recipe)


def _is_valid(recipe: Path) -> bool:
    try:
        load_config(recipe)
    except UserError:
        return False
    return True


def _pair(number: int) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    return ("png", picture(number, "PNG")), ("txt", f"a rose of number {number}".encode())


def launch_case(recipe: Path) -> str:
    """Train a recipe in a process of its own and return its last words. Raises Fault if they are not one sentence."""
    command = [*ALONE, "launch/train.py", "--config", str(recipe), "train.stop_after=2"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise Fault(f"the launch takes more than {SECONDS} seconds") from None
    output = (done.stdout + done.stderr).decode(errors="replace")
    same("Traceback" in output, False, output)
    same(done.returncode in (0, 2), True, f"exit status {done.returncode}: {output}")
    sentences = [line for line in output.splitlines() if line.startswith("error: ")]
    same(len(sentences), 1 if done.returncode else 0, output)
    return sentences[0] if sentences else _trained(recipe, output)


def _trained(recipe: Path, output: str) -> str:
    """Check that a run that ended well is done and shows what it was trained on."""
    config = load_config(recipe)
    status = json.loads(Path(config.run.dir, "status.json").read_text())
    same(status["state"], "done", output)
    store = open_store(config.data, "train", load_vocabulary(config.data))
    same(f"train: {store.contents}" in output, True, f"{store.contents} in {output}")
    report = store.report
    same(report.summary() in output, bool(report.bad or report.lost), f"{report.summary()} in {output}")
    return f"done: {store.contents}; {report.summary()}"
