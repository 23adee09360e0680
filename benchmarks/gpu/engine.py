"""Optimizer steps under ZeRO 1, 2 and 3 in float32 and bfloat16, and a non-finite step."""

from __future__ import annotations

import torch

from gpu.check import Check, right_if
from gpu.steps import Steps

RECIPE = "moma_quickstart"
# With Adam's usual eps of 1e-8, a gradient that is only rounding error moves its weight by a whole step.
SMALL = [
    "deepspeed.optimizer.params.eps=1e-3",
    "parallel.expert=1",
    "train.micro_batch_groups=2",
    "data.sequence_length=128",
]


def run(check: Check) -> None:
    losses: list[list[float]] = []
    for bf16 in (False, True):
        for stage in (1, 2, 3):
            what = f"ZeRO-{stage}, {'bf16' if bf16 else 'fp32'}"
            check.attempt(what, lambda stage=stage, bf16=bf16: trained(check, stage, bf16, losses))
    check.attempt("a step that is not finite changes nothing", lambda: skipped(check))


def trained(check: Check, stage: int, bf16: bool, seen: list[list[float]]) -> tuple[str, dict]:
    """Take six steps on one batch. The loss must fall, and equal that of the first stage that ran (bf16: three steps,
    to 1 %).
    """
    precision = f"deepspeed.bf16={{enabled: {str(bf16).lower()}}}"
    overrides = [f"deepspeed.zero_optimization.stage={stage}", precision, *SMALL]
    overrides += ["train.global_batch_groups=4", "model.recompute=true"]
    steps = Steps.build(check, RECIPE, overrides, vocabulary=512)
    found = [steps.take(lr=1e-2) for _ in range(6)]
    means = [result.loss_sums["loss"] / result.counts["loss"] for result in found]
    seen.append(means)
    bound, compared = (1e-2, 3) if bf16 else (1e-4, 6)  # later steps differ because rounding changes the routing
    alike = all(abs(a / b - 1) < bound for a, b in zip(means[:compared], seen[0]))
    norms = [round(result.grad_norm, 4) for result in found[:2]]
    good = alike and means[-1] < means[0] - 0.02
    return right_if(good), {"losses": [round(mean, 4) for mean in means], "norms": norms}


def skipped(check: Check) -> tuple[str, dict]:
    overrides = ["deepspeed.bf16={enabled: true}", "train.non_finite=skip", "train.global_batch_groups=2", *SMALL]
    steps = Steps.build(check, RECIPE, overrides, vocabulary=512)
    module = steps.engine.module
    before = [parameter.detach().clone() for parameter in module.parameters()]
    hook = module.output.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    result = steps.take(lr=1e-2)
    hook.remove()
    same = all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    after = steps.take(lr=1e-2)
    moved = not all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    numbers = {"skipped": result.skipped, "unchanged": same, "next_step_taken": moved and not after.skipped}
    return right_if(all(numbers.values())), numbers
