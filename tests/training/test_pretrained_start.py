"""A run that starts from a Hugging Face folder holds, in any layout, what a run from the imported checkpoint holds."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_dist.config.recipe import Config, InitFrom
from moe_dist.convert import pretrained
from moe_dist.convert.hugging_face import import_folder, write_section
from moe_dist.convert.pretrained import open_pretrained
from moe_dist.core.errors import UserError
from moe_dist.core.strict import parse_yaml, validate
from moe_dist.data.cache.token_cache import load_vocabulary
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from moe_dist.training.origin import find_origin
from moe_dist.training.pretrained_start import check_model, check_tokenizer
from moe_dist.training.setup import embedding_rows
from tests.convert.test_export import save_mixtral
from tests.data.tokenizers.test_hugging_face_text import save as save_tokenizer
from tests.support.distributed import run_ranks
from tests.support.family_models import save_model
from tests.support.hugging_face_models import change_tensors, save_llama
from tests.support.trajectory import full_masters

ROWS = 304  # the tokenizer has 300 tokens
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 40}
SAVE = {
    "llama": partial(save_llama, dtype=torch.bfloat16),
    "mixtral": partial(save_mixtral, dtype=torch.bfloat16),
    "qwen2_moe": partial(save_model, "qwen2_moe", **QWEN),  # biases and a shared expert
}
LAYOUTS = [
    (1, 1, "llama", False),
    (2, 1, "mixtral", True),
    (2, 2, "mixtral", False),
    (3, 2, "mixtral", True),
    (3, 2, "qwen2_moe", False),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hugging Face folders with tied embeddings and superfluous files, two of them in bf16, and their imports."""
    root = tmp_path_factory.mktemp("pretrained")
    for name, save in SAVE.items():
        save(root / name, vocab_size=ROWS, tie_word_embeddings=True)
        save_tokenizer(root / name, bos_token="<|start|>", eos_token="<|end|>")
        save_file({"a": torch.ones(1)}, root / name / "consolidated.safetensors")
        import_folder(root / name, root / f"{name}-ours")
    return root


def recipe(folder, source=None, *, stage=2, expert=1, bf16=False, **changes):
    """A recipe with the model of `folder` that starts from `source`, by default the folder itself."""
    model = open_pretrained(folder).model.model_dump(mode="json", exclude_unset=True)
    section = {
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": bf16},
    }
    raw = {
        "run": {"dir": "unused"},
        "data": {"shards": "unused", "text_tokenizer": str(folder)},
        "model": model,
        "init_from": str(source or folder),
        "parallel": {"expert": expert},
        "train": {"steps": 1, "global_batch_groups": 4},
        "schedule": {"peak_lr": 0.1},
        "deepspeed": section,
    }
    return validate(Config, raw | changes, "test")


def started_engine(config):
    """Return an engine that holds what the recipe starts from, the layout and the account of the start."""
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    origin = find_origin(config)
    vocabulary = load_vocabulary(config.data)
    origin.check(vocabulary)
    with torch.device("meta"):
        model = Transformer(config.model, embedding_rows(config.model, vocabulary), layout, config.seed)
    engine = make_engine(model, config, layout, origin.is_new)
    return engine, layout, origin.fill(engine, layout, vocabulary)


def start(rank, config):
    """Start on one rank. Return its parameters, the account, and the tensors that were read from the folder."""
    read, original = [], pretrained._read_one
    pretrained._read_one = lambda file, name: read.append(name) or original(file, name)
    try:
        engine, _, account = started_engine(config)
        return full_masters(engine), account.to_json(), read
    finally:
        pretrained._read_one = original


def attempt(rank, config):
    try:
        start(rank, config)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("stage", "expert", "name", "bf16"), LAYOUTS)
def test_a_folder_gives_what_its_import_gives(stage, expert, name, bf16, folders):
    config = recipe(folders / name, stage=stage, expert=expert, bf16=bf16)
    direct = run_ranks(start, 2, config)
    source = folders / f"{name}-ours"
    imported = run_ranks(start, 2, recipe(folders / name, source, stage=stage, expert=expert, bf16=bf16))
    for (masters, account, read), (expected, account_of_import, _) in zip(direct, imported, strict=True):
        assert masters.keys() == expected.keys()
        assert all(torch.equal(masters[key], expected[key]) for key in expected)
        assert account["loaded"] == account_of_import["loaded"] and account["new"]["tensors"] == 0
        assert account["dropped"] == ["file consolidated.safetensors: not model.safetensors"]
        assert len(read) == len(set(read)), "a tensor was read twice"
    experts = [{name for name in read if ".experts." in name} for *_, read in direct]
    assert not (experts[0] & experts[1]) or expert == 1, "a rank read experts that it does not hold"
    everything = load_file(folders / name / "model.safetensors")
    assert set(direct[0][2]) | set(direct[1][2]) == set(everything)


def test_some_parameters_are_new_and_others_left_out(folders):
    """A Llama becomes the shared base of LoRA experts. Its embedding is not used."""
    model = open_pretrained(folders / "llama").model.model_dump(mode="json", exclude_unset=True)
    router = {"type": "top_k", "num_experts": 4, "top_k": 1}
    lora = {"type": "moe", "hidden_size": 80, "experts": {"type": "lora", "rank": 4, "alpha": 8.0}, "router": router}
    settings = {
        "checkpoint": str(folders / "llama"),
        "rename": {"layers.*.ffn.*": "layers.*.ffn.experts.base.*"},
        "new": ["*.router.*", "*.lora.*", "embedding.weight"],
        "left_out": ["embedding.weight"],
    }
    config = recipe(folders / "llama", model=model | {"ffn": lora}, init_from=settings, stage=3, expert=2)
    for masters, account, read in run_ranks(start, 2, config):
        assert {entry["name"] for entry in account["left_out"]["entries"]} == {"embedding.weight"}
        assert account["new"]["tensors"] == 3 * 7 + 1
        assert "model.embed_tokens.weight" not in read
        theirs = load_file(folders / "llama" / "model.safetensors")
        down = theirs["model.layers.2.mlp.down_proj.weight"].float()
        assert torch.equal(masters["layers.2.ffn.experts.base.down.weight"], down)
        assert 0.2 < masters["embedding.weight"].std() < 0.4


