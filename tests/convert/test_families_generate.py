"""Greedy generation by models of every family: transformers' tokens, batched, and over expert-parallel ranks."""

from __future__ import annotations

import pytest
import torch

from moe_dist.checkpoint.manifest import read_state
from moe_dist.checkpoint.stored_weights import fill_model
from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.hugging_face import import_folder
from moe_dist.core.strict import validate
from moe_dist.data.tokenizers.text_tokenizer import load_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.generate.sampling import Sampling
from moe_dist.harness.answering import AnsweringModel
from moe_dist.harness.stopping import StopSettings
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from tests.convert.test_families import CASES
from tests.data.tokenizers.test_hugging_face_text import save as save_tokenizer
from tests.support.distributed import run_ranks
from tests.support.family_models import save_model
from tests.support.hugging_face_models import random_documents

TOKENS = 300  # of the tokenizer
PADDED = 320  # rows of the embedding in the cases of two ranks: those beyond the tokens are never generated
LENGTH = 12  # tokens that are generated
MARGIN = 2e-4  # between the two largest logits of the reference; below it, rounding may choose
ONE_RANK = ["llama, biases, llama3, tied", "mistral, window", "qwen2, windows above", "qwen3, biases, wide"]
TWO_RANKS = ["mixtral", "olmoe, clipped, renormalised", "qwen3_moe, window, a dense layer", "qwen2_moe", "deepseek"]


def complete_on_rank(rank, folder, checkpoint, prompts):
    """Return our continuations. rank -1: without ranks."""
    layout = Layout() if rank < 0 else make_layout(expert=2, device=torch.device("cpu"))
    config = validate(ModelConfig, read_state(checkpoint)["config"]["model"], "test")
    model = Transformer(config, config.vocab_size or TOKENS, layout, seed=0).eval()
    fill_model(model, checkpoint, layout)
    vocabulary = Vocabulary(load_text_tokenizer(folder), None)
    answering = AnsweringModel(model=model, vocabulary=vocabulary, layout=layout, context=64, budget=128)
    settings = StopSettings(max_tokens=LENGTH, until=())
    return answering.complete(prompts, settings, Sampling(temperature=0))


@torch.no_grad()
def check(theirs, prompt, generated, vocabulary):
    """Assert that every generated token is the reference's. Return the number of choices that were too close."""
    assert 0 < len(generated) <= LENGTH and (len(generated) == LENGTH or generated[-1] == vocabulary.eos)
    ids, close = list(prompt), 0
    for token in generated:
        best = theirs(torch.tensor([ids])).logits[0, -1, : vocabulary.size].topk(2)
        if float(best.values[0] - best.values[1]) < MARGIN:
            close += 1
        else:
            assert token == int(best.indices[0])
        ids.append(token)
    return close


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_greedy_output_is_the_references(name, tmp_path):
    kind, changes = CASES[name]
    theirs = save_model(kind, tmp_path / "hf", vocab_size=PADDED if name in TWO_RANKS else TOKENS, **changes)
    save_tokenizer(tmp_path / "hf", bos_token="<|start|>", eos_token="<|end|>")
    import_folder(tmp_path / "hf", tmp_path / "ours")
    prompts = random_documents(TOKENS - 10)
    arguments = (tmp_path / "hf", tmp_path / "ours", prompts)
    of_ranks = run_ranks(complete_on_rank, 2, *arguments) if name in TWO_RANKS else [complete_on_rank(-1, *arguments)]
    assert all(found == of_ranks[0] for found in of_ranks)
    vocabulary = Vocabulary(load_text_tokenizer(tmp_path / "hf"))
    close = sum(check(theirs, prompt, found, vocabulary) for prompt, found in zip(prompts, of_ranks[0], strict=True))
    print(f"{close} of {sum(map(len, of_ranks[0]))} choices were closer than {MARGIN}")
    assert len({tuple(found) for found in of_ranks[0]}) == len(prompts), "every prompt has the same continuation"
