"""Comparison of a run resumed from a checkpoint with the uninterrupted run, bit for bit."""

from __future__ import annotations

from gpu.check import Check, right_if
from gpu.steps import Steps
from moe_dist.checkpoint import checkpoint
from moe_dist.training.determinism import make_deterministic

OVERRIDES = [
    "deepspeed.bf16={enabled: true}",
    "parallel.expert=1",
    "train.global_batch_groups=4",
    "train.micro_batch_groups=2",
    "data.sequence_length=256",
]


def run(check: Check) -> None:
    check.attempt("resume, as it is", lambda: resumed(check, deterministic=False))
    check.attempt("resume, train.deterministic", lambda: resumed(check, deterministic=True))


def resumed(check: Check, deterministic: bool) -> tuple[str, dict]:
    """Take three steps, save, take three more, and take the same three in another engine that loaded the checkpoint."""
    if deterministic:
        make_deterministic()
    steps = Steps.build(check, "moma_quickstart", OVERRIDES, vocabulary=512)
    for _ in range(3):
        steps.take(lr=1e-3)
    path = check.scratch / f"resume_{deterministic}"
    checkpoint.save(path, steps.engine, check.layout, state={})
    for _ in range(3):
        steps.take(lr=1e-3)
    other = Steps.build(check, "moma_quickstart", OVERRIDES, vocabulary=512)
    other.take(lr=0.1)  # move it away from its initialisation
    checkpoint.load(path, other.engine, check.layout)
    for _ in range(3):
        other.take(lr=1e-3)
    pairs = zip(steps.engine.module.parameters(), other.engine.module.parameters(), strict=True)
    worst = max(float((a.detach().float() - b.detach().float()).abs().max()) for a, b in pairs)
    numbers = {"largest_difference": f"{worst:.1e}"}
    if deterministic or check.small:
        return right_if(worst == 0), numbers
    return ("bit for bit" if worst == 0 else "not bit for bit (atomic additions)"), numbers
