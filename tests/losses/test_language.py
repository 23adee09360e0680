"""Cross-entropy sums and the objective, against plain loops."""

from dataclasses import dataclass, replace

import pytest
import torch

from moe_dist.losses import language
from moe_dist.losses.language import LanguageLoss, language_loss
from moe_dist.losses.objective import WeightedTerms
from tests.support.model_batches import VOCAB, make_batch


@dataclass
class Output:
    logits_TV: torch.Tensor
    records: tuple = ()


def naive(logits_TV, batch):
    sums, counts = [0.0, 0.0], [0, 0]
    for t in range(len(logits_TV)):
        if batch.loss_mask_T[t]:
            probs = logits_TV[t].double().exp() / logits_TV[t].double().exp().sum()
            sums[batch.target_modality_T[t]] -= probs[batch.targets_T[t]].log().item()
            counts[batch.target_modality_T[t]] += 1
    return sums, counts


def test_sums_by_modality_equal_a_plain_loop_and_padding_counts_nothing():
    batch = make_batch([9, 1, 20], padding=6)
    batch.targets_T[~batch.loss_mask_T] = VOCAB + 7  # never looked at
    torch.manual_seed(0)
    logits = torch.randn(36, VOCAB, dtype=torch.float64, requires_grad=True)
    terms = language_loss(logits, batch)
    sums, counts = naive(logits, batch)
    assert terms.by_modality_M.tolist() == pytest.approx(sums, rel=1e-12)
    assert terms.counts_M.tolist() == counts and sum(counts) == 9 + 20 - 2
    assert terms.total.item() == pytest.approx(sum(sums), rel=1e-12)
    assert not terms.by_modality_M.requires_grad
    terms.total.backward()
    assert not logits.grad[~batch.loss_mask_T].any() and logits.grad[batch.loss_mask_T].any(dim=1).all()


def test_bf16_logits_are_summed_in_float32_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(language, "_CHUNK", 7 * VOCAB)
    batch = make_batch([30, 22], padding=3)
    torch.manual_seed(0)
    logits = torch.randn(55, VOCAB).bfloat16().requires_grad_()
    exact = logits.detach().float().requires_grad_()
    ours, theirs = language_loss(logits, batch), language_loss(exact, batch)
    assert ours.total.dtype == torch.float32
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-6, atol=0)
    ours.total.backward()
    theirs.total.backward()
    torch.testing.assert_close(logits.grad, exact.grad.bfloat16(), rtol=1e-2, atol=1e-5)


LANGUAGE = {"language": (1.0, LanguageLoss())}


def test_a_batch_without_predictions_has_loss_zero_and_zero_gradients():
    batch = make_batch([12])
    batch = replace(batch, loss_mask_T=torch.zeros(12, dtype=torch.bool))
    logits = torch.randn(12, VOCAB, requires_grad=True)
    result = WeightedTerms(LANGUAGE)(Output(logits), batch, {"loss": 0})
    result.loss.backward()
    assert result.loss == 0 and not logits.grad.any()


class Squares:
    names = ("loss/squares",)

    def counts(self, batch):
        return (7,)

    def __call__(self, output, batch):
        return (output.logits_TV.pow(2).sum(),)


def test_objective_weighs_its_terms_divides_each_by_its_own_count_and_reports_sums():
    batch = make_batch([15, 9])
    logits = torch.randn(24, VOCAB, requires_grad=True)
    terms = language_loss(logits, batch)
    plain = WeightedTerms(LANGUAGE)
    assert plain.counts(batch) == (22, *terms.counts_M.tolist())
    result = plain(Output(logits), batch, {"loss": 100})
    assert list(result.sums) == ["loss", "loss/text", "loss/image"]
    torch.testing.assert_close(result.loss, terms.total / 100)
    both = WeightedTerms(LANGUAGE | {"squares": (0.5, Squares())})
    counts = dict(zip(both.names, both.counts(batch)))
    assert counts["loss/squares"] == 7
    result = both(Output(logits), batch, counts)
    torch.testing.assert_close(result.loss, terms.total / 22 + 0.5 * logits.pow(2).sum() / 7)
    assert set(result.sums) == {"loss", "loss/text", "loss/image", "loss/squares"}
    assert not any(value.requires_grad for value in result.sums.values())
