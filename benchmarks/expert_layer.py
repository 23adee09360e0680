"""Measure the speed of the whole expert layer as a fraction of the speed of plain batched matrix products.

Times forward + backward of MoELayer (router, dispatch, grouped SwiGLU experts, combine) on one process, in turns with
the same matrix products as one bmm over equal groups. Prints a Markdown table: bmm time / layer time, median over the
turns (1.00: routing costs nothing). On CPU it counts processor time, which other load on the machine disturbs little;
with one thread it equals the wall time of an idle machine. Run: `OMP_NUM_THREADS=1 python benchmarks/expert_layer.py
[turns]`.

Shape suffixes: T tokens, D model width, E experts, F expert width, C rows per expert.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from moe_dist.config.model_section import MoEFFN
from moe_dist.core.batch import TokenInfo
from moe_dist.model.moe.moe_layer import build_moe_layer
from moe_dist.model.site import Site
from moe_dist.parallel.layout import Layout

TOKENS, WIDTH = 2048, 512
CASES = {  # name: (expert width, router, rows per token)
    "8 wide experts, top-2": (1376, {"type": "top_k", "num_experts": 8, "top_k": 2}, 2),
    "64 narrow experts, top-8": (176, {"type": "top_k", "num_experts": 64, "top_k": 8}, 8),
    "8 wide experts, expert choice": (1376, {"type": "expert_choice", "num_experts": 8}, 1),
    "4 + 4 wide experts, MoMa": (
        1376,
        {
            "type": "modality",
            "text": {"type": "expert_choice", "num_experts": 4},
            "image": {"type": "expert_choice", "num_experts": 4},
        },
        1,
    ),
}


def layer_step(expert_width: int, router: dict, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    ffn = MoEFFN(type="moe", hidden_size=expert_width, router=router)
    site = Site(hidden_size=WIDTH, layer=0, seed=0, init_std=0.02, name="layers.0.ffn")
    layer = build_moe_layer(ffn, site, Layout(device=device)).to(device, dtype)
    info = TokenInfo.build(
        modality_T=torch.arange(TOKENS) % 2,
        valid_T=torch.ones(TOKENS, dtype=torch.bool),
        position_T=torch.arange(TOKENS),
        token_id_T=torch.arange(TOKENS),
        document_lengths=[TOKENS],
        num_groups=1,
    ).to(device)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=dtype, device=device, requires_grad=True)
    return lambda: layer(x_TD, info)[0].sum().backward()


def bmm_step(
    expert_width: int, num_experts: int, rows: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    shapes = ((num_experts, WIDTH, 2 * expert_width), (num_experts, expert_width, WIDTH))
    gate_up, down = (
        torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02).requires_grad_() for shape in shapes
    )
    x_ECD = torch.randn(num_experts, rows // num_experts, WIDTH, dtype=dtype, device=device, requires_grad=True)

    def step() -> None:
        gate, up = (x_ECD @ gate_up).chunk(2, dim=2)
        ((F.silu(gate) * up) @ down).sum().backward()

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads, {turns} turns\n")
    print("| layer | dtype | bmm, ms | layer, ms | bmm / layer |\n|-|-|-|-|-|")
    for name, (expert_width, router, copies) in CASES.items():
        for dtype in dtypes:
            experts = router.get("num_experts", 8)
            steps = (
                bmm_step(expert_width, experts, TOKENS * copies, dtype, device),
                layer_step(expert_width, router, dtype, device),
            )
            for step in steps:
                seconds(step, device)
            pairs = [[seconds(step, device) for step in steps] for _ in range(turns)]
            bmm, layer = (1000 * statistics.median(column) for column in zip(*pairs))
            ratio = statistics.median(first / second for first, second in pairs)
            print(
                f"| {name} | {str(dtype).removeprefix('torch.')} | {bmm:.1f} | {layer:.1f} | {ratio:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
