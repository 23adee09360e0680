"""Whole samples: with a cache, batches, ranks and guidance, they equal those of a plain loop."""

import pytest
import torch

from moe_dist.core.errors import UserError
from moe_dist.generate.decode import check_can_generate, generate
from moe_dist.generate.sampling import Sampling
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from tests.model.test_kv_cache import BY_MODALITY, CAUSAL_MOMA, DEPTH, NULL
from tests.support.distributed import run_ranks
from tests.support.generation_cases import generate_on_rank, make_format, make_model, make_samples, without_cache
from tests.support.model_batches import DENSE, EXPERT_CHOICE, MOMA, TOP_K, model_config

MODELS = {
    "dense": {"ffn": DENSE},
    "top_k": {"ffn": TOP_K},
    "null": {"ffn": NULL},
    "by_modality": {"ffn": BY_MODALITY},
    "moma-depth": {"ffn": CAUSAL_MOMA, **DEPTH},  # auxiliary routers for experts and depth
}
GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=1.3, top_p=0.9, seed=3)
SAMPLINGS = [pytest.param(GREEDY, id="greedy", marks=pytest.mark.slow), pytest.param(DRAWN, id="drawn")]


@pytest.fixture(scope="module")
def form(tokenizers):
    return make_format(tokenizers)


@pytest.mark.parametrize("name", ["dense", "top_k", "null", "moma-depth"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_batch_equals_each_sample_alone_without_a_cache(name, sampling, form, tokenizers):
    model = make_model(MODELS[name], form)
    expected = {s.number: without_cache(model, form, s, sampling) for s in make_samples(form)}
    assert generate_on_rank(-1, tokenizers, MODELS[name], sampling, False) == expected
    assert len({tuple(tokens) for tokens in expected.values()}) > 5, "the samples hardly differ"
    if name == "top_k" and sampling is DRAWN:
        assert any(form.vocabulary.eoi in tokens for tokens in expected.values()), "no image among text"
        assert any(form.vocabulary.eos in tokens for tokens in expected.values()), "no text ends by itself"


def test_rows_of_a_padded_vocabulary_are_never_chosen(form):
    """The likeliest rows are beyond the tokenizers' ids. The samples are those of a model without these rows."""
    model, padded = (make_model(MODELS["dense"], form) for _ in range(2))
    for layer in (padded.embedding, padded.output):
        layer.weight = torch.nn.Parameter(torch.cat([layer.weight, 9 * layer.weight.abs().amax() + layer.weight[:5]]))
    for sampling in (GREEDY, DRAWN):
        drawn = []
        for each in (model, padded):
            samples = make_samples(form)
            generate(each, samples, form, sampling, Layout(), lambda left: None)
            drawn.append([sample.generated for sample in samples])
        assert drawn[0] == drawn[1]


@pytest.mark.parametrize("name", ["top_k", "by_modality", "moma-depth"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_two_expert_parallel_ranks_give_the_samples_of_one_process(name, sampling, tokenizers):
    """Nine samples (five and four) end at different steps. A rank that is done takes part until the other is done."""
    alone = generate_on_rank(-1, tokenizers, MODELS[name], sampling, False)
    ranks = run_ranks(generate_on_rank, 2, tokenizers, MODELS[name], sampling, False)
    assert ranks[0] | ranks[1] == alone and len(ranks[0]) == 5
    assert len({max(map(len, of_rank.values())) for of_rank in ranks}) == 2, "the ranks end together"


@pytest.mark.parametrize(("name", "scale"), [("top_k", 0.0), ("top_k", 3.0), ("moma-depth", 3.0)])
def test_guidance_equals_the_formula_without_a_cache(name, scale, form, tokenizers):
    recipe = MODELS[name]
    model = make_model(recipe, form)
    sampling = DRAWN.model_copy(update={"guidance": scale})
    expected = {s.number: without_cache(model, form, s, sampling) for s in make_samples(form, guided=True)}
    assert generate_on_rank(-1, tokenizers, recipe, sampling, True) == expected
    plain = generate_on_rank(-1, tokenizers, recipe, DRAWN, True)
    assert plain != expected
    ranks = run_ranks(generate_on_rank, 2, tokenizers, recipe, sampling, True)
    assert ranks[0] | ranks[1] == expected


def test_a_guided_sample_without_a_caption_is_an_unguided_one(form):
    """The unconditional row is the prompt after caption dropout, so without a caption both rows are equal."""
    empty = make_samples(form, guided=True)[2]
    assert empty.prompt.tokens == empty.prompt.unconditional
    model = make_model(MODELS["dense"], form)
    generate(model, [empty], form, DRAWN.model_copy(update={"guidance": 5.0}), Layout(), lambda left: None)
    again = make_samples(form, guided=True)[2]
    generate(model, [again], form, DRAWN, Layout(), lambda left: None)
    assert empty.generated == again.generated


def test_more_samples_than_ranks_have_prompts(tokenizers, form):
    """Ranks without a sample take part from the first step."""
    alone = make_samples(form)[3]
    generate(make_model(MODELS["top_k"], form), [alone], form, DRAWN, Layout(), lambda left: None)
    ranks = run_ranks(_one_sample, 2, tokenizers)
    assert ranks == [alone.generated, None]


def _one_sample(rank, tokenizers):
    layout = make_layout(expert=2, device=torch.device("cpu"))
    form = make_format(tokenizers)
    samples = make_samples(form)[3:4] if rank == 0 else []
    generate(make_model(MODELS["top_k"], form, layout), samples, form, DRAWN, layout, lambda left: None)
    return samples[0].generated if samples else None


@pytest.mark.parametrize("ffn", [EXPERT_CHOICE, MOMA], ids=["moe_8x", "moma"])
def test_routing_that_looks_ahead_is_refused(ffn):
    with pytest.raises(UserError, match="depends on later tokens"):
        check_can_generate(Transformer(model_config(ffn), 50, Layout(), seed=0))


def test_a_capacity_is_refused():
    limited = TOP_K["router"] | {"capacity_factor": 1.0}
    of_text = BY_MODALITY["router"] | {"text": limited}
    for router in (limited, of_text):
        with pytest.raises(UserError, match=r"set capacity_factor of model\.ffn\.router to null"):
            check_can_generate(Transformer(model_config(TOP_K | {"router": router}), 50, Layout(), seed=0))
    check_can_generate(Transformer(model_config(TOP_K), 50, Layout(), seed=0))
