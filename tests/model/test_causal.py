"""Causal inference with auxiliary routers: the outputs that a later token changes, and those that it does not."""

import copy

import pytest
import torch

from moe_dist.core.errors import UserError
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.support.model_batches import DENSE, EXPERT_CHOICE, MOMA, TOP_K, VOCAB, make_batch, model_config

CHANGED = 30  # of the 40 tokens


def with_auxiliary(ffn):
    """Return the same feed-forward settings with an auxiliary router for every expert-choice router."""
    ffn = copy.deepcopy(ffn)
    router = ffn.get("router", {})
    for one in (router, router.get("text", {}), router.get("image", {})):
        if one.get("type") == "expert_choice":
            one["auxiliary"] = True
    return ffn


def build(ffn, **changes) -> Transformer:
    return Transformer(model_config(with_auxiliary(ffn), **changes), VOCAB, Layout(), seed=1).double()


def moved(model, *, causal: bool, by: int = 1):
    """Replace one token. Return the logits that change, bool [T], and the output before the change."""
    batch = make_batch([40], seed=4)
    info = batch.info.causally() if causal else batch.info
    changed_T = batch.tokens_T.clone()
    changed_T[CHANGED] = (changed_T[CHANGED] + by) % VOCAB
    with torch.no_grad():
        before, after = (model(tokens_T, info) for tokens_T in (batch.tokens_T, changed_T))
    # To 1e-12, not to the bit: another number of rows in an expert's product may round differently.
    return (before.logits_TV - after.logits_TV).abs().amax(dim=1) > 1e-12, before


DEPTH = {"capacity": 0.25, "auxiliary": True}
MODELS = {
    "moe_8x": (EXPERT_CHOICE, {}),
    "moma": (MOMA, {}),
    "mod_dense": (DENSE, {"depth": DEPTH}),
    "mod_moma": (MOMA, {"depth": DEPTH | {"scope": "modality"}}),
}


@pytest.mark.parametrize(("ffn", "changes"), MODELS.values(), ids=MODELS)
def test_a_later_token_moves_no_earlier_logit_with_causal_routers_and_does_with_those_of_training(ffn, changes):
    model = build(ffn, **changes)
    assert model.can_route_causally and not model.causal_routing
    for by in (1, 2, 3):
        moved_T, output = moved(model, causal=True, by=by)
        assert not moved_T[:CHANGED].any() and moved_T[CHANGED]
    for record in output.records:  # a decision of its own for each token: neither all nor nothing
        assert 0 < record.load_E.sum() < sum(part.kept_VE.numel() for part in record.routings)
    for depth in output.depths:
        assert 0 < sum(depth.document_lengths) < 40
    assert any(moved(model, causal=False, by=by)[0][:CHANGED].any() for by in range(1, 10))


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
