"""The neighbours of every kind, their weights and the term on them, against the paper's equations in loops; and the
real embedder.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moe_dist.alignment.embedder import embed
from moe_dist.alignment.nearest_neighbours import find_neighbours
from moe_dist.config.losses import NeighbourSettings
from moe_dist.convert.packaged import prepare_minilm
from moe_dist.core.errors import UserError
from moe_dist.data.stream.neighbour_store import AverageNeighbours, Neighbours, Samples
from tests.losses.test_balance import Output, make_batch
from tests.losses.test_manifold import make_term
from tests.support.moe_cases import TOKENS, WIDTH, make_layer

COUNT, COLUMNS = 40, 8
KINDS = {
    "nearest": {},
    "one, narrow": {"k": 1, "sigma": 0.2},
    "five, own sigma": {"k": 5, "sigma": 0.5},
    "far away": {"sigma": 0.01},
    "nearest of all": {"pool": "all"},
    "nearest by cosine": {"distance": "cosine", "k": 5, "sigma": 0.4},
    "nearest by cosine, median sigma": {"distance": "cosine"},
    "ball": {"kind": "ball", "epsilon": 0.5},
    "small ball": {"kind": "ball", "epsilon": 0.8},
    "ball by cosine": {"kind": "ball", "epsilon": 0.7, "distance": "cosine", "sigma": 0.5},
    "random": {"kind": "random", "k": 4},
    "random of all": {"kind": "random", "pool": "all", "seed": 3},
    "all successful": {"kind": "all"},
    "all": {"kind": "all", "pool": "all", "sigma": 0.7},
}


def random_samples(seed=0):
    """Return embeddings, questions, of which two are asked twice, and samples with two layers of routing values."""
    generator = torch.Generator().manual_seed(seed)
    embedding = F.normalize(torch.randn(COUNT, 6, generator=generator, dtype=torch.float64), dim=1)
    questions = [f"question {n}" for n in range(COUNT)]
    for one, other in ((3, 4), (3, 20), (7, 30)):
        nearby = embedding[one] + 1e-3 * embedding[other]  # not equal, or ties would decide
        embedding[other], questions[other] = F.normalize(nearby, dim=0), questions[one]
    right = torch.rand(COUNT, generator=generator) < 0.4
    right[[3, 4, 20]] = True
    routing = torch.randn(COUNT, 2, COLUMNS, generator=generator).softmax(2).flatten(1)
    return embedding, questions, Samples(sample_N=torch.arange(COUNT), right_N=right, routing_NR=routing)


def distance(embedding, i, j, settings):
    a, b = embedding[i].tolist(), embedding[j].tolist()
    if settings.distance == "cosine":
        return 1 - sum(x * y for x, y in zip(a, b))
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)))


def naive(embedding, questions, samples, settings, drawn):
    """Return each sample's neighbours and their weights as a dict, in loops. drawn: the random neighbours."""
    apart = {}
    for i in range(COUNT):
        pool = [j for j in range(COUNT) if settings.pool == "all" or samples.right_N[j]]
        apart[i] = {j: distance(embedding, i, j, settings) for j in pool if questions[j] != questions[i]}
    nearest = {i: sorted(apart[i], key=apart[i].get)[: settings.k] for i in apart}
    all_nearest = sorted(apart[i][j] for i in apart for j in nearest[i])
    sigma = settings.sigma or all_nearest[(len(all_nearest) - 1) // 2]
    found = {}
    for i in apart:
        exponent = {j: -(apart[i][j] ** 2) / (2 * sigma**2) for j in apart[i]}
        chosen = {
            "nearest": nearest[i],
            "ball": [j for j in exponent if math.exp(exponent[j]) >= (settings.epsilon or 0)],
            "random": drawn and drawn[i],
            "all": list(exponent),
        }[settings.kind]
        top = max((exponent[j] for j in chosen), default=0)  # the ratio is that of the exponentials
        total = sum(math.exp(exponent[j] - top) for j in chosen)
        found[i] = {j: math.exp(exponent[j] - top) / total for j in chosen}
    return found, sigma


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_neighbours_weights_and_the_term_equal_the_equations(monkeypatch, case):
    """Both the loss and its gradients at the routers of the last of two layers."""
    monkeypatch.setattr("moe_dist.alignment.nearest_neighbours.BLOCK", 120)
    settings = NeighbourSettings(**case)
    embedding, questions, samples = random_samples()
    found, sigma = find_neighbours(embedding, questions, samples, settings)
    drawn = found.neighbour_NK.tolist() if settings.kind == "random" else None
    expected, expected_sigma = naive(embedding, questions, samples, settings, drawn)
    assert sigma == pytest.approx(expected_sigma, rel=1e-6)
    if isinstance(found, Neighbours):
        for i, (neighbours, weights) in enumerate(zip(found.neighbour_NK.tolist(), found.weight_NK.tolist())):
            assert neighbours == list(expected[i]), f"sample {i}"
            assert weights == pytest.approx(list(expected[i].values()), abs=1e-9), f"sample {i}"
    assert found.covered == sum(bool(of_one) for of_one in expected.values()) > 2

    batch, row_S = make_batch(), torch.tensor([3, 11, 20, 30, 39])
    token_S = batch.info.valid_T.nonzero().squeeze(1)[[2, 3, 7, 10, 13]]
    batch = replace(batch, sidecar={"prompt_end_S": token_S, **found.joined(row_S, samples)})
    layer, term = make_layer("top_2_sigmoid"), make_term(last_layers=1)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    total, covered = term(Output((layer(x_TD, batch.info)[1],)), batch)
    (gradient,) = torch.autograd.grad(total, layer.router.gate.weight)

    gate = layer.router.gate.weight.detach().clone().requires_grad_()
    naive_total = torch.zeros((), dtype=torch.float64)
    for token, i in zip(token_S.tolist(), row_S.tolist()):
        mine = (gate @ x_TD[token]).exp()
        for j, weight in expected[i].items():
            theirs = samples.routing_NR[j, -COLUMNS:].double()
            naive_total = naive_total + weight * ((mine / mine.sum() - theirs) ** 2).sum()
    naive_total.backward()
    assert covered.item() == sum(bool(expected[i]) for i in row_S.tolist())
    torch.testing.assert_close(total, naive_total, rtol=1e-6, atol=0)  # means are stored in float32
    torch.testing.assert_close(gradient, gate.grad, rtol=1e-5, atol=1e-7)
    assert gate.grad.abs().max() > 1e-3


def test_random_neighbours_are_distinct_and_depend_on_the_seed_alone(monkeypatch):
    embedding, questions, samples = random_samples()
    drawn = [find_neighbours(embedding, questions, samples, NeighbourSettings(kind="random", seed=s)) for s in (0, 1)]
    rows = [found.neighbour_NK for found, _ in drawn]
    assert not torch.equal(*rows) and all(len(set(row)) == 3 for row in rows[0].tolist())
    assert samples.right_N[rows[0]].all(), "a neighbour outside the success set"
    monkeypatch.setattr("moe_dist.alignment.nearest_neighbours.BLOCK", 120)
    again, _ = find_neighbours(embedding, questions, samples, NeighbourSettings(kind="random"))
    assert torch.equal(again.neighbour_NK, rows[0])


def test_a_ball_may_be_empty_for_some_samples_but_not_for_all():
    embedding, questions, samples = random_samples()
    settings = NeighbourSettings(kind="ball", epsilon=0.8)
    found, _ = find_neighbours(embedding, questions, samples, settings)
    assert isinstance(found, AverageNeighbours) and 0 < found.covered < COUNT
    alone = found.weight_N == 0
    assert not found.mean_NR[alone].any() and not found.spread_NR[alone].any()
    narrow = settings.model_copy(update={"sigma": 1e-3})
    with pytest.raises(UserError, match=r"no sample has a neighbour with a similarity of at least epsilon=0\.8"):
        find_neighbours(embedding, questions, samples, narrow)


def test_equal_embeddings_share_their_weight():
    samples = Samples(sample_N=torch.arange(4), right_N=torch.ones(4, dtype=torch.bool), routing_NR=torch.rand(4, 2))
    embedding = F.normalize(torch.ones(4, 3), dim=1)
    found, sigma = find_neighbours(embedding, list("abcd"), samples, NeighbourSettings())
    assert sigma == 1.0 and torch.allclose(found.weight_NK, torch.full((4, 3), 1 / 3))
    assert all(i not in row for i, row in enumerate(found.neighbour_NK.tolist())), "a sample is its own neighbour"
    with pytest.raises(UserError, match=r"a sample has only 2 possible neighbours, fewer than k=3: the pool has 4 sam"):
        find_neighbours(embedding, list("aacd"), samples, NeighbourSettings())


def test_an_empty_success_set_and_too_few_neighbours_are_errors():
    embedding, questions, samples = random_samples()
    nothing = replace(samples, right_N=torch.zeros(COUNT, dtype=torch.bool))
    with pytest.raises(UserError, match="the success set is empty: none of 40 samples was answered correctly"):
        find_neighbours(embedding, questions, nothing, NeighbourSettings())
    assert find_neighbours(embedding, questions, nothing, NeighbourSettings(pool="all"))[0].covered == COUNT
    one = replace(samples, right_N=torch.arange(COUNT) == 1)
    with pytest.raises(UserError, match=r"a sample has only 0 possible neighbours, fewer than k=1: the pool has 1 sam"):
        find_neighbours(embedding, questions, one, NeighbourSettings(k=1))


@pytest.mark.slow
def test_the_embedder_puts_like_questions_together(tmp_path):
    """The real all-MiniLM-L6-v2, from PyPI. Order and batching do not matter."""
    assert prepare_minilm(tmp_path / "minilm") and not prepare_minilm(tmp_path / "minilm")
    texts = ["a young dog", "What is the income tax law?", "a puppy", "The law on taxes of income"]
    rows = embed(texts, tmp_path / "minilm")
    similarity = rows @ rows.T
    assert rows.dtype == torch.float32 and torch.allclose(rows.norm(dim=1), torch.ones(4))
    assert similarity[0, 2] > 0.6 and similarity[1, 3] > 0.6 and similarity[0, 1] < 0.3
    assert torch.allclose(embed(texts[2:3], tmp_path / "minilm")[0], rows[2], atol=1e-5), "padding changes an embedding"


def test_a_folder_without_an_embedder_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no sentence-embedding model"):
        embed(["a text"], tmp_path)
