"""Measure MoMa's training speed in tokens per second, against the dense model with equal active FLOPs per token.

  python benchmarks/throughput.py [study|small|large ...]                    one process
  deepspeed --num_gpus 2 benchmarks/throughput.py [study|small|large ...]    two ranks, EP=2

Set OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in the environment. The last two let glibc
keep freed memory, as a GPU's allocator does. Without them every step on the CPU pays for fresh pages of all gradients.

Takes real optimizer steps of the real engine (forward, backward, AdamW under ZeRO-1) on seeded synthetic tokens, half
of them of images. All models are trained in turns, dense first in every round, so that disturbances of the machine
affect them equally. A model's speed is compared with the dense model's of the same round.

One process on the CPU measures processor time, which other load disturbs little; with one thread it equals the time of
an idle machine. Ranks, which wait for each other, and processes that wait for a GPU measure wall-clock time. Writes
benchmarks/results/<date>-throughput.md (two ranks: -throughput_ep2.md). The paper (arXiv 2407.21770, 435M on 256 GPUs)
reports moe_8x -9 %, 1t1i -6 %, 4t4i -17 %, with mixture-of-depths -31 %.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import cast

import torch

from moe_dist.config.recipe import Config, load_config
from moe_dist.core.batch import IMAGE, TEXT, Batch, TokenInfo
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.metrics.step_counts import StepCounts
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.training.deepspeed import Engine, init_distributed, make_engine
from runs import ROOT, expert_choice, moma, write_result

LAYERS, DEEPER = 4, 7  # without and with mixture-of-depths: equal FLOPs per token except for attention
SIZES = {  # width, heads, expert width, vocabulary (a quarter of the dense model's FLOPs in small and large), rounds
    "study": (64, 4, 176, 2560, 15),  # of benchmarks/moma_eta.py
    "small": (128, 4, 256, 1536, 15),  # the quickstarts'
    "large": (512, 8, 1376, 8192, 5),  # layers of the 90M-matched models
}
WARM_UP = 1  # rounds
GROUPS = 8  # of a step
DOCUMENT = 128  # tokens; the second half are image tokens
MODELS = {  # router, layers, depth
    "dense": (None, LAYERS, None),
    "moe_8x": (expert_choice(8), LAYERS, None),
    "moma 1t1i": (moma(1, 1), LAYERS, None),
    "moma 4t4i": (moma(4, 4), LAYERS, None),
    "MoD 4t4i": (moma(4, 4), DEEPER, "{capacity: 0.25, every: 2}"),
}
HEADER = "| size | model | FLOPs a token | tokens/s | against dense | interval |"
NOTE = (
    "{ranks}, {threads} thread(s) each, float32; {clock}. Tokens/s: median over the rounds (15, large 5). Against "
    "dense: median over the rounds of the ratio of speeds in one round. Interval: from one of these ratios to "
    "another, so that it contains their median with 95 % (of five rounds: the extremes, 94 %). FLOPs a token: by "
    "formula, as a multiple of the dense model's. study: width 64, experts of 176, 2,560 ids; small: width 128, "
    "experts of 256, 1,536 ids; large: width 512, experts of 1,376, 8,192 ids; {layers} layers, with "
    "mixture-of-depths {deeper}; 8,192 tokens per step, in two micro-batches of each rank. glibc keeps freed memory: "
    "{malloc}. Load of the machine before and after each size: {load}."
)


CLOCKS = {"processor time": time.process_time, "clock": time.perf_counter}


def clock_of(layout: Layout) -> str:
    """Return the clock to measure with: processor time for one rank on CPU, otherwise wall-clock time, because waiting
    costs no processor time.
    """
    return "processor time" if layout.world == 1 and layout.device.type == "cpu" else "clock"


class Contestant:
    """A model with its engine, which trains on the same micro-batches in every step."""

    def __init__(self, size: str, name: str, layout: Layout):
        *_, vocabulary, _ = SIZES[size]
        self.config, self.layout, self.vocabulary = recipe(size, name, layout), layout, vocabulary
        model = Transformer(self.config.model, vocabulary, layout, self.config.seed)
        self.engine: Engine = make_engine(model, self.config, layout)
        micro = self.config.train.micro_batch_groups
        self.batches = [
            make_batch(self.config, vocabulary, first=(layout.rank * self.engine.accumulation + i) * micro)
            for i in range(self.engine.accumulation)
        ]

    def step(self) -> float:
        """Take one optimizer step and return its seconds."""
        context = Context(layout=self.layout, group_sequences=self.config.data.group_sequences)
        read, synchronize = CLOCKS[clock_of(self.layout)], torch.get_device_module(self.layout.device).synchronize
        synchronize()
        start = read()
        self.engine.train_step(self.batches, make_objective({}, context, 0), 1e-4)
        synchronize()
        return read() - start

    @property
    def tokens(self) -> int:
        """Number of tokens of a step, over all ranks."""
        return self.layout.dp * sum(batch.info.num_tokens for batch in self.batches)

    @property
    def flops_per_token(self) -> float:
        """Of this rank, in one more step."""
        context = Context(layout=self.layout, group_sequences=self.config.data.group_sequences)
        result = self.engine.train_step(
            self.batches,
            make_objective({}, context, 0),
            1e-4,
            lambda batch, output: StepCounts.of(batch, output, self.layout),
        )
        assert result.counted is not None
        flops = result.counted.flops(cast(Transformer, self.engine.module))
        return flops / sum(batch.info.num_tokens for batch in self.batches)


def recipe(size: str, name: str, layout: Layout) -> Config:
    width, heads, expert_width, *_ = SIZES[size]
    router, layers, depth = MODELS[name]
    ffn = f"type: moe, hidden_size: {expert_width}, router: {router}" if router else ""
    return load_config(
        ROOT / "configs" / "moma_quickstart.yaml",
        [
            f"model.ffn={{{ffn or f'type: dense, hidden_size: {expert_width}'}}}",
            f"model.hidden_size={width}",
            f"model.num_heads={heads}",
            f"model.num_layers={layers}",
            f"model.depth={depth or 'null'}",
            f"parallel.expert={layout.expert}",
            f"train.global_batch_groups={GROUPS}",
            f"train.micro_batch_groups={GROUPS // 2 // layout.dp}",
        ],
    )


def make_batch(config: Config, vocabulary: int, *, first: int) -> Batch:
    """Return the selection groups from `first` on, of seeded tokens: documents of text, then an image with ids of the
    upper half.
    """
    groups, sequences = config.train.micro_batch_groups, config.data.group_sequences
    tokens = groups * sequences * config.data.sequence_length
    position_T = torch.arange(tokens) % DOCUMENT
    modality_T = torch.where(position_T < DOCUMENT // 2, TEXT, IMAGE)
    generator = torch.Generator().manual_seed(first)
    tokens_T = torch.randint(vocabulary // 2, (tokens,), generator=generator) + modality_T * (vocabulary // 2)
    info = TokenInfo.build(
        modality_T=modality_T,
        valid_T=torch.ones(tokens, dtype=torch.bool),
        position_T=position_T,
        token_id_T=torch.arange(tokens) + first * tokens // groups,
        document_lengths=[DOCUMENT] * (tokens // DOCUMENT),
        num_groups=groups,
        num_sequences=groups * sequences,
    )
    return Batch(
        tokens_T=tokens_T,
        targets_T=tokens_T.roll(-1),
        loss_mask_T=position_T < DOCUMENT - 1,
        target_modality_T=modality_T.roll(-1),
        info=info,
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the narrowest pair of order statistics that contains the median with at least 95 %; the range if none
    does.
    """
    ordered, number = sorted(values), len(values)
    tails = [sum(math.comb(number, i) for i in range(k + 1)) / 2**number for k in range(number)]
    cut = max((k for k in range(number // 2) if tails[k] <= 0.025), default=0)
    return ordered[cut], ordered[-1 - cut]


def measure(size: str, layout: Layout, report: Callable[[str], None]) -> list[str]:
    """Train all models of one size in turns and return the rows of the table."""
    rounds = SIZES[size][-1]
    contestants = {name: Contestant(size, name, layout) for name in MODELS}
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    for turn in range(WARM_UP + rounds):
        for name, contestant in contestants.items():
            seconds[name].append(contestant.step())
        report(f"{size} {turn}: " + ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items()))
    seconds = {name: taken[WARM_UP:] for name, taken in seconds.items()}
    rows = []
    for name, contestant in contestants.items():
        speeds = [dense / own - 1 for dense, own in zip(seconds["dense"], seconds[name])]
        low, high = interval(speeds)
        flops = contestant.flops_per_token / contestants["dense"].flops_per_token
        against = "| | |" if name == "dense" else f"| {statistics.median(speeds):+.1%} | {low:+.1%} to {high:+.1%} |"
        speed = contestant.tokens / statistics.median(seconds[name])
        rows.append(f"| {size} | {name} | {flops:.3f} | {speed:,.0f} {against}")
        report(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="study|small|large", help="default: all")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    sizes = parser.parse_args().sizes or list(SIZES)
    if unknown := set(sizes) - set(SIZES):
        parser.error(f"no such size: {', '.join(sorted(unknown))}; there are {', '.join(SIZES)}")
    device = init_distributed()
    world = torch.distributed.get_world_size()
    layout = make_layout(expert=world, device=device)

    def report(line: str) -> None:
        if layout.is_main:
            print(line, flush=True)

    load, rows = [os.getloadavg()[0]], list[str]()
    for size in sizes:
        rows += measure(size, layout, report)
        load.append(os.getloadavg()[0])
        if layout.is_main:
            write(layout, rows, load)


def write(layout: Layout, rows: Sequence[str], load: Sequence[float]) -> None:
    one = layout.world == 1
    note = NOTE.format(
        ranks="One process" if one else f"{layout.world} ranks, EP={layout.world}",
        clock=clock_of(layout),
        threads=torch.get_num_threads(),
        layers=LAYERS,
        deeper=DEEPER,
        malloc="yes" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "no",
        load=", ".join(f"{value:.1f}" for value in load),
    )
    name = "throughput" if one else f"throughput_ep{layout.world}"
    write_result(name, "Training throughput against the FLOP-matched dense model", note, HEADER, rows)


if __name__ == "__main__":
    main()
