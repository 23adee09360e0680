"""Experts' products, attention, and the integers of routing: each alone, against the CPU.

Shape suffixes: R rows, D and F widths, e experts, T tokens, H heads, d size per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu.check import Check, relative, right_if, short
from moe_dist.core.batch import TokenInfo
from moe_dist.core.seeding import dropout, logistic
from moe_dist.model.attention import BucketedDocuments, locate_documents
from moe_dist.model.moe import experts
from moe_dist.model.moe.capacity import keep_within_capacity
from moe_dist.model.moe.router import selection_keys
from tests.support.fused_cases import CASES, ROWS, deviations, tolerance

COUNTS = {
    "even": (64,) * 4,
    "uneven": (1, 200, 7, 3),
    "one empty": (5, 0, 64, 59),
    "first empty": (0, 9, 64, 2),
    "last empty": (33, 1, 2, 0),
    "one used": (0, 0, 77, 0),
    "no rows": (0, 0, 0, 0),
    "no rows, one expert": (0,),
}
LENGTHS = [5, 130, 0, 64, 1, 300]  # documents
HEADS = ((8, 8, 64), (8, 2, 128))  # heads, query groups, size per head


def run(check: Check) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for name, counts in COUNTS.items():
            what = f"experts' products, {str(dtype)[6:]}, {name}"
            check.attempt(what, lambda counts=counts, dtype=dtype: grouped(check, counts, dtype))
    for heads, groups, size in HEADS:
        for dtype in (torch.bfloat16, torch.float32):
            what = f"attention, {str(dtype)[6:]}, {heads} heads in {groups} groups of {size}"
            check.attempt(what, lambda s=(heads, groups, size), dtype=dtype: attention(check, *s, dtype))
    check.attempt("attention, bfloat16, no token", lambda: attention(check, *HEADS[0], torch.bfloat16, lengths=[0, 0]))
    for dtype in (torch.bfloat16, torch.float32):
        for name in CASES:
            what = f"fused function, {str(dtype)[6:]}, {name}"
            check.attempt(what, lambda name=name, dtype=dtype: fused(check, name, dtype))
    check.attempt("integers of routing", lambda: integers(check))


def grouped(check: Check, counts: tuple[int, ...], dtype: torch.dtype) -> tuple[str, dict]:
    """Compare forward and backward with float64. The weights of experts without rows must get zero gradients."""
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    x_RD, w_eDF, g_RF = draw(sum(counts), 128), draw(len(counts), 128, 192) / 128**0.5, draw(sum(counts), 192)
    exact = [t.double().requires_grad_() for t in (x_RD, w_eDF)]
    y_RF = torch.cat([x @ w for x, w in zip(exact[0].split(list(counts)), exact[1].unbind())])
    wanted = torch.autograd.grad(y_RF, exact, g_RF.double())
    inputs = [t.to(check.device).requires_grad_() for t in (x_RD, w_eDF)]
    check.poison()
    y = experts.matmul_by_expert(*inputs, counts)
    got = torch.autograd.grad(y, inputs, g_RF.to(check.device))
    errors = [relative(a, b) for a, b in zip((y, *got), (y_RF, *wanted), strict=True)]
    empty = [number for number, count in enumerate(counts) if not count]
    clean = not got[1][empty].any()
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    return right_if(max(errors) < bound and bool(clean)), {"errors": short(errors), "empty_zero": bool(clean)}


def fused(check: Check, name: str, dtype: torch.dtype) -> tuple[str, dict]:
    """Compare a function, compiled on a GPU for one size and then for any, and its gradients
    with float64 operations.
    """
    torch.manual_seed(0)
    function, make = CASES[name]
    several = [rows for rows in ROWS if rows > 1]
    errors = [max(deviations(function, function, make(rows, dtype), check.device)) for rows in several]
    return right_if(max(errors) <= tolerance(name, dtype, check.device)), {"errors": short(errors)}


def attention(
    check: Check, heads: int, groups: int, size: int, dtype: torch.dtype, lengths: list[int] = LENGTHS
) -> tuple[str, dict]:
    """Compare attention over packed documents, with queries, keys and values strided as megatron passes them."""
    generator = torch.Generator().manual_seed(2)
    per_group = heads // groups
    mixed = torch.randn(sum(lengths), groups, (per_group + 2) * size, generator=generator).to(dtype)
    weight_THd = torch.randn(sum(lengths), heads, size, generator=generator, dtype=torch.float64)

    def run(documents, mixed: Tensor) -> tuple[Tensor, Tensor]:
        mixed = mixed.detach().requires_grad_()
        q, k, v = mixed.split([per_group * size, size, size], dim=2)
        y = documents.attend(q.reshape(len(mixed), heads, size), k, v)
        (gradient,) = torch.autograd.grad((y.double() * weight_THd.to(y.device)).sum(), mixed)
        return y, gradient

    wanted = run(BucketedDocuments.build(lengths, torch.device("cpu")), mixed.double())
    check.poison()
    documents = locate_documents(lengths, device=check.device, dtype=dtype)
    got = run(documents, mixed.to(check.device))
    errors = [relative(a, b) for a, b in zip(got, wanted, strict=True)]
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
    return right_if(max(errors) < bound), {"by": type(documents).__name__, "errors": short(errors)}


def integers(check: Check) -> tuple[str, dict]:
    """Check that selection keys, selected tokens, capacity, noise and dropout equal the CPU's bit for bit (noise to
    1e-12).
    """
    device, generator = check.device, torch.Generator().manual_seed(3)
    logits, ids = torch.randn(20000, 8, generator=generator), torch.arange(20000) * 7919
    info = TokenInfo.build(
        modality_T=ids % 2, valid_T=ids >= 0, position_T=ids, token_id_T=ids, document_lengths=[20000], num_groups=1
    )
    keys = selection_keys(logits, info, -5)
    same = {"keys": torch.equal(selection_keys(logits.to(device), info.to(device), -5).cpu(), keys)}
    top, there = (k.t().topk(2500, dim=1, sorted=False).indices.sort().values for k in (keys, keys.to(device)))
    same["topk"] = torch.equal(top, there.cpu())
    chosen = torch.rand(20000, 8, generator=generator) < 0.3
    kept = [keep_within_capacity(chosen.to(d), keys.to(d), [12000, 8000], [900, 500]).cpu() for d in ("cpu", device)]
    same["capacity"] = torch.equal(*kept)
    wanted = chosen[:, 0].nonzero()
    same["static"] = torch.equal(torch.nonzero_static(chosen[:, 0].to(device), size=len(wanted)).cpu(), wanted)
    noise = [logistic(9, ids[:, None].to(d), torch.arange(8, device=d)).cpu() for d in ("cpu", device)]
    same["noise"] = torch.allclose(*noise, rtol=1e-12, atol=0)
    x = torch.randn(500, 50, generator=generator)
    drops = [dropout(x.to(d), ids[:500].to(d), key=4, rate=0.1).cpu() for d in ("cpu", device)]
    same["dropout"] = torch.equal(*(d != 0 for d in drops))
    return right_if(all(same.values())), same
