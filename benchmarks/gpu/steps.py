"""Engines of recipes, and seeded micro-batches for them, for the parts that take optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpu.check import Check
from gpu.findings import ROOT
from moe_dist.config.recipe import Config, load_config
from moe_dist.core.batch import Batch, TokenInfo
from moe_dist.core.expert_rows import set_expert_ids
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.metrics.step_counts import StepCounts
from moe_dist.model.transformer import Transformer
from moe_dist.training.deepspeed import make_engine
from moe_dist.training.engine import Engine, StepResult


@dataclass(frozen=True)
class Steps:
    """An engine with one rank's micro-batches of a step."""

    engine: Engine
    config: Config
    layout: Any
    batches: list[Batch]

    @classmethod
    def build(
        cls, check: Check, recipe: str, overrides: list[str], *, vocabulary: int, on_device: bool = False
    ) -> Steps:
        """Build them. on_device: draw the weights on the device, unseeded, for parts that only measure time."""
        config = load_config(ROOT / "configs" / f"{recipe}.yaml", [f"run.dir={check.scratch / 'none'}", *overrides])
        device = torch.device("meta" if on_device else "cpu")
        with device:
            model = Transformer(config.model, vocabulary, check.layout, config.seed)
        if on_device:
            fill(model.to_empty(device=check.device))
        engine = make_engine(model, config, check.layout)
        batches = [make_batch(config, vocabulary, number) for number in range(engine.accumulation)]
        if not check.small:
            batches = [batch.pinned() for batch in batches]  # as the loader's are
        return cls(engine, config, check.layout, batches)

    def take(self, lr: float = 1e-4) -> StepResult:
        context = Context(layout=self.layout, group_sequences=self.config.data.group_sequences)
        return self.engine.train_step(
            self.batches,
            make_objective({}, context, 0),
            lr,
            lambda batch, output: StepCounts.of(batch, output, self.layout),
        )


def fill(model: Transformer) -> None:
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            _ = parameter.data.normal_(std=0.02) if parameter.dim() > 1 else parameter.data.fill_(1.0)
            if hasattr(module, "expert_ids"):
                set_expert_ids(parameter, module.expert_ids)


def make_batch(config: Config, vocabulary: int, number: int) -> Batch:
    """Return documents of at most 2,048 tokens; the first half of each is text, the second half image."""
    sequences = config.train.micro_batch_groups * config.data.group_sequences
    tokens, document = sequences * config.data.sequence_length, min(2048, config.data.sequence_length)
    position_T = torch.arange(tokens) % document
    modality_T = (position_T >= document // 2).long()
    generator = torch.Generator().manual_seed(number)
    tokens_T = torch.randint(vocabulary // 2, (tokens,), generator=generator) + modality_T * (vocabulary // 2)
    info = TokenInfo.build(
        modality_T=modality_T,
        valid_T=torch.ones(tokens, dtype=torch.bool),
        position_T=position_T,
        token_id_T=torch.arange(tokens) + number * tokens,
        document_lengths=[document] * (tokens // document),
        num_groups=config.train.micro_batch_groups,
        num_sequences=sequences,
    )
    return Batch(
        tokens_T=tokens_T,
        targets_T=tokens_T.roll(-1),
        loss_mask_T=position_T < document - 1,
        target_modality_T=modality_T.roll(-1),
        info=info,
    )
