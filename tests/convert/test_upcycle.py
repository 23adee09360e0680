"""Upcycling: every expert is the dense FFN to the bit, and with weights that sum to 1 the model says what it said."""

import pytest
import torch
import yaml

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.init_from import loader_state
from moe_dist.checkpoint.manifest import newest_complete, read_state
from moe_dist.checkpoint.stored_weights import read_tensors, write_tensors
from moe_dist.config.recipe import InitFrom
from moe_dist.convert.hugging_face import import_folder
from moe_dist.convert.upcycle import upcycle
from moe_dist.core.errors import UserError
from moe_dist.core.seeding import seeded_normal_
from moe_dist.core.tensor_files import LazyTensor
from moe_dist.losses.language import language_loss
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from tests.support.distributed import run_ranks
from tests.support.hugging_face_models import load_checkpoint, logits_packed, random_documents, save_llama
from tests.support.model_batches import DENSE, make_batch, model_config
from tests.support.toy_model import make_config, sgd, step_batches
from tests.support.toy_model import objective as cross_entropy
from tests.support.trajectory import full_parameters

EXPERTS = 4
VOCABULARY = 64


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """A checkpoint of a dense model: a small Llama with grouped queries and tied embeddings."""
    folder = tmp_path_factory.mktemp("seed")
    save_llama(folder / "hf", tie_word_embeddings=True)
    import_folder(folder / "hf", folder / "dense")
    return folder / "dense"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.ffn.router.top_k=1"],
        ["model.ffn.router.top_k=4", "model.ffn.router.renormalize=false"],  # all experts: weights sum to 1 anyway
        ["model.ffn.router={type: null_experts, num_experts: 4, num_null_experts: 1, top_k: 2}"],  # one true at least
    ],
    ids=["top2", "top1", "all", "null"],
)
def test_the_first_loss_is_the_seeds(overrides, seed, tmp_path):
    upcycle(seed, tmp_path / "out", experts=str(EXPERTS), overrides=overrides)
    dense, sparse = load_checkpoint(seed), load_checkpoint(tmp_path / "out")
    batch = make_batch([30, 11, 20])
    with torch.no_grad():
        before, after = (language_loss(m(batch.tokens_T, batch.info).logits_TV, batch).total for m in (dense, sparse))
    predictions = int(batch.loss_mask_T.sum())
    assert float(after) / predictions == pytest.approx(float(before) / predictions, abs=1e-6)
    documents = random_documents()
    before, after = logits_packed(dense, documents), logits_packed(sparse, documents)
    assert before.abs().max() > 3
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_weights_that_do_not_sum_to_one_show(seed, tmp_path):
    upcycle(seed, tmp_path / "out", experts=str(EXPERTS), overrides=["model.ffn.router.renormalize=false"])
    documents = random_documents()
    before, after = (logits_packed(load_checkpoint(path), documents) for path in (seed, tmp_path / "out"))
    assert (before - after).abs().max() > 0.1


def test_copies_are_bitwise_and_gates_are_drawn_by_the_seed(seed, tmp_path):
    for number, name in ((0, "a"), (0, "b"), (7, "c")):
        upcycle(seed, tmp_path / name, experts=str(EXPERTS), seed=number)
    a, b, c, dense = (
        {name: tensor.read() for name, tensor in read_tensors(path).items()}
        for path in (tmp_path / "a", tmp_path / "b", tmp_path / "c", seed)
    )
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for name, tensor in dense.items():
        if ".ffn.gate_up" in name or ".ffn.down" in name:
            stacked = name.replace(".ffn.", ".ffn.experts.").removesuffix(".weight")
            for expert in range(EXPERTS):
                assert torch.equal(a.pop(f"{stacked}[{expert}]"), tensor.T), f"{stacked}[{expert}]"
        else:
            assert torch.equal(a.pop(name), tensor), name
    assert set(a) == {f"layers.{layer}.ffn.router.gate.weight" for layer in range(3)}
    for name, gate in a.items():
        expected = torch.empty(EXPERTS, 48)
        seeded_normal_(expected, seed=0, name=name, std=0.3)  # a new model's
        assert torch.equal(gate, expected)
        assert not torch.equal(gate, c[name])


