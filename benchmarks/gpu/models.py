"""Whole models of every kind, forward and backward with their losses, against float64 on the CPU.

On CUDA any host sync except the one read per layer raises an error (torch.cuda.set_sync_debug_mode).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpu.check import Check, relative, right_if, short
from moe_dist.config.losses import loss_settings
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.model.moe.dispatch import split_sizes
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.support.devices import readers
from tests.support.model_batches import DENSE, EXPERT_CHOICE, LORA_EXPERTS, MOMA, TOP_K, VOCAB, make_batch, model_config


def routed(**router: Any) -> dict:
    return {"type": "moe", "hidden_size": 48, "router": router}


LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.1}
MODELS = {
    "dense": (DENSE, {}),
    "top_k": (TOP_K, {}),
    "moe_8x": (EXPERT_CHOICE, {}),
    "moma": (MOMA, {}),
    "null": (routed(type="null_experts", num_experts=4, num_null_experts=4, top_k=3), {}),
    "padded": (routed(type="top_k", num_experts=4, top_k=2, capacity_factor=0.8, pad_to_capacity=True), {}),
    "sliced": (MOMA | {"slices": 2}, {}),
    "recomputed": (MOMA, {"recompute": True}),
    "depth": (MOMA, {"depth": {}}),
    "lora": ({**LORA_EXPERTS, "experts": {"type": "lora", **LORA}}, {"lora": LORA}),
    "llama": (TOP_K, {"norm": "pre", "qk_norm": False, "num_query_groups": 2, "tie_embeddings": True}),
}
LOSSES = {"load_balance": {"weight": 0.01, "scope": "global"}, "router_z": {"weight": 0.01}}
BATCH = make_batch([40, 24, 30, 26], padding=8, num_groups=2)


def run(check: Check) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for name in ("moma", "lora") if check.small else MODELS:
            # float64 and float32 compare uncompiled operations, bfloat16 the compiled functions that a run executes.
            with torch.compiler.set_stance("default" if dtype == torch.bfloat16 else "force_eager"):
                check.attempt(f"{name}, {str(dtype)[6:]}", lambda name=name, dtype=dtype: whole(check, name, dtype))


def whole(check: Check, name: str, dtype: torch.dtype) -> tuple[str, dict]:
    ffn, changes = MODELS[name]
    config = model_config(ffn, **{"hidden_size": 64} | changes)
    terms = LOSSES if ffn["type"] == "moe" else {}
    reference = Transformer(config, VOCAB, Layout(), 0).double()
    wanted, loss = step(reference, BATCH, Layout(), terms)
    model = Transformer(config, VOCAB, Layout(), 0).to(check.device, dtype)
    batch = BATCH.to(check.device)
    step(model, batch, check.layout, terms)  # handles and communicators
    model.zero_grad()
    check.poison()
    check.sync()
    with no_synchronisation(check, model) as reads:
        got, found = step(model, batch, check.layout, terms)
    same = same_routing(got, wanted)
    theirs = dict(reference.named_parameters())
    pairs = [(p.grad, theirs[n].grad) for n, p in model.named_parameters() if p.requires_grad]
    finite = all(bool(gradient.isfinite().all()) for gradient, _ in pairs)
    flat = [torch.cat([t.detach().double().cpu().flatten() for t in side]) for side in zip(*pairs)]
    errors = [abs(float(found) / float(loss) - 1), relative(flat[0], flat[1])]
    good = finite and within(dtype, errors, same)
    return right_if(good), {"errors": short(errors), "same_routing": same, "reads": len(reads)}


def within(dtype: torch.dtype, errors: list[float], same_routing: bool) -> bool:
    """Return whether errors of loss and gradients are rounding. If rounding reversed a near-tie, gradients may differ.

    Rotary angles are float32 in float64 models too, so those agree to 1e-7.
    """
    if dtype == torch.float64:
        return same_routing and max(errors) < 1e-6
    if dtype == torch.float32:
        return errors[0] < 1e-4 and (not same_routing or errors[1] < 1e-3)
    return errors[0] < 2e-2


def step(model: Transformer, batch: Any, layout: Layout, terms: dict) -> tuple[Any, torch.Tensor]:
    objective = make_objective(loss_settings(terms), Context(layout=layout, group_sequences=1), 0)
    counts = dict(zip(objective.names, objective.counts(BATCH)))
    output = model(batch.tokens_T, batch.info)
    loss = objective(output, batch, counts).loss
    loss.backward()
    return output, loss


def same_routing(got: Any, wanted: Any) -> bool:
    return all(
        torch.equal(a.chosen_VC.cpu(), b.chosen_VC)
        for mine, theirs in zip(got.records, wanted.records)
        for a, b in zip(mine.routings, theirs.routings)
    )


@contextmanager
def no_synchronisation(check: Check, model: Transformer) -> Iterator[list[int]]:
    """Make every host sync an error, except the reads of split sizes. Each read appends an item to the list."""
    reads: list[int] = []
    mode: Callable[[str], None] = (lambda _: None) if check.small else torch.cuda.set_sync_debug_mode

    def read(tensor: torch.Tensor) -> list:
        reads.append(1)
        mode("default")
        try:
            return split_sizes(tensor)
        finally:
            mode("error")

    for reader in readers(model):
        reader.split_sizes = read
    mode("error")
    try:
        yield reads
    finally:
        mode("default")
