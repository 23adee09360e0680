"""Every shipped recipe parses and builds (on the meta device); the models of MoMa's table have the paper's sizes."""

import re
from pathlib import Path

import pytest
import torch

from moe_dist.config.recipe import load_config
from moe_dist.config.routers import router_settings
from moe_dist.core.costs import Work
from moe_dist.metrics.flops import model_flops
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from moe_dist.training.schedule import learning_rate
from moe_dist.training.trainable import freeze_others
from tests.support import ROOT

FOLDER = ROOT / "configs"
RECIPES = sorted(FOLDER.glob("*.yaml"))
BILLION = 1e9
TABLE = {  # arXiv 2407.21770, the model table: dense parameters, parameters with 8 experts, tokens a step, steps
    "moma_90m": (0.090 * BILLION, 0.210 * BILLION, 6_291_456, 160_000),
    "moma_435m": (0.435 * BILLION, 1.9 * BILLION, 6_291_456, 160_000),
    "moma_1_4b": (1.4 * BILLION, 7.1 * BILLION, 8_388_608, 120_000),
    "mod_moma_90m": (0.110 * BILLION, 0.317 * BILLION, 6_291_456, 160_000),  # with mixture-of-depths
    "mod_moma_435m": (0.635 * BILLION, 3 * BILLION, 6_291_456, 160_000),
    "mod_moma_1_4b": (2.3 * BILLION, 12 * BILLION, 8_388_608, 120_000),
}


def build(config, vocab_size=65_536) -> Transformer:
    with torch.device("meta"):
        return Transformer(config.model, vocab_size, Layout(), config.seed)