KEYS = {
    "rope_base": (1e4, r"model\.rope_base is 10000\.0, but must be 300\.0 according to .*mixtral"),
    "norm": ("swin", r"model\.norm is 'swin', but must be 'pre'"),
    "num_query_groups": (6, r"model\.num_query_groups is 6, but must be 2"),
    "vocab_size": (None, rf"model\.vocab_size is None, but must be {ROWS}"),
    "ffn": ({"type": "dense", "hidden_size": 80}, r"model\.ffn\.type is 'dense', but must be 'moe'"),
}


@pytest.mark.parametrize(("key", "value", "sentence"), [(key, *case) for key, case in KEYS.items()], ids=KEYS)
def test_the_first_key_that_differs_is_named(key, value, sentence, folders):
    found = open_pretrained(folders / "mixtral")
    own = found.model.model_dump(mode="json", exclude_unset=True)
    model = recipe(folders / "mixtral", model=own | {key: value}).model
    settings = InitFrom(checkpoint=str(folders / "mixtral"))
    with pytest.raises(UserError, match=sentence):
        check_model(found, model, settings)
    if key in ("ffn", "vocab_size"):  # a stage that changes the model on purpose
        check_model(found, model, settings.model_copy(update={"left_out": ("embedding.weight", "*.ffn.*")}))


def test_a_key_inside_a_section_and_keys_that_are_free(folders):
    found = open_pretrained(folders / "mixtral")
    settings = InitFrom(checkpoint=str(folders / "mixtral"), new=("*.lora.*",))
    own = found.model.model_dump(mode="json", exclude_unset=True)
    own |= {"lora": {"rank": 2, "alpha": 4.0}, "recompute": True, "init_std": 0.5}
    check_model(found, recipe(folders / "mixtral", model=own).model, settings)
    own["ffn"]["router"]["top_k"] = 3
    with pytest.raises(UserError, match=r"model\.ffn\.router\.top_k is 3, but must be 2"):
        check_model(found, recipe(folders / "mixtral", model=own).model, settings)


def test_the_section_can_be_written_without_an_import(folders, tmp_path):
    write_section(folders / "llama", tmp_path / "model.yaml")
    written = parse_yaml((tmp_path / "model.yaml").read_text(), "test")
    assert written == parse_yaml((folders / "llama-ours" / "model.yaml").read_text(), "test")
    with pytest.raises(UserError, match=r"model\.yaml exists already"):
        write_section(folders / "llama", tmp_path / "model.yaml")


def test_another_tokenizer_is_refused(folders, tmp_path):
    found, settings = open_pretrained(folders / "llama"), InitFrom(checkpoint="x")
    save_tokenizer(tmp_path / "other", bos_token="<|end|>", eos_token="<|start|>")
    other = load_vocabulary(
        recipe(folders / "llama", data={"shards": "a", "text_tokenizer": str(tmp_path / "other")}).data
    )
    with pytest.raises(UserError, match=r"llama was trained with another tokenizer than text tokenizer .{8} \(300 pie"):
        check_tokenizer(found, settings, other)
    check_tokenizer(found, settings.model_copy(update={"left_out": ("embedding.*",)}), other)
    check_tokenizer(found, settings, load_vocabulary(recipe(folders / "llama").data))


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
FAULTS = {
    "nan, which one rank reads": (
        lambda f: change_tensors(f, lambda t: t[EXPERT].fill_(torch.nan)),
        {},
        f"the tensor '{EXPERT}' holds NaN or infinite numbers",
    ),
    "missing": (lambda f: change_tensors(f, lambda t: t.pop(EXPERT)), {}, f"lacks the tensor '{EXPERT}'"),
    "another model": (lambda f: None, {"rope_base": 7.0}, "model.rope_base is 7.0, but must be 300.0"),
    "pickled": (
        lambda f: [path.rename(path.with_suffix(".bin")) for path in f.glob("*.safetensors")],
        {},
        ".bin but no .safetensors file, and pickled weights are not read",
    ),
    "no position": (
        lambda f: None,
        {"init_from": {"data_position": True}},
        "init_from.data_position: {folder} is not a checkpoint of a run",
    ),
}


@pytest.mark.parametrize(("damage", "changes", "sentence"), FAULTS.values(), ids=FAULTS)
def test_faults_are_one_sentence_on_every_rank(damage, changes, sentence, tmp_path):
    folder = tmp_path / "hf"
    save_mixtral(folder, vocab_size=ROWS)
    save_tokenizer(folder, bos_token="<|start|>", eos_token="<|end|>")
    config = recipe(folder, expert=2)
    init = config.init_from.model_copy(update=changes.pop("init_from", {}))
    config = config.model_copy(update={"init_from": init, "model": config.model.model_copy(update=changes)})
    damage(folder)
    sentences = run_ranks(attempt, 2, config)
    assert all(said is not None and sentence.format(folder=folder) in said for said in sentences), sentences
    assert all("\n" not in said for said in sentences)
    assert json.loads((folder / "config.json").read_text())
