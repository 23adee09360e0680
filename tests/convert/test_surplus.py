"""Every combination of superfluous files and tensors in a Hugging Face folder is dropped and listed, or refused."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_dist.convert.pretrained import open_pretrained
from moe_dist.core.errors import UserError
from tests.support.hugging_face_models import save_llama

HEADS = {"no head": None, "equal head": 0.0, "other head": 1e-3}
CASES = list(itertools.product([False, True], [False, True], [False, True], HEADS, [False, True]))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("surplus") / "hf"
    save_llama(folder, tie_word_embeddings=True)
    return load_file(folder / "model.safetensors"), (folder / "config.json").read_text()


@pytest.mark.parametrize(("indexed", "rotary", "other_file", "head", "unknown"), CASES)
def test_nothing_is_dropped_without_being_listed(indexed, rotary, other_file, head, unknown, sound, tmp_path):
    """Tensors used + listed = tensors stored, or the folder is refused by the name of a tensor."""
    tensors, config = dict(sound[0]), sound[1]
    used = len(tensors)
    (tmp_path / "config.json").write_text(config)
    if rotary:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if HEADS[head] is not None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + HEADS[head]
    if unknown:
        tensors["model.layers.0.mlp.extra.weight"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    if indexed:
        index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if other_file:
        save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    if unknown or head == "other head":
        with pytest.raises(UserError, match=r"lm_head\.weight" if head == "other head" else r"mlp\.extra\.weight"):
            open_pretrained(tmp_path)
        return
    found = open_pretrained(tmp_path)
    listed = [text for text in found.dropped if text.startswith("tensor")]
    assert used + len(listed) == len(tensors)
    assert len(found.dropped) - len(listed) == other_file
    assert sum(tensor.numel for tensor in found.tensors.values()) == sum(tensor.numel() for tensor in sound[0].values())
