"""The dense feed-forward part, which LoRA experts share as their base.

Shape suffixes: T tokens, D model width, F feed-forward width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.core.batch import TokenInfo
from moe_dist.core.fused import fused
from moe_dist.core.seeding import seeded_normal_


class SwiGLU(nn.Module):
    """y = (silu(x W_gate) * (x W_up)) W_down, without biases (Shazeer, arXiv 2002.05202, eq. 6)."""

    def __init__(self, hidden_size: int, ffn_size: int, *, seed: int, name: str, init_std: float, output_std: float):
        """`name` is the global prefix of the parameters."""
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * ffn_size, bias=False)
        self.down = nn.Linear(ffn_size, hidden_size, bias=False)
        seeded_normal_(self.gate_up.weight, seed=seed, name=f"{name}.gate_up.weight", std=init_std)
        seeded_normal_(self.down.weight, seed=seed, name=f"{name}.down.weight", std=output_std)

    def forward(self, x_TD: Tensor, info: TokenInfo) -> tuple[Tensor, None]:
        """y_TD, and no routing record: the same call as MoELayer's. Every token is treated alike."""
        return self.down(gated(self.gate_up(x_TD))), None


@fused
def gated(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up of the two halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
