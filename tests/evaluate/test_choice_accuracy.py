"""Option scoring, accuracies and comparisons, checked on items answered by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from moe_dist.core.errors import UserError
from moe_dist.data.tasks.choice_items import Choice
from moe_dist.evaluate.choice_accuracy import Comparison, Result, answer
from moe_dist.losses.manifold import sample_routing
from moe_dist.parallel.layout import Layout, make_layout
from tests.losses.test_balance import make_batch
from tests.support.distributed import run_ranks
from tests.support.moe_cases import TOKENS, WIDTH, make_layer

OPTIONS = (11, 3, 7, 5)
VOCABULARY = 20
CHOICES = {40: Choice(OPTIONS, 0), 13: Choice(OPTIONS, 1), 26: Choice(OPTIONS, 3), 101: Choice(OPTIONS, 2)}


@dataclass
class Output:
    logits_TV: Tensor
    records: tuple = ()


def items(end, sample, *, domain=0):
    """Build a micro-batch whose prompts end at these tokens."""
    batch = make_batch(torch.ones(TOKENS, dtype=torch.bool))
    sidecar = {
        "prompt_end_S": torch.tensor(end, dtype=torch.int64),
        "sample_S": torch.tensor(sample, dtype=torch.int64),
        "domain_T": torch.full((TOKENS,), domain),
    }
    return replace(batch, sidecar=sidecar)


def forward(batch):
    """Prefer the option (sample mod 4); a token that is not an option is more likely than all options."""
    logits_TV = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(3)).clamp(-2, 2)
    ends, samples = (batch.sidecar.get(key, torch.zeros(0)).tolist() for key in ("prompt_end_S", "sample_S"))
    for end, sample in zip(ends, samples):
        logits_TV[end, OPTIONS[sample % 4]] = 5.0
        logits_TV[end, 0] = 9.0
    return Output(logits_TV)


BATCHES = [
    items([4, 9, 20], [40, 13, 26]),  # answers 0, 1, 2: the third is wrong
    items([], []),
    items([7, 23], [101, 13], domain=1),  # answers 1: wrong; 13 occurs twice and counts once
]


def test_the_likeliest_option_is_the_answer():
    answers = answer(forward, BATCHES, CHOICES, Layout())
    assert answers.sample_N.tolist() == [13, 26, 40, 101]
    assert answers.correct_N.tolist() == [1, 3, 0, 2]
    assert answers.right_N.tolist() == [True, False, True, False]
    assert answers.domain_N.tolist() == [0, 0, 0, 1] and answers.routing_NR.shape == (4, 0)
    logits_V = forward(BATCHES[0]).logits_TV[9]
    expected = [(logits_V[o].exp() / logits_V.exp().sum()).log().item() for o in OPTIONS]
    assert answers.log_probs_NO[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_samples_that_are_no_items_are_left_out():
    """data/tasks/choice_items.py leaves out the items whose prompt and options merge."""
    fewer = {sample: choice for sample, choice in CHOICES.items() if sample not in (13, 101)}
    answers = answer(forward, BATCHES, fewer, Layout())
    whole = answer(forward, BATCHES, CHOICES, Layout())
    assert answers.sample_N.tolist() == [26, 40] == whole.sample_N[1:3].tolist()
    assert torch.equal(answers.log_probs_NO, whole.log_probs_NO[1:3])
    with pytest.raises(UserError, match="no instruction samples"):
        answer(forward, BATCHES, {}, Layout())


def test_routing_is_that_of_the_last_prompt_token():
    layers = [make_layer("top_1").float(), make_layer("null").float()]
    x_TD = torch.randn(TOKENS, WIDTH)

    def routed(batch):
        records = tuple(layer(x_TD, batch.info)[1] for layer in layers)
        return Output(forward(batch).logits_TV, records)

    answers = answer(routed, BATCHES[:1], CHOICES, Layout())
    expected = sample_routing(routed(BATCHES[0]).records, torch.tensor([9, 20, 4]), TOKENS)
    assert answers.routing_NR.shape == (3, 8 + 16) and torch.equal(answers.routing_NR, expected)


def answer_on(rank):
    layout = make_layout(expert=1, device=torch.device("cpu"))
    mine = [BATCHES[0], BATCHES[1]] if rank == 0 else [BATCHES[2], BATCHES[1]]
    return answer(forward, mine, CHOICES, layout)


def test_every_rank_gets_all_answers():
    alone = answer(forward, BATCHES, CHOICES, Layout())
    for answers in run_ranks(answer_on, 2):
        assert torch.equal(answers.sample_N, alone.sample_N) and torch.equal(answers.log_probs_NO, alone.log_probs_NO)


def test_options_that_begin_alike_are_never_right():
    """The correct options of 26 and 40 share their first token with the answer; in 13 only wrong options share one."""
    alike = CHOICES | {26: Choice((11, 3, 7, 7), 3), 13: Choice((5, 3, 7, 7), 1), 40: Choice((11, 11, 7, 5), 0)}
    assert answer(forward, BATCHES[:1], alike, Layout()).right_N.tolist() == [True, False, False]


def test_a_split_without_instructions_is_said():
    for batch in (BATCHES[1], replace(BATCHES[1], sidecar={})):
        with pytest.raises(UserError, match="the split holds no instruction samples"):
            answer(forward, [batch], CHOICES, Layout())


def test_results_by_task_and_overall_survive_json():
    result = Result.of(answer(forward, BATCHES, CHOICES, Layout()), ["antonym", "synonym"])
    assert result.right == {"antonym": {13: True, 26: False, 40: True}, "synonym": {101: False}}
    data = result.to_json()
    assert Result.from_json(data) == result
    assert list(data["accuracy"]) == ["antonym", "synonym", "overall"]
    overall = data["accuracy"]["overall"]
    assert (overall["right"], overall["items"], overall["share"]) == (2, 4, 0.5)
    assert overall["interval_95"] == pytest.approx((0.1500, 0.8500), abs=1e-4)


def test_a_comparison_counts_the_items_that_differ():
    first = {1: True, 2: True, 3: False, 4: False, 5: True}
    second = {1: True, 2: False, 3: True, 4: True, 5: True}
    comparison = Comparison.of(first, second)
    assert (comparison.gained, comparison.lost, comparison.difference) == (2, 1, 0.2)
    assert comparison.to_json()["mcnemar_p"] == 1.0
    low, high = comparison.to_json()["interval_95"]
    assert low < 0.2 < high
    with pytest.raises(UserError, match="one answered 5, the other 1, 1 in common"):
        Comparison.of(first, {1: True})
