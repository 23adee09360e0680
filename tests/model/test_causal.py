"""Causal inference with auxiliary routers: what a later token can change, and what it cannot."""

import copy

import pytest
import torch

from moe_dist.errors import UserError
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.model.batches import EXPERT_CHOICE, MOMA, TOP_K, VOCAB, make_batch, model_config

CHANGED = 30  # of the 40 tokens


def with_auxiliary(ffn):
    """The same feed-forward part, with an auxiliary router beside every expert-choice router."""
    ffn = copy.deepcopy(ffn)
    router = ffn["router"]
    for one in (router, router.get("text", {}), router.get("image", {})):
        if one.get("type") == "expert_choice":
            one["auxiliary"] = True
    return ffn


def build(ffn, **changes) -> Transformer:
    return Transformer(model_config(with_auxiliary(ffn), **changes), VOCAB, Layout(), seed=1).double()


def moved(model, *, causal: bool):
    """bool [T]: which logits move when one token changes; and the records before the change."""
    batch = make_batch([40], seed=4)
    info = batch.info.causally() if causal else batch.info
    changed_T = batch.tokens_T.clone()
    changed_T[CHANGED] = (changed_T[CHANGED] + 1) % VOCAB
    with torch.no_grad():
        before, after = (model(tokens_T, info) for tokens_T in (batch.tokens_T, changed_T))
    # To 1e-12, not to the bit: another number of rows in an expert's product may round differently.
    return (before.logits_TV - after.logits_TV).abs().amax(dim=1) > 1e-12, before


MODELS = {"moe_8x": (EXPERT_CHOICE, {}), "moma": (MOMA, {})}


@pytest.mark.parametrize(("ffn", "changes"), MODELS.values(), ids=MODELS)
def test_a_later_token_moves_no_earlier_logit_with_causal_routers_and_does_with_those_of_training(ffn, changes):
    model = build(ffn, **changes)
    assert model.can_route_causally and not model.causal_routing
    moved_T, output = moved(model, causal=True)
    assert not moved_T[:CHANGED].any() and moved_T[CHANGED:].all()
    for record in output.records:  # a decision of its own for each token: neither all nor nothing
        assert 0 < record.load_E.sum() < sum(part.kept_VE.numel() for part in record.parts)
    moved_T, _ = moved(model, causal=False)
    assert moved_T[:CHANGED].any()


@pytest.mark.parametrize("ffn", [EXPERT_CHOICE, MOMA], ids=["moe_8x", "moma"])
def test_causal_routing_without_auxiliary_routers_is_refused(ffn):
    model, batch = Transformer(model_config(ffn), VOCAB, Layout(), seed=1), make_batch([20])
    assert not model.can_route_causally
    with pytest.raises(UserError, match="layer 0 has no auxiliary router"):
        model(batch.tokens_T, batch.info.causally())


def test_token_choice_is_causal_as_it_is():
    model, batch = build(TOP_K), make_batch([20, 9])
    assert model.can_route_causally and model.causal_routing
    plain, causal = (model(batch.tokens_T, info).logits_TV for info in (batch.info, batch.info.causally()))
    assert torch.equal(plain, causal)
