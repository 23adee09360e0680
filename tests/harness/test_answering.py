"""Scores compared with one forward pass for each request, and continuations that end at a stop string.

Shape suffixes: T tokens, V vocabulary.
"""

import random

import pytest
import torch

from moe_dist.core.batch import TokenInfo
from moe_dist.core.errors import UserError
from moe_dist.generate.sampling import Sampling
from moe_dist.harness.answering import AnsweringModel
from moe_dist.harness.stopping import StopSettings
from moe_dist.parallel.layout import Layout
from tests.generate.test_decode import MODELS
from tests.support.generation_cases import make_format, make_model
from tests.support.model_batches import EXPERT_CHOICE

CONTEXT = 12
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def form(tokenizers):
    return make_format(tokenizers)


def answering(form, recipe, **changes):
    settings = {"context": CONTEXT, "budget": 40} | changes
    model = make_model(recipe, form)
    return AnsweringModel(model=model, vocabulary=form.vocabulary, layout=Layout(), **settings)


def random_requests():
    """Some share their input, some are longer than the context, one is read again with a longer continuation."""
    draw = random.Random(0)
    requests = []
    for _ in range(12):
        before = [draw.randrange(4, 300) for _ in range(draw.randint(1, 14))]
        requests += [(before, [draw.randrange(4, 300)]) for _ in range(2)]
        requests.append((before, [draw.randrange(4, 300) for _ in range(draw.randint(2, 9))]))
    before, continuation = requests[2]
    return [*requests, ([*before, *continuation][:1], [*before, *continuation][1:])][-30:]


@torch.no_grad()
def log_probs_alone(answering, read):
    tokens_T = torch.tensor(read)
    info = TokenInfo.build(
        modality_T=answering.vocabulary.modality_of[tokens_T],
        valid_T=torch.ones_like(tokens_T, dtype=torch.bool),
        position_T=torch.arange(len(read)),
        token_id_T=torch.arange(len(read)),
        document_lengths=[len(read)],
        num_groups=1,
    )
    return answering.model(tokens_T, info.causally()).logits_TV.log_softmax(dim=1)


def alone(answering, before, continuation):
    read = [*before, *continuation][-(CONTEXT + 1) : -1]
    log_probs_TV = log_probs_alone(answering, read)[-len(continuation) :]
    total = sum(float(row[token]) for row, token in zip(log_probs_TV, continuation, strict=True))
    return total, log_probs_TV.argmax(dim=1).tolist() == continuation


@pytest.mark.parametrize("name", ["top_k", "moma-depth"])
def test_scores_equal_those_of_each_request_alone(name, form):
    model = answering(form, MODELS[name])
    requests = [request for request in random_requests() if len(request[1]) <= CONTEXT]
    before = requests[0][0]
    requests.append((before, [int(log_probs_alone(model, before[-CONTEXT:])[-1].argmax())]))
    passes = []
    scores = answering(form, MODELS[name], on_step=lambda: passes.append(1)).score(requests)
    expected = [alone(model, *request) for request in requests]
    assert [likely for _, likely in scores] == [likely for _, likely in expected] and scores[-1][1]
    assert [total for total, _ in scores] == pytest.approx([total for total, _ in expected], abs=1e-9)
    assert 3 < len(passes) < len(requests) / 2, "requests share inputs and micro-batches"


def decoded(form, ids):
    return form.vocabulary.text.decode([token for token in ids if token < form.vocabulary.text.size])


def test_a_continuation_ends_at_a_stop_string(form):
    model = answering(form, MODELS["dense"], context=40, budget=80)
    with torch.no_grad():
        model.model.output.weight[[form.vocabulary.boi, form.vocabulary.eos]] /= 5  # undo make_model's preference
    prompts = [[form.vocabulary.bos, *form.vocabulary.text.encode(text)] for text in ("a red heart", "the sun", "x")]
    whole = model.complete(prompts, StopSettings((), 20), GREEDY)
    texts = [decoded(form, ids) for ids in whole]
    assert all(len(ids) == 20 or ids[-1] == form.vocabulary.eos for ids in whole)
    stop = next(letter for text in texts for letter in text[len(text) // 2 :] if letter.isascii() and letter.isalnum())
    ended = model.complete(prompts, StopSettings((stop, ""), 20), GREEDY)
    for ids, all_ids, text in zip(ended, whole, texts, strict=True):
        assert ids == all_ids[: len(ids)], "the same tokens, but fewer"
        assert (stop in decoded(form, ids)) == (stop in text)
        assert stop not in decoded(form, ids[:-1])
    assert ended != whole


def test_routing_that_sees_later_tokens_is_refused(form):
    with pytest.raises(UserError, match="train auxiliary routers first"):
        answering(form, {"ffn": EXPERT_CHOICE})