def total(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def documented_override(path: Path, variant: str) -> str:
    """The one line that the recipe's header gives for a variant."""
    return re.search(rf'^#   {variant}:\s+"(.+)"$', path.read_text(), re.MULTILINE).group(1)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_builds_and_says_what_it_follows(path):
    config = load_config(path)
    assert path.read_text().startswith("# ")
    assert total(build(config, vocab_size=4096)) > 0
    assert config.model.ffn.hidden_size % 8 == 0, "grouped products need multiples of 8"
    assert config.data.lanes % config.parallel.expert == 0
    assert config.train.global_batch_groups % config.train.micro_batch_groups == 0


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("variant", ["dense", "moe_8x", "moma"])
def test_total_parameters_within_six_percent_of_the_table(name, variant):
    path = FOLDER / f"{name}.yaml"
    config = load_config(path, [] if variant == "moma" else [documented_override(path, variant)])
    dense, sparse, *_ = TABLE[name]
    assert total(build(config)) == pytest.approx(dense if variant == "dense" else sparse, rel=0.06)


@pytest.mark.parametrize("name", TABLE)
def test_training_settings_of_the_table(name):
    config = load_config(FOLDER / f"{name}.yaml")
    *_, tokens, steps = TABLE[name]
    assert config.train.global_batch_groups * config.data.group_sequences * config.data.sequence_length == tokens
    assert (config.train.steps, config.schedule.type, config.schedule.warmup_steps) == (steps, "linear", 4000)
    assert (config.schedule.peak_lr, config.schedule.end_lr) == (1e-4, 1e-6)


def test_an_expert_of_the_quickstart_is_as_wide_as_the_dense_model():
    moma, *others = (load_config(FOLDER / f"{name}_quickstart.yaml").model.ffn for name in ("moma", "dense", "moe_8x"))
    assert [ffn.hidden_size for ffn in others] == [moma.hidden_size] * 2  # one expert a token: as many active FLOPs
    assert [ffn.type for ffn in (moma, *others)] == ["moe", "dense", "moe"]


def flops_per_token(model, documents=(128,) * 8) -> float:
    """Of training, with one expert a token on average and every document's tokens admitted at the same share."""
    share = model.depth.capacity if model.depth else 1.0
    admitted = {layer: [round(share * length) for length in documents] for layer in model.depth_layers}
    rows = {layer: sum(admitted.get(layer, documents)) for layer in range(model.num_layers)}
    with torch.device("meta"):
        built = Transformer(model, 1536, Layout(), seed=0)
    return model_flops(built, Work(document_lengths=documents, rows=rows, admitted=admitted)) / sum(documents)


def test_mixture_of_depths_has_the_flops_of_the_recipe_without_it_by_more_layers():
    plain, mod = (load_config(FOLDER / f"{name}_quickstart.yaml") for name in ("moma", "mod_moma"))
    assert list(mod.model.depth_layers) == [0, 2, 4, 6] and mod.model.depth.capacity == 0.25
    assert flops_per_token(mod.model) == pytest.approx(flops_per_token(plain.model), rel=0.03)
    shallow = mod.model.model_copy(update={"num_layers": 4})
    assert flops_per_token(shallow) < 0.75 * flops_per_token(plain.model)


def test_the_causal_stage_trains_auxiliary_routers_of_the_quickstart_and_nothing_else():
    plain, causal = (load_config(FOLDER / f"{name}_quickstart.yaml") for name in ("moma", "moma_causal"))
    names = {name for name, _ in build(causal, 100).named_parameters()}
    new = names - {name for name, _ in build(plain, 100).named_parameters()}
    assert len(new) == 4 * 2 * 2 and all(".auxiliary.w" in name for name in new)
    assert causal.trainable == causal.init_from.new == ("*.auxiliary.*",)
    assert causal.init_from.checkpoint == plain.run.dir
    text = {"type": "expert_choice", "num_experts": 4, "auxiliary": True}
    assert causal.model.ffn.router == router_settings({"type": "modality", "text": text, "image": text})


def test_the_adamoe_recipes_train_with_equal_flops():
    null, top_2 = (load_config(FOLDER / f"adamoe{name}_quickstart.yaml") for name in ("", "_top2"))
    router, flops = null.model.ffn.router, []
    at_balance = router.top_k * router.num_experts / (router.num_experts + router.num_null_experts)
    for config, experts in ((null, at_balance), (top_2, top_2.model.ffn.router.top_k)):
        rows = dict.fromkeys(range(config.model.num_layers), round(experts * 512))
        of_a_step = model_flops(build(config, 2048), Work(document_lengths=[512], rows=rows))
        flops.append(of_a_step * config.train.steps)
    assert flops[0] == pytest.approx(flops[1], rel=0.02)


def test_the_llava_recipes_adapt_with_as_many_parameters():
    mole, lora = (load_config(FOLDER / f"llava_{name}_quickstart.yaml") for name in ("mole", "lora"))
    (four, of_four), (one, of_one) = ((c.model.ffn.router.num_experts, c.model.ffn.experts) for c in (mole, lora))
    assert four * of_four.rank == one * of_one.rank
    assert (of_four.alpha / of_four.rank, of_four.dropout) == (of_one.alpha / of_one.rank, of_one.dropout)


def test_roma_trains_the_routers_that_its_term_reads():
    tuned, aligned = (load_config(FOLDER / f"roma_{name}.yaml") for name in ("experts", "quickstart"))
    assert aligned.init_from.checkpoint == tuned.run.dir
    layers = range(tuned.model.num_layers - 5, tuned.model.num_layers)  # what the manifold term reads by default
    assert aligned.trainable == tuple(f"layers.{layer}.ffn.router.*" for layer in layers)


@pytest.mark.parametrize(
    ("name", "vocab_size", "expected", "of_billions"),
    [
        ("roma_olmoe", 50_304, 5 * 2048 * 64, 6.92),  # the paper: 0.0095 % of 6.92 billion
        ("roma_olmoe_released", 50_304, 5 * 2048 * 64, 6.92),
        ("roma_deepseekmoe", 102_400, 5 * 2048 * 64, 16.4),
        ("roma_qwen3_30b", 151_936, 5 * 2048 * 128, 30.5),
    ],
)
def test_roma_trains_the_gates_of_the_last_five_layers_alone(name, vocab_size, expected, of_billions):
    config = load_config(FOLDER / f"{name}.yaml")
    model = build(config, vocab_size)
    assert total(model) == pytest.approx(of_billions * BILLION, rel=2e-3)
    freeze_others(model, config.trainable)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = range(config.model.num_layers - config.losses["manifold"].last_layers, config.model.num_layers)
    assert set(trained) == {f"layers.{layer}.ffn.router.gate.weight" for layer in layers}
    assert sum(parameter.numel() for parameter in trained.values()) == expected
    assert expected / total(model) == pytest.approx(0.0095e-2, rel=0.01) or "olmoe" not in name


def test_the_released_recipe_has_the_settings_of_the_authors_code():
    config = load_config(FOLDER / "roma_olmoe_released.yaml")
    term = config.losses["manifold"]
    assert [term.weight_at(step) for step in (0, 1000, 2000, 4000)] == pytest.approx([0, 0.4, 0.8, 0.8])
    assert (term.neighbours.k, term.neighbours.distance, term.neighbours.sigma) == (5, "cosine", 0.4)
    rates = [learning_rate(step, config=config.schedule, steps=config.train.steps) for step in (999, 1999, 4599)]
    assert rates == pytest.approx([3.5e-5, 7e-5, 7e-5])
    assert config.losses["load_balance"].weight_at(0) == 0
