"""Hugging Face weights in: the same logits as transformers, whatever the files look like; bad folders are named."""

import json
import weakref

import pytest
import sentencepiece
import torch
import yaml
from safetensors.torch import load_file, save_file

from moe_dist.checkpoint.checkpoint import read_state, verify_checkpoint
from moe_dist.checkpoint.stored_weights import read_tensors, write_tensors
from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.hugging_face import import_folder
from moe_dist.convert.pretrained import read_folder
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.core.tensor_files import LazyTensor
from moe_dist.data.tokenizers.text_tokenizer import load_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.training.setup import embedding_rows
from tests.data.tokenizers.test_hugging_face_text import save as save_tokenizer
from tests.support.hugging_face_models import (
    change_tensors,
    load_checkpoint,
    logits_apart,
    logits_packed,
    random_documents,
    save_llama,
)

VARIANTS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "one-key": {"num_key_value_heads": 1},
    "plain-heads": {"num_key_value_heads": 6},
    "wide-heads": {"head_dim": 16},
    "sharded": {"max_shard_size": "20KB"},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_those_of_transformers(changes, tmp_path):
    """Documents packed into one micro-batch, against each document alone in transformers; logits of about 10."""
    theirs = save_llama(tmp_path / "hf", **changes)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > (1 if "max_shard_size" in changes else 0)
    import_folder(tmp_path / "hf", tmp_path / "out")
    documents = random_documents()
    expected, ours = logits_apart(theirs, documents), logits_packed(load_checkpoint(tmp_path / "out"), documents)
    assert expected.abs().max() > 3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    verify_checkpoint(tmp_path / "out")


def test_settings_and_weights_come_out_as_they_are(tmp_path):
    theirs = save_llama(tmp_path / "hf", tie_word_embeddings=True, dtype=torch.bfloat16)
    import_folder(tmp_path / "hf", tmp_path / "out")
    section = yaml.safe_load((tmp_path / "out" / "model.yaml").read_text())["model"]
    assert section == read_state(tmp_path / "out")["config"]["model"]
    model = validate(ModelConfig, section, "test")
    assert (model.norm, model.qk_norm, model.tie_embeddings) == ("pre", "none", True)
    assert (model.rope_base, model.norm_epsilon, model.init_std) == (300.0, 1e-4, 0.3)
    assert (model.num_heads, model.query_groups, model.size_per_head) == (6, 2, 8)
    stored = read_tensors(tmp_path / "out")
    assert "output.weight" not in stored and {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert torch.equal(stored["embedding.weight"].read(), theirs.model.embed_tokens.weight)
    gate_up = stored["layers.1.ffn.gate_up.weight"].read()
    mlp = theirs.model.layers[1].mlp
    assert torch.equal(gate_up, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))


def test_one_tensor_in_memory_at_a_time(tmp_path):
    alive, most = set(), 0

    def make(number):
        nonlocal most
        tensor = torch.full((1000,), float(number))
        alive.add(number)
        weakref.finalize(tensor, alive.discard, number)
        most = max(most, len(alive))
        return tensor

    lazy = {f"t{i}": LazyTensor((1000,), torch.float32, lambda i=i: make(i)) for i in range(20)}
    write_tensors(tmp_path / "out", lazy, {})
    assert most <= 2
    assert [float(t.read()[0]) for t in read_tensors(tmp_path / "out").values()] == list(range(20))


def change_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


