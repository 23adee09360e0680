"""A training run, built from its recipe. The training loop takes steps, evaluates, logs and saves checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.saver import Saver
from moe_dist.checkpoint.stage_account import Account
from moe_dist.checkpoint.train_state import TrainState
from moe_dist.config.recipe import Config
from moe_dist.core.batch import Batch
from moe_dist.data.cache.token_cache import TokenStore, load_vocabulary
from moe_dist.data.stream.loader import Loaded, Loader
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.evaluate.held_out_split import HeldOutSplit
from moe_dist.evaluate.perplexity import evaluate
from moe_dist.health.before_training import check_health
from moe_dist.health.hang import HangWatch
from moe_dist.health.stragglers import Stragglers
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.metrics.curves import report_or_explain
from moe_dist.metrics.progress import Progress
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.metrics.sinks import Sinks
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.discovery import is_main_process
from moe_dist.parallel.garbage import AlignedCollection
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.parallel.signals import Stopped, StopSignals
from moe_dist.training.deepspeed import init_distributed, make_engine
from moe_dist.training.determinism import make_deterministic
from moe_dist.training.engine import Engine
from moe_dist.training.origin import find_origin
from moe_dist.training.reach import Reach
from moe_dist.training.schedule import learning_rate
from moe_dist.training.setup import check_recipe, embedding_rows, open_data, open_loader
from moe_dist.training.step_metrics import StepMeter
from moe_dist.training.task_evaluation import TaskEvaluation
from moe_dist.training.trainable import trained_share


def train(config: Config, stop: StopSignals | None = None) -> None:
    """Train a recipe up to train.steps or train.stop_after, or until `stop` has received a signal on any rank.

    Collective. If a UserError occurs on one rank, it is raised on every rank. RUN/status.json records how the run
    ended.
    """
    folder, run, stop = RunFolder(Path(config.run.dir)), None, stop or StopSignals()
    try:
        if config.train.deterministic:
            make_deterministic()
        device = init_distributed(stop)
        health = check_health(config, device)  # first: ranks that differ would hang in later collectives
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
    """A training run: its parts, its progress so far and its training loop."""

    config: Config
    layout: Layout
    folder: RunFolder
    vocabulary: Vocabulary
    engine: Engine
    saver: Saver
    loader: Loader
    documents: TokenStore  # of the training split
    held_out: TokenStore
    reach: Reach
    loader_state: dict[str, Any]
    tasks: TaskEvaluation | None  # None if the recipe has no eval.tasks
    initial: Account | None  # the account of init_from; None if the run resumes or has no init_from
    stop: StopSignals = field(default_factory=StopSignals)
    step: int = 0  # optimizer steps done
    tokens: int = 0  # predictions trained on, over all ranks

    @classmethod
    def build(cls, config: Config, layout: Layout, folder: RunFolder, stop: StopSignals | None = None) -> Run:
        """Read the data, build the model and its engine, and continue from a checkpoint if there is one. Collective.

        Raises Stopped on every rank if `stop` has received a signal on any rank.
        """
        stop = stop or StopSignals()
        origin = find_origin(config)
        with raise_on_all_ranks():
            vocabulary = load_vocabulary(config.data)
            origin.check(vocabulary)
            rows = embedding_rows(config.model, vocabulary)
        documents, held_out = open_data(config.data, vocabulary, layout, stop)
        with torch.device("meta"):
            model = Transformer(config.model, rows, layout, config.seed)
        tasks = TaskEvaluation.open(config, model, vocabulary, layout)
        engine = make_engine(model, config, layout, origin.is_new)
        initial = origin.fill(engine, layout, vocabulary)
        with raise_on_all_ranks():
            loader_state = origin.loader_state or {}
            loader = open_loader(config, documents, vocabulary, layout, origin)
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
            reach=Reach(engine.module, layout, config.train.reach_steps),
            loader_state=loader_state,
            tasks=tasks,
            initial=initial,
            step=origin.state.step if origin.state else 0,
            tokens=origin.state.tokens if origin.state else 0,
            stop=stop,
        )

    @property
    def model(self) -> Transformer:
        return cast(Transformer, self.engine.module)

    @cached_property
    def meter(self) -> StepMeter:
        """The meter that computes routing metrics and FLOPs for this run's steps."""
        return StepMeter.of(self.model, self.config, self.layout, self.documents.domains)

    @property
    def last(self) -> int:
        """The step at which this run ends."""
        return min(self.config.train.steps, self.config.train.stop_after or self.config.train.steps)

    def loop(self) -> None:
        """Train, evaluate and save until the last step, or until a signal has been received. Collective."""
        is_new, saved, signal, config = self.step < self.last, self.step, None, self.config
        sinks, stragglers, watch = self._open()
        shown = Progress(self.last, step=self.step, is_main=self.layout.is_main, causal=self._is_causal)
        with watch, AlignedCollection() as garbage, shown as progress, self.saver:
            while self.step < self.last and not (signal := self.stop.agreed(self.layout.device)):
                with stragglers:
                    metrics = self.train_step()
                watch.beat()
                if _due(self.step, config.eval.every, self.last):
                    metrics |= self.evaluate()
                    watch.beat()
                if self.tasks is not None and self._are_tasks_due(self.step):
                    metrics |= self.tasks.evaluate(watch.beat)
                if self._is_logged(self.step):
                    self._log(sinks, metrics)
                progress.update(self.step, metrics)
                if _due(self.step, config.checkpoint.every, self.last) or self.step == self.last:
                    saved = self.save()
                    watch.beat()
                garbage.after(self.step)
            if saved < self.step:
                self.save()
        with raise_on_all_ranks():
            sinks.close()
            if self.layout.is_main:
                if is_new and signal is None:  # after a signal there is little time
                    report_or_explain(self.folder.path)
                print(self.folder.write_end(self.step, config.train.steps, signal), flush=True)

    @raise_on_all_ranks()
    def _open(self) -> tuple[Sinks, Stragglers, HangWatch]:
        """Open the run folder and the metric sinks, and create the watchers for stragglers and hangs. Collective."""
        main, health = self.layout.is_main, self.config.health
        if main:
            for path in checkpoint.set_aside_later(self.folder.path, self.step):
                print(f"set aside: {path} is of a later step than {self.step}", flush=True)
            self.folder.open(self.config, step=self.step)
            self._tell_the_start()
        sinks = Sinks(self.folder, self.config, is_main=main, causal=self._is_causal, step=self.step)
        stragglers = Stragglers(health, self.folder, rank=self.layout.rank, step=self.step)
        watch = HangWatch(self.folder.stacks, self.layout.rank, health.hang_seconds, self._tell_hang)
        if self.config.eval.every:
            next(self.held_out_split.batches(self.held_out))  # an unusable split fails now, not after many steps
        return sinks, stragglers, watch

    @raise_on_all_ranks()
    def _log(self, sinks: Sinks, metrics: dict[str, Any]) -> None:
        sinks.log(self.step, metrics | self.saver.metrics())
        if self.layout.is_main:
            self.folder.beat(self.step)

    @property
    def _is_causal(self) -> bool:
        return bool(self.engine.module.causal_routing)

    def _is_logged(self, step: int) -> bool:
        """Return True if the metrics of step number `step` are written to metrics.jsonl."""
        every = self.config.telemetry.every
        evaluated = _due(step, self.config.eval.every, self.last) or self._are_tasks_due(step)
        return step % every == 0 or step == self.last or evaluated

    def _are_tasks_due(self, step: int) -> bool:
        return _due(step, self.config.eval.steps_between_tasks, self.last)

    def _tell_hang(self, sentence: str) -> None:
        self.folder.write_status("failed", self.step, sentence, restart=True)

    def _tell_the_start(self) -> None:
        """Report how the run starts, and how many parameters it trains.

        If the run starts from init_from, print how many parameters were loaded, and write the list of all parameters
        to RUN/init_from.json. If the run resumes, print that init_from is not read again.
        """
        if self.initial is not None:
            self.folder.write_initial(self.initial.to_json())
            Console().print(self.initial.table())
        elif self.config.init_from is not None:
            print(f"resumed after step {self.step}: init_from is not read again", flush=True)
        print(trained_share(self.model, self.model.num_parameters(), self.layout.expert), flush=True)

    def train_step(self) -> dict[str, Any]:
        """Take one optimizer step and return its metrics (metrics/metric_keys.py). Collective."""
        started, config, read = time.perf_counter(), self.config, list[Loaded]()
        lr = learning_rate(self.step, config=config.schedule, steps=config.train.steps)
        context = Context(layout=self.layout, group_sequences=config.data.group_sequences)
        objective = make_objective(config.losses, context, self.step)
        count = self.meter.count if self._is_logged(self.step + 1) else None
        result = self.engine.train_step(self._read(read), objective, lr, count)
        self.reach.after_step(lr, self.folder, skipped=result.skipped)
        self.loader_state = read[-1].state
        self.step += 1
        self.tokens += result.counts["loss"]
        seconds = time.perf_counter() - started
        metrics = {
            "tokens": self.tokens,
            **result.losses,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "skipped_steps": self.engine.skipped_steps,
            "step_seconds": seconds,
            "data_wait_seconds": sum(item.waited for item in read),
            "tokens_per_second": result.counts["loss"] / seconds,
        }
        return metrics if result.counted is None else metrics | self.meter.metrics(result.counted, seconds)

    def _read(self, read: list[Loaded]) -> Iterator[Batch]:
        """Yield the micro-batches of a step. Append each result of the loader to `read`, for use after the step.

        A result consists of a micro-batch, the loader's state and the time that training waited for the batch.
        """
        for item in islice(self.loader, self.engine.accumulation):
            read.append(item)
            yield item.batch

    def evaluate(self) -> dict[str, float]:
        """Return the held-out losses, computed with the same routing as in training. Collective."""
        batches = self.held_out_split.batches(self.held_out)
        return evaluate(self.engine.eval_forward, batches, self.layout, self.held_out.domains)

    @property
    def held_out_split(self) -> HeldOutSplit:
        """The share of the held-out split that this rank evaluates."""
        return HeldOutSplit.of(self.config, self.vocabulary, self.layout)

    def save(self) -> int:
        """Save a checkpoint of the current step, and return the number of the step. Collective."""
        state = TrainState(
            step=self.step,
            tokens=self.tokens,
            loader=self.loader_state,
            config=self.config.model_dump(mode="json"),
            vocabulary=self.vocabulary.fingerprint(),
        )
        self.saver.save(self.step, state.to_json())
        return self.step


def _due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)
