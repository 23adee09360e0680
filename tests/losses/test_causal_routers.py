"""The loss of auxiliary routers against loops over tokens and columns, and what its gradient reaches."""

import math
from types import SimpleNamespace

import pytest

from moe_dist.config.losses import CausalRoutersSettings, loss_settings
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.losses.causal_routers import CausalRouters
from moe_dist.losses.term import Context
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.model.test_causal import DEPTH, with_auxiliary
from tests.support.model_batches import EXPERT_CHOICE, MOMA, TOP_K, VOCAB, make_batch, model_config

CONTEXT = Context(layout=Layout(), group_sequences=1)


def term():
    return CausalRouters(validate(CausalRoutersSettings, {"weight": 1.0}, "test"), CONTEXT)


def cross_entropy(part):
    """Of one router: summed over its tokens, each a mean over the columns."""
    total = 0.0
    for logits, chosen in zip(part.auxiliary_VC.tolist(), part.chosen_VC.tolist()):
        probs = [1 / (1 + math.exp(-z)) for z in logits]
        total -= sum(math.log(p if hit else 1 - p) for p, hit in zip(probs, chosen)) / len(logits)
    return total


@pytest.mark.parametrize("ffn", [EXPERT_CHOICE, MOMA], ids=["moe_8x", "moma"])
@pytest.mark.parametrize("depth", [None, DEPTH], ids=["plain", "depth"])
def test_the_loss_equals_the_loops_and_reaches_auxiliary_routers_alone(ffn, depth):
    model = Transformer(model_config(with_auxiliary(ffn), depth=depth), VOCAB, Layout(), seed=1).double()
    batch = make_batch([20, 9], padding=6)
    output = model(batch.tokens_T, batch.info)
    (loss,) = term()(output, batch)
    parts = [part for record in output.records for part in record.routings] + [d.routing for d in output.depths]
    layers = 3 + (2 if depth else 0)
    assert loss.item() == pytest.approx(sum(map(cross_entropy, parts)) / layers, rel=1e-9)
    assert term().counts(batch) == (29,)

    loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if ".auxiliary." in name}
    assert len(reached) == 2 * (3 * len(output.records[0].routings) + (2 if depth else 0))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.any(), name


def test_layers_without_such_a_router_do_not_thin_the_mean():
    model = Transformer(model_config(TOP_K, depth=DEPTH), VOCAB, Layout(), seed=1).double()
    batch = make_batch([20, 9])
    output = model(batch.tokens_T, batch.info)
    (loss,) = term()(output, batch)
    assert len(output.records) == 3
    assert loss.item() == pytest.approx(sum(cross_entropy(d.routing) for d in output.depths) / 2, rel=1e-9)


def test_it_is_a_term_like_others_and_says_when_there_is_nothing_to_train():
    assert loss_settings({"causal_routers": {"weight": 2.0}})["causal_routers"].weight_at(0) == 2.0
    model, batch = Transformer(model_config(MOMA), VOCAB, Layout(), seed=1), make_batch([9])
    with pytest.raises(UserError, match="causal_routers: the model has no auxiliary router"):
        term()(model(batch.tokens_T, batch.info), batch)
    with pytest.raises(UserError, match="no auxiliary router"):
        term()(SimpleNamespace(records=(), depths=()), batch)