def test_the_recipe_that_fits_is_beside_it(seed, tmp_path):
    (seed / "tokenizer").mkdir(exist_ok=True)
    (seed / "tokenizer" / "tokenizer.json").write_text("{}")
    upcycle(seed, tmp_path / "out", experts=str(EXPERTS), overrides=["model.ffn.router.score=sigmoid"])
    dense, sparse = (yaml.safe_load((path / "model.yaml").read_text())["model"] for path in (seed, tmp_path / "out"))
    assert sparse.pop("ffn") == {
        "type": "moe",
        "hidden_size": 80,
        "router": {"type": "top_k", "num_experts": 4, "top_k": 2, "renormalize": True, "score": "sigmoid"},
    }
    assert dense.pop("ffn") == {"type": "dense", "hidden_size": 80}
    assert dense == sparse
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text() == "{}"


def train_and_save(rank, path):
    """A dense model of ours on every rank, one step of training, saved."""
    layout = make_layout(expert=1, device=init_distributed())
    config = make_config(deepspeed=sgd(stage=2))
    config = config.model_copy(update={"model": model_config(DENSE)})
    engine = make_engine(Transformer(config.model, VOCABULARY, layout, seed=1), config, layout)
    engine.train_step(step_batches(0, rank, layout.world, groups=4), cross_entropy, 0.1)
    checkpoint.save(path, engine, layout, state={"step": 1, "config": config.model_dump(mode="json")})
    return full_parameters(engine)


def load_into_engine(rank, path, stage, config):
    layout = make_layout(expert=2, device=init_distributed())
    engine = make_engine(Transformer(config, VOCABULARY, layout, seed=5), make_config(deepspeed=sgd(stage)), layout)
    checkpoint.load(path, engine, layout)
    return full_parameters(engine)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_ours_from_two_ranks_upcycled_for_two_expert_parallel_ranks(stage, tmp_path):
    """Moments are left behind; masters in many pieces are joined; the engine at EP=2 takes the result."""
    dense = run_ranks(train_and_save, 2, str(tmp_path / "run" / "checkpoints" / "step_00000001"))[0]
    upcycle(tmp_path / "run", tmp_path / "out", experts=str(EXPERTS))
    config = load_checkpoint(tmp_path / "out").config
    on_ranks = run_ranks(load_into_engine, 2, str(tmp_path / "out"), stage, config)
    found = on_ranks[0] | on_ranks[1]
    assert len(found) == len(dense) + 3 * (2 * EXPERTS - 2 + 1)
    assert torch.equal(found["embedding.weight"], dense["embedding.weight"])
    for expert in range(EXPERTS):
        for key in ("gate_up", "down"):
            assert torch.equal(found[f"layers.2.ffn.experts.{key}[{expert}]"], dense[f"layers.2.ffn.{key}.weight"].T)


@pytest.mark.parametrize(
    ("num_experts", "overrides", "sentence"),
    [
        (0, [], r"key 'model\.ffn\.router\.num_experts': input should be greater than 0, got 0"),
        (4, ["model.ffn.router.top_k=5"], "top_k=5 is more than the router's 4 columns"),
        (4, ["model.ffn.router.topk=2"], r"unknown key 'model\.ffn\.router\.topk' \(did you mean 'top_k'\?\)"),
        (4, ["model.num_layers=2"], r"override 'model\.num_layers=2': upcycling changes model\.ffn\.router alone"),
    ],
)
def test_bad_settings_are_named(num_experts, overrides, sentence, seed, tmp_path):
    with pytest.raises(UserError, match=sentence):
        upcycle(seed, tmp_path / "out", experts=str(num_experts), overrides=overrides)
    assert not list(tmp_path.iterdir())


