"""Reading documents in steps with a cache gives the same logits at every position as reading them at once."""

import pytest
import torch

from moe_dist.core.batch import Batch, TokenInfo
from moe_dist.model.kv_cache import KVCache
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from tests.support.distributed import run_ranks
from tests.support.model_batches import DENSE, LLAMA, TOP_K, VOCAB, make_batch, model_config

NULL = {
    "type": "moe",
    "hidden_size": 48,
    "router": {"type": "null_experts", "num_experts": 4, "num_null_experts": 4, "top_k": 3},
}
BY_MODALITY = {
    "type": "moe",
    "hidden_size": 48,
    "router": {
        "type": "modality",
        "text": {"type": "top_k", "num_experts": 2, "top_k": 1},
        "image": {"type": "top_k", "num_experts": 2, "top_k": 2},
    },
}
CAUSAL_MOMA = {
    "type": "moe",
    "hidden_size": 48,
    "router": {
        "type": "modality",
        "text": {"type": "expert_choice", "num_experts": 4, "auxiliary": True},
        "image": {"type": "expert_choice", "num_experts": 4, "auxiliary": True},
    },
}
WINDOWS = {"sliding_window": 4, "layers": {"1": {"sliding_window": 0}}, "qk_norm": "rms_norm", "attention_bias": "all"}
DEPTH = {"depth": {"capacity": 0.5, "every": 2, "auxiliary": True}}  # of three layers, the first and the last
# For each step, how many tokens of each document are read: prompts of unlike lengths, then some go on and some wait.
STEPS = [(7, 1, 0, 4), (1, 0, 3, 1), (0, 0, 1, 1), (1, 0, 9, 0), (1, 1, 1, 1), (2, 0, 0, 0)]
LENGTHS = [sum(of_document) for of_document in zip(*STEPS)]


def part(batch: Batch, indices: list[int], lengths: list[int]) -> tuple[torch.Tensor, TokenInfo]:
    info, chosen = batch.info, torch.tensor(indices)
    taken = TokenInfo.build(
        modality_T=info.modality_T[chosen],
        valid_T=info.valid_T[chosen],
        position_T=info.position_T[chosen],
        token_id_T=info.token_id_T[chosen],
        document_lengths=lengths,
        num_groups=1,
    )
    return batch.tokens_T[chosen], taken.causally()


@torch.no_grad()
def read_in_steps(model: Transformer, batch: Batch, steps: list[tuple[int, ...]]) -> torch.Tensor:
    """Return the logits of every token of the batch. If no document continues, a padding token is read."""
    lengths = batch.info.document_lengths
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    read = [0] * len(lengths)
    cache = KVCache(
        model.config,
        sequences=len(lengths),
        capacity=max(lengths),
        device=torch.device("cpu"),
        dtype=model.embedding.weight.dtype,
    )
    logits_TV = torch.full((len(batch.tokens_T), VOCAB), torch.nan, dtype=model.embedding.weight.dtype)
    for counts in steps:
        # The documents come in another order than their sequences lie in the cache.
        going = [number for number in reversed(range(len(lengths))) if counts[number]]
        indices = [starts[n] + read[n] + i for n in going for i in range(counts[n])]
        if going:
            tokens_T, info = part(batch, indices, [counts[n] for n in going])
            logits_TV[indices] = model(tokens_T, info, cache.go_on(going)).logits_TV
        else:
            padding = make_batch([], padding=1)
            model(padding.tokens_T, padding.info.causally(), cache.go_on([cache.padding]))
        read = [before + count for before, count in zip(read, counts)]
    assert read == list(lengths)
    return logits_TV


def compare(model: Transformer, batch: Batch, steps: list[tuple[int, ...]], tolerance: float) -> None:
    with torch.no_grad():
        whole = model(batch.tokens_T, batch.info.causally())
    whole_TV = whole.logits_TV
    assert whole_TV.std() > 0.3
    for depth in whole.depths:
        assert 0.2 < depth.routing.kept_VE.double().mean() < 0.8, "the auxiliary routers let pass by all or none"
    torch.testing.assert_close(read_in_steps(model, batch, steps), whole_TV, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("ffn", "changes"),
    [
        (DENSE, {}),
        (DENSE, LLAMA),
        (TOP_K, WINDOWS),
        (TOP_K, {}),
        (NULL, {}),
        (BY_MODALITY, {"norm": "pre"}),
        (CAUSAL_MOMA, {}),
        (DENSE, DEPTH),
        (CAUSAL_MOMA, DEPTH),
    ],
    ids=["dense", "llama", "windows", "top_k", "null", "by_modality", "moma", "depth", "moma-depth"],
)
def test_bit_by_bit_equals_at_once(ffn, changes, dtype, tolerance):
    model = Transformer(model_config(ffn, **changes), VOCAB, Layout(), seed=1).to(dtype)
    compare(model, make_batch(LENGTHS), STEPS, tolerance)


def test_a_token_read_twice_or_in_another_place_shows():
    """The comparison can fail: positions and the cache's content both matter."""
    model = Transformer(model_config(), VOCAB, Layout(), seed=1).double()
    batch = make_batch(LENGTHS)
    whole_TV = model(batch.tokens_T, batch.info).logits_TV
    cache = KVCache(model.config, sequences=1, capacity=9, device=torch.device("cpu"), dtype=torch.float64)
    first = part(batch, [0, 1, 2], [3])
    model(*first, cache.go_on([0]))
    model(*part(batch, [2], [1]), cache.go_on([0]))
    again_TV = model(*part(batch, [3], [1]), cache.go_on([0])).logits_TV
    assert (again_TV - whole_TV[3]).abs().max() > 1e-3


def on_rank(rank: int, ffn: dict, changes: dict) -> None:
    """Rank 1 has one document, which ends after the second step; other ranks still need its experts."""
    layout = make_layout(expert=2, device=torch.device("cpu"))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model = Transformer(model_config(ffn, **changes), VOCAB, layout, seed=1).to(dtype)
        steps = STEPS if rank == 0 else [(7,), (4,), *[(0,)] * (len(STEPS) - 2)]
        batch = make_batch(LENGTHS if rank == 0 else [11], seed=rank, first_token_id=1000 * rank)
        compare(model, batch, steps, tolerance)


@pytest.mark.parametrize(
    ("ffn", "changes"),
    [(TOP_K, {}), (NULL, {}), (BY_MODALITY, {}), (CAUSAL_MOMA, {}), (CAUSAL_MOMA, DEPTH)],
    ids=["top_k", "null", "by_modality", "moma", "moma-depth"],
)
def test_on_two_expert_parallel_ranks(ffn, changes):
    run_ranks(on_rank, 2, ffn, changes)
