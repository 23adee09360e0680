"""The neighbours whose routing each sample should imitate, and their weights.

The weight W_ij of neighbour j for sample i is taken from RoMA: Routing Manifold Alignment, 2025.

  W_ij = sim(i, j) / (sum of sim(i, l) over l in N(i))   with   sim(i, j) = exp(-d(i, j)^2 / (2 sigma^2))

The set N(i) is chosen from a pool: the success set (the samples that the model answers correctly) or all samples. The
setting `kind` decides which samples of the pool are in N(i): the k nearest, all with sim(i, j) >= epsilon, k random
samples, or all. Sample i and the samples with the same question are never in N(i). The weights always follow the
equation.

The distance d(i, j) is ||E_i - E_j||, or 1 - cos(E_i, E_j) as in the authors' released code. E_i is the embedding of
sample i's question, a unit vector.

Shape suffixes: N samples, C samples in the pool, B samples in a block, E embedding size, K neighbours, R routing values
of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config.losses import NeighbourSettings
from moe_dist.core.errors import UserError
from moe_dist.core.seeding import fold_key, uniform
from moe_dist.data.stream.neighbour_store import AverageNeighbours, Neighbours, Samples

BLOCK = 1 << 25  # distances in memory at once, of at most BLOCK_SAMPLES samples
BLOCK_SAMPLES = 4096
SPARE = 16  # additional candidates whose exact distances are computed, because the matrix product rounds


def find_neighbours(
    embedding_NE: Tensor, questions: Sequence[str], samples: Samples, settings: NeighbourSettings
) -> tuple[Neighbours | AverageNeighbours, float]:
    """Find the neighbours of every sample and their weights. Returns the neighbours and the value of sigma.

    For the kinds `nearest` and `random`, the result lists each sample's neighbours and their weights. For `ball` and
    `all`, a sample can have many neighbours. The result then holds only the weighted mean and variance of
    their routing.

    Raises UserError if the pool is empty, if a sample has fewer than k possible neighbours, or if no sample has any
    neighbour.
    """
    pool = _Pool.of(embedding_NE, questions, samples, settings)
    if settings.kind == "nearest":
        nearest = pool.nearest(settings.k)
        sigma = settings.sigma or _median_distance(nearest.squared_NK)
        return nearest.weighted(sigma), sigma
    sigma = settings.sigma or _median_distance(pool.nearest(settings.k).squared_NK)
    if settings.kind == "random":
        return pool.random(settings.k, settings.seed).weighted(sigma), sigma
    averages = pool.averages(samples.routing_NR, sigma, settings.epsilon or 0.0)
    if not averages.weight_N.any():
        raise UserError(
            f"no sample has a neighbour with a similarity of at least epsilon={settings.epsilon} (sigma {sigma:.3g}): "
            "choose a smaller epsilon or a larger sigma"
        )
    return averages, sigma


@dataclass(frozen=True, slots=True)
class _Found:
    """The neighbours of every sample, and the squared distances to them."""

    neighbour_NK: Tensor
    squared_NK: Tensor

    def weighted(self, sigma: float) -> Neighbours:
        return Neighbours(neighbour_NK=self.neighbour_NK, weight_NK=_weights(self.squared_NK, sigma))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """The samples that can be chosen as neighbours of other samples."""

    embedding_NE: Tensor
    question_N: Tensor  # a number for each sample; samples with the same question have the same number
    candidate_C: Tensor  # indices of the samples in the pool
    distance: str  # as in NeighbourSettings

    @classmethod
    def of(cls, embedding_NE: Tensor, questions: Sequence[str], samples: Samples, settings: NeighbourSettings) -> _Pool:
        """Select the pool. Raises UserError if it is empty."""
        numbers: dict[str, int] = {}
        question_N = torch.tensor([numbers.setdefault(question, len(numbers)) for question in questions])
        is_in_N = torch.ones_like(samples.right_N) if settings.pool == "all" else samples.right_N
        if not is_in_N.any():
            raise UserError(f"the success set is empty: none of {len(questions)} samples was answered correctly")
        return cls(
            embedding_NE=embedding_NE,
            question_N=question_N,
            candidate_C=is_in_N.nonzero().squeeze(1),
            distance=settings.distance,
        )

    def nearest(self, k: int) -> _Found:
        """Find the k nearest neighbours of every sample. Raises UserError if a sample has fewer possible neighbours."""
        return self._smallest(k, SPARE, ((block_B, rough_BC, rough_BC) for block_B, rough_BC in self._blocks()))

    def random(self, k: int, seed: int) -> _Found:
        """Draw k random neighbours for every sample. Raises UserError if a sample has fewer possible neighbours."""
        key = fold_key(seed, "neighbours")
        draws = (
            (block_B, uniform(key, block_B[:, None], self.candidate_C), rough_BC)
            for block_B, rough_BC in self._blocks()
        )
        return self._smallest(k, 0, draws)

    def averages(self, routing_NR: Tensor, sigma: float, epsilon: float) -> AverageNeighbours:
        """Average, for each sample, the routing of all neighbours whose similarity is at least epsilon."""
        routing_CR = routing_NR[self.candidate_C].double()
        means, spreads, exists = [], [], []
        for _, rough_BC in self._blocks():
            squared_BC = self._of_euclidean(rough_BC)
            is_near_BC = (-squared_BC / (2 * sigma**2)).exp() >= epsilon
            squared_BC = squared_BC.where(is_near_BC, torch.inf)
            weight_BC = _weights(squared_BC, sigma).double()
            means.append(weight_BC @ routing_CR)
            spreads.append((weight_BC @ routing_CR.square() - means[-1].square()).clamp(min=0))
            exists.append(squared_BC.isfinite().any(dim=1))
        return AverageNeighbours(
            mean_NR=torch.cat(means).float(), spread_NR=torch.cat(spreads).float(), weight_N=torch.cat(exists).float()
        )

    def _smallest(self, k: int, spare: int, blocks: Iterator[tuple[Tensor, Tensor, Tensor]]) -> _Found:
        """Select k neighbours for every sample. Raises UserError if a sample has fewer possible neighbours.

        The k + spare candidates with the smallest keys are selected first. The k nearest of them are returned.
        blocks: for each block, its samples, their keys and their rough squared distances to all candidates. A candidate
        is excluded if its rough distance is infinite.
        """
        neighbours, squared = [], []
        for block_B, key_BC, rough_BC in blocks:
            is_excluded_BC = rough_BC.isinf()
            least = len(self.candidate_C) - int(is_excluded_BC.sum(dim=1).max())
            if least < k:
                raise UserError(
                    f"a sample has only {least} possible neighbours, fewer than k={k}: the pool has "
                    f"{len(self.candidate_C)} samples, without the sample itself and those with the same question"
                )
            key_BC = key_BC.masked_fill(is_excluded_BC, torch.inf)
            index_BK = key_BC.topk(min(k + spare, len(self.candidate_C)), dim=1, largest=False).indices
            squared_BK = self._squared(block_B, index_BK).masked_fill(is_excluded_BC.gather(1, index_BK), torch.inf)
            squared_BK, order_BK = squared_BK.sort(dim=1, stable=True)
            neighbours.append(self.candidate_C[index_BK.gather(1, order_BK[:, :k])])
            squared.append(squared_BK[:, :k])
        return _Found(torch.cat(neighbours), torch.cat(squared))

    def _squared(self, block_B: Tensor, index_BK: Tensor) -> Tensor:
        """Return d^2 between each sample of a block and its K candidates. For equal embeddings, d^2 is exactly 0."""
        between_BKE = self.embedding_NE[block_B, None] - self.embedding_NE[self.candidate_C[index_BK]]
        return self._of_euclidean(between_BKE.square().sum(dim=-1))

    def _of_euclidean(self, squared: Tensor) -> Tensor:
        """Convert ||a - b||^2 of unit vectors to d^2. For the cosine distance, d = 1 - cos(a, b) = ||a - b||^2 / 2."""
        return (squared / 2).square() if self.distance == "cosine" else squared

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the samples i of each block, and ||E_i - E_j||^2 for all candidates j.

        These values are computed by a matrix product, so they have rounding errors. If a sample and a candidate have
        the same question, the value is infinite.
        """
        candidate_CE = self.embedding_NE[self.candidate_C]
        samples = max(min(BLOCK // len(self.candidate_C), BLOCK_SAMPLES), 1)
        for block_B in torch.arange(len(self.question_N)).split(samples):
            rough_BC = (2 - 2 * self.embedding_NE[block_B] @ candidate_CE.T).clamp(min=0)
            is_same_BC = self.question_N[block_B, None] == self.question_N[self.candidate_C]
            yield block_B, rough_BC.masked_fill(is_same_BC, torch.inf)


def _median_distance(squared_NK: Tensor) -> float:
    """Return the median distance. If it is 0, return 1, because sigma must be positive."""
    return float(squared_NK.median().sqrt()) or 1.0


def _weights(squared_BC: Tensor, sigma: float) -> Tensor:
    """Return the weights W_ij. If all distances in a row are infinite, its weights are 0.

    The weights are computed by a softmax, because it does not underflow if all neighbours are far away.
    """
    return (-squared_BC / (2 * sigma**2)).softmax(dim=1).nan_to_num(0.0)
