"""Builds a run from its recipe, then trains. With parts.py, the only module that sees all the others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.init_from import Account
from moe_dist.checkpoint.init_from import loader_state as loader_state_of
from moe_dist.checkpoint.manifest import resolve_init
from moe_dist.checkpoint.saver import Saver
from moe_dist.checkpoint.train_state import TrainState, check_resumable
from moe_dist.config.recipe import Config, MoEFFN
from moe_dist.core.batch import Batch
from moe_dist.core.errors import UserError
from moe_dist.data.cache.token_cache import TokenStore, load_vocabulary
from moe_dist.data.stream.loader import Loader, make_loader
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.evaluate.held_out_split import HeldOutSplit
from moe_dist.evaluate.perplexity import evaluate
from moe_dist.health.before_training import check_health
from moe_dist.health.hang import HangWatch
from moe_dist.health.stragglers import Stragglers
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.metrics.curves import report_or_explain
from moe_dist.metrics.flops import flops_saved, model_flops, work_of
from moe_dist.metrics.progress import Progress
from moe_dist.metrics.router_agreement import decision_metrics
from moe_dist.metrics.routing_metrics import routing_counts, routing_metrics
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.metrics.sinks import Sinks
from moe_dist.model.moe.placement import make_placement
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.discovery import is_main_process
from moe_dist.parallel.garbage import AlignedCollection
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.parallel.signals import Stopped, StopSignals
from moe_dist.training.deepspeed import Engine, StepResult, init_distributed, make_engine
from moe_dist.training.determinism import make_deterministic
from moe_dist.training.schedule import learning_rate
from moe_dist.training.setup import check_needs, check_recipe, open_data, open_neighbours, routers, start_from


def train(config: Config, stop: StopSignals | None = None) -> None:
    """Train a recipe to train.steps, to train.stop_after, or until `stop` has noted a signal on any rank.

    Every rank calls it; a UserError is raised on every rank. RUN/status.json says how it ended.
    """
    folder, run, stop = RunFolder(Path(config.run.dir)), None, stop or StopSignals()
    try:
        if config.train.deterministic:
            make_deterministic()
        device = init_distributed()
        health = check_health(config, device)  # first: ranks that differ would not meet in what comes
        layout = make_layout(expert=config.parallel.expert, device=device)
        check_recipe(config, layout)
        with raise_on_all_ranks():
            if layout.is_main:
                folder.write_health(health.to_json())
                print(health.summary(), flush=True)
        run = Run.build(config, layout, folder, stop)
        run.loop()
    except BaseException as error:
        if is_main_process():
            folder.write_failure(error, run.step if run else None)
        if not isinstance(error, Stopped):
            raise
        if is_main_process():
            print(f"stopped ({error}) before the first step: {folder.path}", flush=True)


@dataclass(kw_only=True)
class Run:
    """The parts of a run, and how far it has come."""

    config: Config
    layout: Layout
    folder: RunFolder
    vocabulary: Vocabulary
    engine: Engine
    saver: Saver
    loader: Loader
    documents: TokenStore  # of the training split
    held_out: TokenStore
    loader_state: dict[str, Any]
    initial: Account | None  # what a fresh start took from init_from
    stop: StopSignals = field(default_factory=StopSignals)
    step: int = 0  # optimizer steps done
    tokens: int = 0  # predictions trained on, over all ranks

    @classmethod
    def build(cls, config: Config, layout: Layout, folder: RunFolder, stop: StopSignals | None = None) -> Run:
        """Read the data, build the model and its engine, and continue from a checkpoint if there is one. Collective.

        Raises Stopped on every rank where `stop` has noted a signal on any.
        """
        stop = stop or StopSignals()
        resume_from, state = checkpoint.resolve_resume(config), None
        with raise_on_all_ranks():
            check_needs(config, resumes=resume_from is not None)
        source = resolve_init(config) if resume_from is None else None
        if resume_from is not None:
            with raise_on_all_ranks():
                state = TrainState.from_json(checkpoint.read_state(resume_from))
                check_resumable(state.config, config)
        with raise_on_all_ranks():
            vocabulary = load_vocabulary(config.data)
            if state is not None and state.vocabulary != vocabulary.fingerprint():
                raise UserError(f"{resume_from} was trained with other tokenizers than {vocabulary.describe()}")
        documents, held_out = open_data(config.data, vocabulary, layout, stop)
        model = Transformer(config.model, vocabulary.size, layout, config.seed)
        engine = make_engine(model, config, layout)
        if resume_from is not None:
            checkpoint.load(resume_from, engine, layout)
        initial = start_from(source, engine, layout, vocabulary) if source is not None else None
        with raise_on_all_ranks():
            loader_state = state.loader if state else loader_state_of(source) if source is not None else None
            loader = make_loader(
                documents,
                vocabulary,
                config.data,
                seed=config.seed,
                dp_rank=layout.rank,
                dp=layout.world,
                batch_groups=config.train.micro_batch_groups,
                neighbours=open_neighbours(config.data, source),
                state=loader_state,
                device=layout.device,
            )
        return cls(
            config=config,
            layout=layout,
            folder=folder,
            vocabulary=vocabulary,
            engine=engine,
            loader=loader,
            saver=Saver(folder.path, engine, layout, config.checkpoint),
            documents=documents,
            held_out=held_out,
            loader_state=loader_state or {},
            initial=initial,
            step=state.step if state else 0,
            tokens=state.tokens if state else 0,
            stop=stop,
        )

    @property
    def model(self) -> Transformer:
        return cast(Transformer, self.engine.module)

    def loop(self) -> None:
        """Train, evaluate and save until the last step, or the step at which a signal is noted."""
        train, main, causal = self.config.train, self.layout.is_main, bool(self.engine.module.causal_routing)
        last = min(train.steps, train.stop_after or train.steps)
        is_new, saved, signal = self.step < last, self.step, None
        with raise_on_all_ranks():
            if main:
                for path in checkpoint.set_aside_later(self.folder.path, self.step):
                    print(f"set aside: {path} is of a later step than {self.step}", flush=True)
                self.folder.open(self.config, step=self.step)
                self._tell_the_start()
            sinks = Sinks(self.folder, self.config, is_main=main, causal=causal, step=self.step)
            stragglers = Stragglers(self.config.health, self.folder, rank=self.layout.rank, step=self.step)
            watch = HangWatch(self.folder.stacks, self.layout.rank, self.config.health.hang_seconds, self._tell_hang)
            if self.config.eval.every:
                next(self.held_out_split.batches(self.held_out))  # an unusable split shows now, not after many steps
        shown = Progress(last, step=self.step, is_main=main, causal=causal)
        with watch, AlignedCollection() as garbage, shown as progress, self.saver:
            while self.step < last and not (signal := self.stop.agreed(self.layout.device)):
                with stragglers:
                    metrics = self.train_step()
                watch.beat()
                if _due(self.step, self.config.eval.every, last):
                    metrics |= self.evaluate()
                    watch.beat()
                if self.step % self.config.telemetry.every == 0 or self.step == last or "eval/loss" in metrics:
                    with raise_on_all_ranks():
                        sinks.log(self.step, metrics | self.saver.metrics())
                        if main:
                            self.folder.beat(self.step)
                progress.update(self.step, metrics)
                if _due(self.step, self.config.checkpoint.every, last) or self.step == last:
                    saved = self.save()
                    watch.beat()
                garbage.after(self.step)
            if saved < self.step:
                self.save()
        with raise_on_all_ranks():
            sinks.close()
            if main:
                if is_new and signal is None:  # a signal leaves little time
                    report_or_explain(self.folder.path)
                print(self.folder.write_end(self.step, train.steps, signal), flush=True)

    def _tell_hang(self, sentence: str) -> None:
        self.folder.write_status("failed", self.step, sentence, restart=True)

    def _tell_the_start(self) -> None:
        """Print what init_from has done, and keep it in RUN/init_from.json."""
        if self.initial is not None:
            self.folder.write_initial(self.initial.to_json())
            Console().print(self.initial.table())
        elif self.config.init_from is not None:
            print(f"resumed after step {self.step}: init_from is not read again", flush=True)

    def train_step(self) -> dict[str, Any]:
        """Take one optimizer step; the metrics of metrics/metric_keys.py. Collective."""
        started = time.perf_counter()
        config, reader = self.config, Reader(self.loader)
        lr = learning_rate(self.step, config=config.schedule, steps=config.train.steps)
        context = Context(layout=self.layout, group_sequences=config.data.group_sequences)
        objective = make_objective(config.losses, context, self.step)
        result = self.engine.train_step(reader.read(self.engine.accumulation), objective, lr)
        self.loader_state = reader.state
        self.step += 1
        self.tokens += result.counts["loss"]
        seconds = time.perf_counter() - started
        metrics = {
            "tokens": self.tokens,
            **losses(result),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "skipped_steps": self.engine.skipped_steps,
            "step_seconds": seconds,
            "data_wait_seconds": reader.seconds,
            "tokens_per_second": result.counts["loss"] / seconds,
            "model_flops_per_second": self._flops(reader.batch, result) / seconds,
        }
        if result.records and self.step % config.telemetry.every == 0:
            metrics |= self._routing(reader.batch, result)
        if self.step % config.telemetry.every == 0:
            info = reader.batch.info.to(self.layout.device)
            metrics |= decision_metrics(result.records, result.depths, info, self.layout)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Held-out loss, with the routing of training. Collective."""
        batches = self.held_out_split.batches(self.held_out)
        return evaluate(self.engine.eval_forward, batches, self.layout, self.held_out.domains)

    @property
    def held_out_split(self) -> HeldOutSplit:
        """How much of the held-out split, and this rank's share."""
        return HeldOutSplit.of(self.config, self.vocabulary, self.layout)

    def save(self) -> int:
        """Save this moment; the step. Collective."""
        state = TrainState(
            step=self.step,
            tokens=self.tokens,
            loader=self.loader_state,
            config=self.config.model_dump(mode="json"),
            vocabulary=self.vocabulary.fingerprint(),
        )
        self.saver.save(self.step, state.to_json())
        return self.step

    def _flops(self, batch: Batch, result: StepResult) -> int:
        """Of the step, over all ranks: all have equally many tokens, so this rank's last micro-batch stands for all."""
        return (
            self.engine.accumulation
            * self.layout.world
            * model_flops(self.model, work_of(batch.info.document_lengths, result.records, result.depths))
        )

    def _routing(self, batch: Batch, result: StepResult) -> dict[str, Any]:
        router, ffn = routers(self.engine.module)[0], self.config.model.ffn
        assert isinstance(ffn, MoEFFN)
        moved, domains = batch.to(self.layout.device), self.documents.domains
        counts = routing_counts(
            result.records, moved.info, self.layout, domain_T=moved.sidecar.get("domain_T"), num_domains=len(domains)
        )
        metrics: dict[str, Any] = routing_metrics(
            counts,
            self.layout,
            expert_groups=router.expert_groups,
            local_experts=make_placement(router.expert_groups, self.layout.expert, ffn.slices).local_experts,
            domains=domains,
        )
        if router.reference_top_k is not None:
            metrics["moe/flops_saved"] = flops_saved(
                self.model,
                document_lengths=batch.info.document_lengths,
                tokens=int(batch.info.valid_T.sum()),
                experts=metrics["moe/experts_per_token"],
                top_k=router.reference_top_k,
                admitted={depth.layer: depth.document_lengths for depth in result.depths},
            )
        return metrics


class Reader:
    """Reads one step's micro-batches; keeps the last one, its loader state, and the seconds spent waiting."""

    def __init__(self, loader: Loader):
        self.loader, self.seconds = loader, 0.0

    def read(self, count: int) -> Iterator[Batch]:
        for _ in range(count):
            started = time.perf_counter()
            self.batch, self.state = next(self.loader)
            self.seconds += time.perf_counter() - started
            yield self.batch


def losses(result: StepResult) -> dict[str, float]:
    """Mean of each loss over what it belongs to; a modality without predictions has none."""
    return {name: total / result.counts[name] for name, total in result.loss_sums.items() if result.counts[name]}


def _due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)
