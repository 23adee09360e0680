"""Find the settings that give one machine the kernels of other processors. python benchmarks/kernels.py

Computes the operations of a training step (products, attention, softmax, norms, optimizers) under each setting of `make
test-processors` and some others, each in a fresh process. Reports which results differ in their bits from the plain
setting. numpy draws the inputs, so no setting changes them. Writes benchmarks/results/<date>-kernels.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from runs import write_result

SETTINGS = {
    "ATEN_CPU_CAPABILITY=avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "ONEDNN_MAX_CPU_ISA=AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL_ENABLE_INSTRUCTIONS=AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL_CBWR=AVX2": {"MKL_CBWR": "AVX2"},
    "MKL_CBWR=COMPATIBLE": {"MKL_CBWR": "COMPATIBLE"},
    "ATEN_CPU_CAPABILITY=default": {"ATEN_CPU_CAPABILITY": "default"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}


def results() -> dict[str, Tensor]:
    """Compute each operation at the sizes of the tests or of the quickstart."""
    numbers = np.random.default_rng(0)

    def draw(*shape: int) -> Tensor:
        return torch.from_numpy(numbers.standard_normal(shape).astype(np.float32))

    x, wide, q = draw(1536, 32), draw(1024, 128), draw(1, 4, 128, 8)
    found = {
        "product, 32 wide": F.linear(x, draw(32, 32)),
        "product, 128 wide": F.linear(wide, draw(256, 128)),
        "product in bf16": F.linear(wide.bfloat16(), draw(256, 128).bfloat16()),
        "gradient of a weight": x.t() @ draw(1536, 32),
        "grouped product": F.grouped_mm(draw(96, 32), draw(4, 32, 64), offs=torch.tensor([24, 48, 72, 96]).int()),
        "attention": F.scaled_dot_product_attention(q, q, q, is_causal=True),
        "softmax": x.softmax(1),
        "log_softmax over a vocabulary": draw(64, 1500).log_softmax(1),
        "sigmoid": x.sigmoid(),
        "silu": F.silu(x),
        "RMS norm": F.rms_norm(x, (32,)),
        "sum over tokens": x.sum(0),
        "norm of a gradient": wide.norm(),
    }
    for name, kind in (("AdamW step", torch.optim.AdamW), ("SGD step", torch.optim.SGD)):
        parameter = torch.nn.Parameter(draw(1000))
        settings = {"fused": True} if name.startswith("Adam") else {"momentum": 0.9}
        optimizer = kind([parameter], lr=0.01, **settings)
        for _ in range(2):
            parameter.grad = draw(1000)
            optimizer.step()
        found[name] = parameter.detach()
    return found


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def under(variables: dict[str, str]) -> dict[str, str]:
    """Return the digests of all results, computed under a setting in a fresh process."""
    own = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run([sys.executable, __file__, "--child"], env=own, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    if "--child" in sys.argv:
        print(json.dumps({name: digest(tensor) for name, tensor in results().items()}))
        return
    plain = under({})
    assert plain == under({}), "the plain setting gives different bits in a second process"
    rows = []
    for name, variables in SETTINGS.items():
        found = under(variables)
        differ = [operation for operation in plain if found[operation] != plain[operation]]
        rows.append(f"| `{name}` | {len(differ)} of {len(plain)} | {', '.join(differ) or 'nothing'} |")
    note = f"torch {torch.__version__}. Results whose bits differ from those of the plain setting on one thread."
    write_result("kernels", "Kernels of other processors", note, "| setting | differ | which |", rows)


if __name__ == "__main__":
    main()