def test_bad_sources_are_named(seed, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/manifest\.json cannot be read"):
        upcycle(tmp_path / "nowhere", tmp_path / "out", experts="4")
    upcycle(seed, tmp_path / "sparse", experts="2")
    with pytest.raises(UserError, match=r"sparse holds a model that is neither dense nor has exactly one expert per"):
        upcycle(tmp_path / "sparse", tmp_path / "out", experts="4")


def one_each(slices=1, **child) -> dict:
    """MoMa's 1t1i."""
    router = {name: {"type": "expert_choice", "num_experts": 1, **child} for name in ("text", "image")}
    return {"type": "moe", "hidden_size": 48, "slices": slices, "router": {"type": "modality", **router}}


@pytest.fixture(scope="module")
def one_text_one_image(tmp_path_factory):
    """A checkpoint as a run writes it: a 1t1i model after a place in its data."""
    return write_run(tmp_path_factory.mktemp("1t1i") / "run", one_each(auxiliary=True))


def write_run(folder, ffn, **settings):
    path = folder / "checkpoints" / "step_00000007"
    model = Transformer(model_config(ffn, **settings), VOCABULARY, Layout(), seed=1)
    tensors = {}
    for name, parameter in model.named_parameters():
        experts = getattr(parameter, "expert_ids", None)
        rows = {name: parameter} if experts is None else {f"{name}[{e}]": row for e, row in zip(experts, parameter)}
        tensors |= {key: LazyTensor.of(value.detach()) for key, value in rows.items()}
    state = {"step": 7, "tokens": 9, "loader": {"groups": 56}, "vocabulary": "abc"}
    write_tensors(path, tensors, state | {"config": {"model": model.config.model_dump(mode="json")}})
    return folder


@pytest.mark.parametrize("gates", ["fresh", "copied"])
@pytest.mark.parametrize(("experts", "text"), [("4t4i", 4), ("7t1i", 7), ("1t2i", 1)])
def test_one_expert_a_modality_becomes_any_number(experts, text, gates, one_text_one_image, tmp_path):
    noise = [f"model.ffn.router.{name}.gumbel_noise=true" for name in ("text", "image")]
    upcycle(one_text_one_image, tmp_path / "out", experts=experts, gates=gates, overrides=noise, seed=3)
    old, new = (
        {name: tensor.read() for name, tensor in read_tensors(path).items()}
        for path in (newest_complete(one_text_one_image), tmp_path / "out")
    )
    total = text + int(experts[2])
    drawn = Transformer(load_checkpoint(tmp_path / "out").config, VOCABULARY, Layout(), seed=3)
    for layer in range(3):
        for key in ("gate_up", "down"):
            for expert in range(total):
                source = old[f"layers.{layer}.ffn.experts.{key}[{0 if expert < text else 1}]"]
                assert torch.equal(new.pop(f"layers.{layer}.ffn.experts.{key}[{expert}]"), source)
                assert source.any()
        for index, name in enumerate(("text", "image")):
            gate = f"layers.{layer}.ffn.router.{name}.gate.weight"
            count = (text, total - text)[index]
            fresh = getattr(drawn.layers[layer].ffn.router, name).gate.weight
            assert torch.equal(new.pop(gate), old[gate].expand(count, -1) if gates == "copied" else fresh)
    assert all(torch.equal(tensor, old[name]) for name, tensor in new.items()) and "embedding.weight" in new
    assert not any(".experts." in name or ".router." in name for name in new), "surplus tensors"
    router = read_state(tmp_path / "out")["config"]["model"]["ffn"]["router"]
    assert router["text"] == {
        "capacity_factor": 1.0,
        "type": "expert_choice",
        "num_experts": text,
        "gumbel_noise": True,
    }


def test_experts_in_slices_are_copied_slice_by_slice(tmp_path):
    run = write_run(tmp_path / "run", one_each(slices=2))
    upcycle(run, tmp_path / "out", experts="3t1i")
    old, new = read_tensors(newest_complete(run)), read_tensors(tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").config.ffn.slices == 2
    for number in range(8):
        source = 2 * (number // 4) + (number % 4 == 3)
        for key in ("gate_up", "down"):
            stacked = f"layers.1.ffn.experts.{key}"
            assert torch.equal(new[f"{stacked}[{number}]"].read(), old[f"{stacked}[{source}]"].read())


def test_auxiliary_routers_of_the_seed_are_left_behind_and_its_depth_gates_kept(tmp_path):
    depth = {"capacity": 0.5, "auxiliary": True}
    run = write_run(tmp_path / "run", one_each(auxiliary=True), depth=depth)
    upcycle(run, tmp_path / "out", experts="2t2i")
    old, new = (set(read_tensors(path)) for path in (newest_complete(run), tmp_path / "out"))
    assert {name for name in old if name.startswith("depth.") and ".auxiliary." in name}
    assert not [name for name in new if ".auxiliary." in name]
    assert {name for name in new if name.startswith("depth.")} == {
        name for name in old if name.startswith("depth.") and ".auxiliary." not in name
    }
    section = yaml.safe_load((tmp_path / "out" / "model.yaml").read_text())["model"]
    assert section["depth"]["capacity"] == 0.5 and not section["depth"]["auxiliary"]


def test_with_copied_gates_and_one_expert_each_the_model_is_its_seed(one_text_one_image, tmp_path):
    upcycle(one_text_one_image, tmp_path / "out", experts="1t1i", gates="copied")
    batch = make_batch([30, 11, 20])
    old, new = (load_checkpoint(path) for path in (newest_complete(one_text_one_image), tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(*(model(batch.tokens_T, batch.info).logits_TV for model in (old, new)))


def test_a_dense_model_becomes_experts_of_both_modalities(seed, tmp_path):
    upcycle(seed, tmp_path / "out", experts="2t1i")
    new, dense = read_tensors(tmp_path / "out"), read_tensors(seed)["layers.1.ffn.down.weight"].read()
    assert all(torch.equal(new[f"layers.1.ffn.experts.down[{expert}]"].read(), dense.T) for expert in range(3))
    assert "layers.1.ffn.experts.down[3]" not in new


def test_where_the_seed_stood_in_its_data_is_kept(one_text_one_image, seed, tmp_path):
    upcycle(one_text_one_image, tmp_path / "out", experts="2t2i")
    state = read_state(tmp_path / "out")
    assert (state["loader"], state["vocabulary"], state["step"]) == ({"groups": 56}, "abc", 0)
    settings = InitFrom(checkpoint=str(tmp_path / "out"), data_position=True)
    assert loader_state(settings) == {"groups": 56}
    assert loader_state(settings.model_copy(update={"data_position": False})) is None
    with pytest.raises(UserError, match=r"init_from\.data_position: .*dense does not say where its run was"):
        loader_state(InitFrom(checkpoint=str(seed), data_position=True))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"experts": "4"}, "--experts 4: .* has experts for each modality: give two numbers, as 4t4i"),
        ({"experts": "4x"}, "--experts 4x: give a number, or text and image experts as 4t4i"),
        ({"experts": "0t1i"}, r"key 'model\.ffn\.router\.text\.num_experts': input should be greater than 0"),
        (
            {"experts": "2t2i", "overrides": ["model.ffn.router={type: top_k, num_experts: 4, top_k: 1}"]},
            r"has experts for each modality, but model\.ffn\.router\.type does not",
        ),
    ],
)
def test_bad_settings_for_experts_of_modalities(settings, sentence, one_text_one_image, tmp_path):
    with pytest.raises(UserError, match=sentence):
        upcycle(one_text_one_image, tmp_path / "out", **settings)


def test_a_dense_model_has_no_gates_to_copy(seed, tmp_path):
    with pytest.raises(UserError, match="dense model, which has no gates to copy"):
        upcycle(seed, tmp_path / "out", experts="2t2i", gates="copied")