NORM = "model.layers.1.input_layernorm.weight"
FAULTS = {
    "other architecture": (lambda f: change_config(f, model_type="gpt2"), "model_type='gpt2' is not supported"),
    "attention bias": (lambda f: change_config(f, attention_bias=True), r"lacks the tensor '.*q_proj.bias' \(and 11 m"),
    "mlp bias": (lambda f: change_config(f, mlp_bias=True), r"lacks the tensor 'model.layers.0.mlp.gate_proj.bias'"),
    "latent attention": (lambda f: change_config(f, model_type="deepseek_v2"), "model_type='deepseek_v2' is not supp"),
    "dropout": (lambda f: change_config(f, attention_dropout=0.1), "attention_dropout=0.1 is not supported, only 0.0"),
    "layer types": (
        lambda f: change_config(f, model_type="qwen2", use_sliding_window=True, layer_types=3),
        "is not a config.json of a qwen2 model: 'int' object is not iterable",
    ),
    "activation": (lambda f: change_config(f, hidden_act="gelu"), "hidden_act='gelu' is not supported"),
    "quantised": (
        lambda f: change_config(f, quantization_config={"bits": 4}),
        r"quantization_config=\{'bits': 4\} is not supported",
    ),
    "rope scaling": (
        lambda f: change_config(f, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope_scaling='dynamic' is not supported",
    ),
    "rope parameters": (
        lambda f: change_config(f, rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        "key 'rope_scaling.high_freq_factor' is missing",
    ),
    "partial rotation": (
        lambda f: change_config(f, partial_rotary_factor=0.5),
        "partial_rotary_factor=0.5 is not supported",
    ),
    "no size": (lambda f: change_config(f, hidden_size=None), "key 'hidden_size' is missing or is not a positive"),
    "no heads": (lambda f: change_config(f, num_attention_heads=0), "key 'num_attention_heads' is missing or is no"),
    "rope base": (
        lambda f: change_config(f, rope_parameters={"rope_theta": "many"}),
        "key 'rope_base': input should be a valid number, got 'many'",
    ),
    "odd heads": (
        lambda f: change_config(f, num_key_value_heads=4),
        r"config\.json: num_query_groups=4 does not divide num_heads=6",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing or is not JSON"),
    "missing": (lambda f: change_tensors(f, lambda t: t.pop(NORM)), f"hf lacks the tensor '{NORM}'$"),
    "missing many": (
        lambda f: change_config(f, num_hidden_layers=4),
        r"lacks the tensor 'model\.layers\.3\.self_attn\.q_proj\.weight' \(and 8 more\)",
    ),
    "surplus": (
        lambda f: change_tensors(f, lambda t: t.update({"model.extra": torch.ones(2)})),
        r"has no place in its configuration for the tensor 'model\.extra'$",
    ),
    "tied, but another output": (
        lambda f: change_config(f, tie_word_embeddings=True),
        r"ties the embeddings, but the tensor 'lm_head\.weight' differs from 'model\.embed_tokens\.weight'",
    ),
    "shape": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: torch.ones(47)})),
        rf"tensor '{NORM}' has the shape \[47\], its configuration needs \[48\]",
    ),
    "integers": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: torch.ones(48, dtype=torch.int8)})),
        f"tensor '{NORM}' holds torch.int8, not floating-point numbers",
    ),
    "damaged": (
        lambda f: (f / "model.safetensors").write_bytes(b"nothing"),
        r"model\.safetensors is missing, damaged or not a safetensors file",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "hf holds no .safetensors file"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"holds pytorch_model\.bin but no \.safetensors file, and pickled weights are not read: load the model with",
    ),
    "twice": (
        lambda f: (
            [save_file({NORM: torch.ones(48)}, f / f"{n}.safetensors") for n in "ab"]
            and (f / "model.safetensors").unlink()
        ),
        f"hf holds the tensor '{NORM}' in 2 files",
    ),
    "more tokens than rows": (
        lambda f: save_tokenizer(f, eos_token="<|end|>"),
        "hf: the tokenizer has 300 tokens, the embedding has only 64 rows",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_folder_that_does_not_fit_is_one_sentence(damage, sentence, tmp_path):
    save_llama(tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(UserError, match=sentence):
        import_folder(tmp_path / "hf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_an_index_that_promises_too_much(tmp_path):
    save_llama(tmp_path / "hf", max_shard_size="20KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"model.more": first}}))
    with pytest.raises(UserError, match=rf"index\.json promises the tensor 'model\.more', which {first} lacks"):
        read_folder(tmp_path / "hf")
    (tmp_path / "hf" / first).unlink()
    with pytest.raises(UserError, match=rf"{first} is missing"):
        read_folder(tmp_path / "hf")


@pytest.mark.parametrize("weight_map", [{}, [], {"model.norm.weight": "../model.safetensors"}, {"a": 1}])
def test_a_damaged_index(weight_map, tmp_path):
    save_llama(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json is damaged: its weight_map does not name a file of this folder"):
        read_folder(tmp_path / "hf")


def test_what_is_known_to_be_superfluous_is_dropped_and_listed(tmp_path):
    """Other weight files beside model.safetensors or an index, rotary frequencies, and a tied output layer."""
    theirs = save_llama(tmp_path / "hf", tie_word_embeddings=True)
    surplus = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    surplus["lm_head.weight"] = theirs.model.embed_tokens.weight.detach().clone()
    change_tensors(tmp_path / "hf", lambda tensors: tensors.update(surplus))
    other = {"layers.0.attention.wq.weight": torch.ones(3)}
    for name in ("consolidated", "adapter_model"):
        save_file(other, tmp_path / "hf" / f"{name}.safetensors")
    tensors = [
        "tensors *.rotary_emb.inv_freq (2): follow from config.json",
        "tensor lm_head.weight: equal to the tied embedding",
    ]
    files = ["adapter_model.safetensors", "consolidated.safetensors"]
    dropped = import_folder(tmp_path / "hf", tmp_path / "out")
    assert list(dropped) == [*(f"file {file}: not model.safetensors" for file in files), *tensors]
    documents = random_documents()
    expected, ours = logits_apart(theirs, documents), logits_packed(load_checkpoint(tmp_path / "out"), documents)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)

    named = dict.fromkeys(load_file(tmp_path / "hf" / "model.safetensors"), "model.safetensors")
    index = "model.safetensors.index.json"
    (tmp_path / "hf" / index).write_text(json.dumps({"weight_map": named}))
    dropped = import_folder(tmp_path / "hf", tmp_path / "indexed")
    assert list(dropped) == [*(f"file {file}: not named by {index}" for file in files), *tensors]


def test_rows_of_a_padded_vocabulary_are_kept(tmp_path):
    """The tokenizer has 300 tokens, the embedding 320 rows: logits and loss are those of transformers over all rows."""
    theirs = save_llama(tmp_path / "hf", vocab_size=320)
    save_tokenizer(tmp_path / "hf", bos_token="<|start|>", eos_token="<|end|>")
    import_folder(tmp_path / "hf", tmp_path / "out")
    model = validate(ModelConfig, read_state(tmp_path / "out")["config"]["model"], "test")
    vocabulary = Vocabulary(load_text_tokenizer(tmp_path / "out" / "tokenizer"))
    assert vocabulary.size == 300 and model.vocab_size == embedding_rows(model, vocabulary) == 320
    documents = random_documents(300)
    expected, ours = logits_apart(theirs, documents), logits_packed(load_checkpoint(tmp_path / "out"), documents)
    assert ours.shape[1] == 320
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"model\.vocab_size=299 is less than 300, the number of ids of text tokenizer"):
        embedding_rows(model.model_copy(update={"vocab_size": 299}), vocabulary)


def test_a_sentencepiece_tokenizer_is_copied_and_pads_with_eos(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a small red bear", "on the hill"] * 9), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=18, minloglevel=2,
    )  # fmt: skip
    theirs = save_llama(tmp_path / "hf", vocab_size=18)
    (tmp_path / "tokenizer.model").rename(tmp_path / "hf" / "tokenizer.model")
    import_folder(tmp_path / "hf", tmp_path / "out")
    tokenizer = load_text_tokenizer(tmp_path / "out" / "tokenizer")
    assert tokenizer.sha256 == load_text_tokenizer(tmp_path / "hf" / "tokenizer.model").sha256
    vocabulary = Vocabulary(tokenizer)
    assert (vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.size) == (1, 2, 2, theirs.config.vocab_size)
    assert read_state(tmp_path / "out")["config"]["model"].get("vocab_size") is None


def test_a_checkpoint_is_never_written_over(tmp_path):
    save_llama(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_text()
    with pytest.raises(UserError, match=r"out exists already"):
        import_folder(tmp_path / "hf", tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*file/out"):
        import_folder(tmp_path / "hf", tmp_path / "file" / "out")


def test_read_tensors_checks_the_files(tmp_path):
    save_llama(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "out")
    file = tmp_path / "out" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"rank_00000\.safetensors is damaged"):
        read_tensors(tmp_path / "out")
