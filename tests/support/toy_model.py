"""A small language model around one real expert layer, for tests without attention; and batches for any model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.model_section import MoEFFN
from moe_dist.config.recipe import Config
from moe_dist.core.batch import MODALITIES, Batch, TokenInfo
from moe_dist.core.step import ModelOutput, ObjectiveOutput
from moe_dist.core.strict import validate
from moe_dist.model.moe.moe_layer import build_moe_layer
from moe_dist.model.site import Site
from moe_dist.parallel.layout import Layout

VOCABULARY, WIDTH, EXPERTS = 50, 16, 4  # ids from 40 on are image codes
TOKENS = 96  # tokens of one selection group
INIT_STD = 0.3  # large, because with 0.02 the experts of so narrow a model would hardly matter
TOP_K = {"type": "top_k", "num_experts": EXPERTS, "top_k": 2}
MOMA = {
    "type": "modality",
    "text": {"type": "expert_choice", "num_experts": 2},
    "image": {"type": "expert_choice", "num_experts": 2},
}


class ToyModel(nn.Module):
    def __init__(self, router: dict, layout: Layout, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        ffn = MoEFFN(type="moe", hidden_size=16, router=router)
        site = Site(hidden_size=WIDTH, layer=0, seed=seed, init_std=INIT_STD, name="layers.0.ffn")
        self.ffn = build_moe_layer(ffn, site, layout)
        self.output = nn.Linear(WIDTH, VOCABULARY)
        for parameter in (self.embedding.weight, self.output.weight):
            nn.init.normal_(parameter, std=INIT_STD, generator=generator)
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens_T: Tensor, info: TokenInfo) -> ModelOutput:
        x_TD = self.embedding(tokens_T)
        y_TD, record = self.ffn(self.norm(x_TD), info)
        return ModelOutput(self.output(x_TD + y_TD), (record,))


class CrossEntropy:
    """The mean cross-entropy over the predictions that count."""

    names = ("loss", *(f"loss/{name}" for name in MODALITIES))

    def counts(self, batch: Batch) -> tuple[int, ...]:
        counted_T = batch.target_modality_T[batch.loss_mask_T]
        return len(counted_T), *(int((counted_T == index).sum()) for index in range(len(MODALITIES)))

    def __call__(self, output: ModelOutput, batch: Batch, counts: Mapping[str, int]) -> ObjectiveOutput:
        loss_T = F.cross_entropy(output.logits_TV.float(), batch.targets_T, reduction="none") * batch.loss_mask_T
        sums = {"loss": loss_T.sum()}
        for index, name in enumerate(MODALITIES):
            sums[f"loss/{name}"] = loss_T[batch.target_modality_T == index].sum()
        return ObjectiveOutput(sums["loss"] / counts["loss"], sums)


objective = CrossEntropy()
SUM = {"loss": 1}  # used as counts, this gives the sum instead of the mean


def loss_count(batch: Batch) -> int:
    """Return the number of predictions that count."""
    return int(batch.loss_mask_T.sum())


def make_group(index: int, *, tokens: int = TOKENS, vocabulary: int = VOCABULARY, first_image: int = 40) -> dict:
    """Return the tensors of selection group `index` of a run: two documents, one with an image that begins after a
    quarter of it.

    Groups differ strongly in the number of predictions that count and in the length of the image. Every fourth group
    has no image.
    """
    generator = torch.Generator().manual_seed(1000 + index)
    tokens_T = torch.randint(
        0, first_image // 4, (tokens,), generator=generator
    )  # few words, so that there is something to learn
    image_tokens = tokens * (2, 1, 3, 0)[index % 4] // 8
    image_T = (torch.arange(tokens) >= tokens // 4) & (torch.arange(tokens) < tokens // 4 + image_tokens)
    codes_T = torch.randint(first_image, vocabulary, (tokens,), generator=generator)
    tokens_T = torch.where(image_T, codes_T, tokens_T)
    half = tokens // 2
    targets_T = torch.cat([tokens_T[:half].roll(-1), tokens_T[half:].roll(-1)])
    valid_T = torch.arange(tokens) < (tokens if index % 3 else tokens - 5)
    share = (0.95, 0.05, 0.8, 0.2)[index % 4]
    mask_T = (torch.rand(tokens, generator=generator) < share) & valid_T
    mask_T[0] = True
    return {
        "tokens": tokens_T,
        "targets": targets_T,
        "mask": mask_T,
        "valid": valid_T,
        "ids": index * tokens + torch.arange(tokens),
        "position": torch.arange(half).repeat(2),
        "modality": (tokens_T >= first_image).long(),
        "target_modality": (targets_T >= first_image).long(),
    }


def make_batch(indices: list[int], **sizes: int) -> Batch:
    groups = [make_group(index, **sizes) for index in indices]
    cat = {name: torch.cat([group[name] for group in groups]) for name in groups[0]}
    half = groups[0]["tokens"].numel() // 2
    info = TokenInfo.build(
        modality_T=cat["modality"],
        valid_T=cat["valid"],
        position_T=cat["position"],
        token_id_T=cat["ids"],
        document_lengths=[half] * (2 * len(indices)),
        num_groups=len(indices),
        num_sequences=2 * len(indices),
    )
    return Batch(
        tokens_T=cat["tokens"],
        targets_T=cat["targets"],
        loss_mask_T=cat["mask"],
        target_modality_T=cat["target_modality"],
        info=info,
    )


def step_batches(step: int, rank: int, world: int, *, groups: int, micro: int = 1, **sizes: int) -> list[Batch]:
    """Return one rank's micro-batches of a step: the groups j of the step with j mod world == rank."""
    mine = [step * groups + j for j in range(rank, groups, world)]
    return [make_batch(mine[i : i + micro], **sizes) for i in range(0, len(mine), micro)]


def make_config(
    *,
    router: dict = TOP_K,
    expert: int = 1,
    groups: int = 4,
    micro: int = 1,
    deepspeed: dict | None = None,
    trainable: tuple[str, ...] = ("*",),
    **train,
) -> Config:
    """deepspeed: the section, whose optimizer brings its learning rate along."""
    section = copy.deepcopy(sgd() if deepspeed is None else deepspeed)
    raw = {
        "run": {"dir": "unused"},
        "data": {"shards": "unused", "text_tokenizer": "unused"},
        "model": {
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": 2,
            "init_std": INIT_STD,
            "ffn": {"type": "moe", "hidden_size": 16, "router": router},
        },
        "parallel": {"expert": expert},
        "trainable": trainable,
        "train": {"steps": 8, "global_batch_groups": groups, "micro_batch_groups": micro} | train,
        "schedule": {"peak_lr": section["optimizer"]["params"].pop("lr")},
        "deepspeed": section,
    }
    return validate(Config, raw, "test")


def sgd(stage: int = 1, *, clip: float = 0.5, lr: float = 0.1, **more) -> dict:
    return {
        "optimizer": {"type": "SGD", "params": {"lr": lr, "momentum": 0.9}},
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
    } | more
