"""A small model on two gloo ranks with its experts spread, against the same model in one process."""

import pytest
import torch

from moe_dist.losses.language import language_loss
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from tests.support.distributed import run_ranks
from tests.support.model_batches import DENSE, EXPERT_CHOICE, MOMA, TOP_K, VOCAB, make_batch, model_config

LENGTHS = [[20, 9, 3], [31, 17]]  # a group each rank, of unlike documents


def losses_and_gradients(model, batches):
    """Return the summed loss of batches, and gradients by name; those of experts by (name, global expert)."""
    loss = sum(language_loss(model(batch.tokens_T, batch.info).logits_TV, batch).total for batch in batches)
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        rows = getattr(parameter, "expert_ids", None)
        if rows is None:
            gradients[name] = parameter.grad
        else:
            gradients |= {(name, expert): row for expert, row in zip(rows, parameter.grad)}
    return loss.detach(), gradients


def rank_batch(rank, only_padding=False):
    """Make a rank's batch. only_padding: rank 1 has no valid token, so mixture-of-depths admits none there."""
    if only_padding and rank == 1:
        return make_batch([], padding=40, first_token_id=1000)
    return make_batch(LENGTHS[rank], seed=rank, first_token_id=1000 * rank, padding=5 * rank)


def on_rank(rank, ffn, changes, only_padding=False):
    layout = make_layout(expert=2, device=torch.device("cpu"))
    model = Transformer(model_config(ffn, **changes), VOCAB, layout, seed=1).double()
    return losses_and_gradients(model, [rank_batch(rank, only_padding)])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ffn", [DENSE, TOP_K, EXPERT_CHOICE, MOMA], ids=["dense", "top_k", "moe_8x", "moma"])
def test_two_expert_parallel_ranks_equal_one_process_in_float64(ffn, recompute):
    equals_one_process(ffn, {"recompute": recompute})


@pytest.mark.parametrize("only_padding", [False, True])
@pytest.mark.parametrize("ffn", [DENSE, MOMA], ids=["dense", "moma"])
def test_so_do_layers_with_mixture_of_depths(ffn, only_padding):
    equals_one_process(ffn, {"recompute": True, "depth": {"scope": "modality"}}, only_padding)


def equals_one_process(ffn, changes, only_padding=False):
    """Compare with one process. Shared gradients are summed over ranks; an expert's gradient is whole on its owner."""
    model = Transformer(model_config(ffn, **changes | {"recompute": False}), VOCAB, Layout(), seed=1).double()
    loss, expected = losses_and_gradients(model, [rank_batch(rank, only_padding) for rank in range(2)])
    (loss_0, ours_0), (loss_1, ours_1) = run_ranks(on_rank, 2, ffn, changes, only_padding)
    torch.testing.assert_close(loss_0 + loss_1, loss, rtol=1e-10, atol=0)
    owners = [{key for key in ours if isinstance(key, tuple)} for ours in (ours_0, ours_1)]
    assert not owners[0] & owners[1] and len(owners[0]) == len(owners[1])
    for key, gradient in expected.items():
        ours = ours_0[key] + ours_1[key] if key in ours_0 and key in ours_1 else (ours_0 | ours_1)[key]
        torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")
