"""A pretrained MoE becomes an AdaMoE model: its gates get rows for null experts, all else is its own."""

import pytest
import torch

from moe_dist.checkpoint.stored_weights import read_tensors
from moe_dist.config.recipe import Config
from moe_dist.convert.hugging_face import import_folder
from moe_dist.convert.pretrained import open_pretrained
from moe_dist.core.strict import validate
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.data.tokenizers.test_hugging_face_text import save as save_tokenizer
from tests.support.distributed import run_ranks
from tests.support.family_models import save_model
from tests.support.hugging_face_models import as_documents, logits_apart, logits_packed, random_documents
from tests.training.test_pretrained_start import attempt, start

ROWS = 304  # the tokenizer has 300 tokens
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {  # n true experts; Mixtral's weights are renormalised, the others' are not
    "mixtral": (4, {}),
    "olmoe": (6, {"num_experts_per_tok": 2}),
    "qwen3_moe": (6, {**EXPERTS, "head_dim": 8, "mlp_only_layers": [0]}),
    "deepseek": (6, {"num_experts_per_tok": 2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("null_gates")
    for name, (_, changes) in FAMILIES.items():
        save_model(name, root / name, vocab_size=ROWS, **changes)
        save_tokenizer(root / name, bos_token="<|start|>", eos_token="<|end|>")
    return root


def recipe(folder, *, nulls, top_k=3, null_gates="copied", stage=1, source=None):
    """The recipe of the pretrained model, with null experts."""
    model = open_pretrained(folder).model.model_dump(mode="json", exclude_unset=True)
    old = model["ffn"]["router"]
    over = "chosen_true" if old["renormalize"] else "all_true"
    router = {"type": "null_experts", "num_experts": old["num_experts"], "num_null_experts": nulls, "top_k": top_k}
    raw = {
        "run": {"dir": "unused"},
        "data": {"shards": "unused", "text_tokenizer": str(folder)},
        "model": model | {"ffn": model["ffn"] | {"router": router | {"normalize_over": over}}},
        "init_from": {"checkpoint": str(source or folder), "null_gates": null_gates},
        "parallel": {"expert": 2},
        "train": {"steps": 1, "global_batch_groups": 4},
        "schedule": {"peak_lr": 0.1},
        "deepspeed": {
            "optimizer": {"type": "AdamW"},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    }
    return validate(Config, raw, "test")


@pytest.mark.parametrize("null_gates", ["copied", "fresh"])
@pytest.mark.parametrize(("name", "stage"), [("mixtral", 1), ("olmoe", 3), ("qwen3_moe", 2), ("deepseek", 3)])
def test_the_gates_get_rows_and_the_rest_is_loaded(name, stage, null_gates, folders, tmp_path):
    number, _ = FAMILIES[name]
    config = recipe(folders / name, nulls=2 * number, null_gates=null_gates, stage=stage)
    import_folder(folders / name, tmp_path / "ours")
    stored = {key: tensor.read() for key, tensor in read_tensors(tmp_path / "ours").items()}
    fresh = dict(Transformer(config.model, ROWS, Layout(), config.seed).named_parameters())
    from_import = recipe(folders / name, nulls=2 * number, null_gates=null_gates, stage=3, source=tmp_path / "ours")
    for settings in (config, from_import):
        of_ranks = run_ranks(start, 2, settings)
        gates = [key for key in stored if key.endswith("router.gate.weight")]
        assert gates and all(set(account["widened"]) == set(gates) for _, account, _ in of_ranks)
        masters = of_ranks[0][0] | of_ranks[1][0]  # each rank has its own experts
        assert masters.keys() == stored.keys()
        for key, tensor in stored.items():
            expected = tensor
            if key in gates:
                nulls = tensor.repeat(2, 1) if null_gates == "copied" else fresh[key].detach()[number:]
                expected = torch.cat([tensor, nulls])
            assert torch.equal(masters[key].view_as(expected), expected), key


def with_null_experts(folder, out, *, nulls, top_k):
    """Return the pretrained model with null experts whose gate rows are copies."""
    config = recipe(folder, nulls=nulls, top_k=top_k)
    import_folder(folder, out)
    model = Transformer(config.model, ROWS, Layout(), seed=0)
    stored = {key: tensor.read() for key, tensor in read_tensors(out).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ids = getattr(parameter, "expert_ids", None)
            value = torch.stack([stored[f"{name}[{expert}]"] for expert in ids]) if ids else stored[name]
            copies = len(parameter) // len(value)
            parameter.copy_(value.repeat(copies, *[1] * (value.dim() - 1)))
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_without_the_null_columns_the_logits_are_the_pretrained_models(name, tmp_path):
    number, changes = FAMILIES[name]
    theirs = save_model(name, tmp_path / "hf", vocab_size=ROWS, **changes)
    save_tokenizer(tmp_path / "hf", bos_token="<|start|>", eos_token="<|end|>")
    model = with_null_experts(tmp_path / "hf", tmp_path / "ours", nulls=number, top_k=2)
    documents = random_documents(ROWS)
    expected, with_nulls = logits_apart(theirs, documents), logits_packed(model, documents)
    assert (with_nulls - expected).abs().max() > 0.1
    for module in model.modules():
        if hasattr(module, "router"):
            module.router.gate.register_forward_hook(mask_nulls(number))
    torch.testing.assert_close(logits_packed(model, documents), expected, rtol=0, atol=1e-4)


def mask_nulls(number):
    def hook(module, inputs, logits_VC):
        return torch.cat([logits_VC[:, :number], torch.full_like(logits_VC[:, number:], -1e4)], dim=1)

    return hook


@pytest.mark.parametrize(("name", "copies", "top_k"), [("mixtral", 1, 3), ("olmoe", 2, 5), ("qwen3_moe", 1, 4)])
def test_with_copies_the_load_is_that_of_balance(name, copies, top_k, folders, tmp_path):
    """Copies tie with their originals, and ties are broken at random: k n / (n + m) true experts for a token."""
    number, _ = FAMILIES[name]
    model = with_null_experts(folders / name, tmp_path / "ours", nulls=copies * number, top_k=top_k)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 48, generator=generator)
    _, info = as_documents([[0] * len(x)])
    layer = next(module for module in model.modules() if hasattr(module, "router"))
    _, record = layer.router(x, info)
    load = int(record.load_E.sum()) / len(x)
    assert load == pytest.approx(top_k / (1 + copies), rel=0.02)


def test_copies_need_a_multiple_and_a_choice_needs_to_be_made(folders):
    errors = {
        "a multiple": recipe(folders / "mixtral", nulls=6),
        "no choice": recipe(folders / "mixtral", nulls=4, null_gates=None),
    }
    found = {name: set(run_ranks(attempt, 2, config)) for name, config in errors.items()}
    (multiple,), (choice,) = found.values()
    assert "the 6 null experts of 'layers.0.ffn.router.gate.weight' are not a multiple of its 4 true" in multiple
    assert "model.ffn.router" in choice or "set init_from.null_gates to copied or fresh" in choice
