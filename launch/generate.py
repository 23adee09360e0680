"""Sample from a trained model: launch/generate.py RUN [--caption TEXT ...] [--picture FILE ...] [--mixed PART ...]

  --caption "a red heart" "a dog"      generate an image for each text
  --picture cat.png dog.png            generate a text for each picture
  --mixed "Two hearts:" @heart.png     continue a prompt of texts and pictures (@FILE); may be given several times

Reads RUN/config.yaml and the run's newest checkpoint, but no shards. Writes PNGs, samples.jsonl and a contact sheet
(sheet.png) to a new folder under RUN/samples/. Overrides of the recipe (section.key=value) go directly after RUN.

Runs as a single process or under any launcher. The samples do not depend on the number of processes. By default, every
process holds all experts. The override parallel.expert=N distributes them over N processes.
"""

import argparse
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.generate.decode import check_can_generate, generate
from moe_dist.generate.pictures import Generated, write_generated
from moe_dist.generate.prompt import Format, GenerationState, Prompt, read_picture
from moe_dist.generate.sampling import Sampling
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.parallel.agreement import gather_objects, raise_on_all_ranks
from moe_dist.parallel.discovery import run_rank
from moe_dist.training.trained_run import TrainedRun


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--caption", nargs="+", action="extend", default=[], metavar="TEXT")
    parser.add_argument("--picture", nargs="+", action="extend", default=[], metavar="FILE")
    parser.add_argument("--mixed", nargs="+", action="append", default=[], metavar="PART")
    parser.add_argument("--samples", type=int, default=1, help="samples per prompt (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="samples per rank at once (default: %(default)s)")
    for name, field in Sampling.model_fields.items():
        kind = int if field.annotation is int else float
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=field.default, help="(default: %(default)s)"
        )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    generate_samples(parser.parse_intermixed_args(argv))


def generate_samples(arguments: argparse.Namespace) -> None:
    """Generate the samples that the command line requests, then print and write them. Collective."""
    folder = RunFolder(arguments.run)
    found = TrainedRun.find(folder, arguments.overrides)
    with raise_on_all_ranks():
        sampling = validate(Sampling, {name: getattr(arguments, name) for name in Sampling.model_fields}, "generate")
    run = found.open()
    layout, vocabulary, step = run.layout, run.vocabulary, run.step
    with raise_on_all_ranks():
        check_can_generate(run.model)
        form = Format(vocabulary, run.config.data.sequence_length)
        samples = start_samples(arguments, form, sampling)
    mine = samples[layout.dp_rank :: layout.dp]
    rounds = -(-len(samples) // (layout.dp * arguments.batch))
    for number in range(rounds):
        begin = number * layout.dp * arguments.batch
        now = samples[begin : begin + layout.dp * arguments.batch]
        title = f"samples, round {number + 1} of {rounds}" if rounds > 1 else "samples"
        with Bar(title, len(now), is_main=layout.is_main) as bar:
            generate(run.model, now[layout.dp_rank :: layout.dp], form, sampling, layout, bar.update)
    made = [Generated(s.number, s.prompt.task, s.prompt.parts, form.parts(s.generated), s.generated) for s in mine]
    everything = sorted((sample for of_rank in gather_objects(made) for sample in of_rank), key=lambda s: s.number)
    with raise_on_all_ranks():
        if layout.is_main:
            out = new_folder(folder.samples, f"step_{step:08d}")
            write_generated(out, everything, vocabulary.image, {"step": step, **sampling.model_dump()})
            for number, text in ((s.number, part) for s in everything for part in s.parts if isinstance(part, str)):
                print(f"{number:04d} {text}")
            print(f"{len(everything)} samples of step {step}: {out}", flush=True)


def start_samples(arguments: argparse.Namespace, form: Format, sampling: Sampling) -> list[GenerationState]:
    """Create the initial states of all samples: first for --caption, then for --picture, then for --mixed.

    Every rank creates all states, so a sample has the same number on all ranks. Raises UserError if an option or a
    prompt is invalid, or if there is no prompt.
    """
    for name in ("samples", "batch"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    texts = [part for parts in arguments.mixed for part in parts if not part.startswith("@")]
    for text in (*arguments.caption, *texts):
        if re.match(r"[a-z_]+(\.[a-z_]+)+=", text):
            raise UserError(f"'{text}' looks like an override: overrides of the recipe come right after RUN")
    prompts: list[Prompt] = [form.text_to_image(caption) for caption in arguments.caption]
    prompts += [form.image_to_text(read_picture(file)) for file in arguments.picture]
    for parts in arguments.mixed:
        prompts.append(form.mixed([read_picture(part[1:]) if part.startswith("@") else part for part in parts]))
    if not prompts:
        raise UserError("there is no prompt: give --caption, --picture or --mixed")
    if sampling.guidance != 1 and len(prompts) > len(arguments.caption):
        raise UserError("--guidance is for images: it compares a prompt with the same prompt without its --caption")
    repeated = [prompt for prompt in prompts for _ in range(arguments.samples)]
    return [form.start(number, prompt, sampling.max_tokens) for number, prompt in enumerate(repeated)]


def new_folder(parent: Path, name: str) -> Path:
    """Return a path in `parent` that does not exist yet, so that no earlier samples are overwritten.

    The path is parent/name or, if that exists, parent/name-N with the smallest free N (2, 3, ...).
    """
    number = 1
    while (parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return parent / (name if number == 1 else f"{name}-{number}")


class Bar:
    """A progress bar for one round of generation, in which every rank generates one batch of samples.

    Rank 0 shows the number of finished samples over all ranks. The other ranks show nothing.
    """

    def __init__(self, title: str, total: int, *, is_main: bool):
        columns = (TextColumn(title), BarColumn(), TextColumn("{task.completed} of {task.total} done"))
        tokens = TextColumn("{task.fields[tokens]} tokens each")
        self.progress = Progress(*columns, tokens, TimeElapsedColumn(), console=Console(), disable=not is_main)
        self.total, self.tokens = total, 0
        self.task = self.progress.add_task(title, total=total, tokens=0)

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def update(self, left: int) -> None:
        self.tokens += 1
        self.progress.update(self.task, completed=self.total - left, tokens=self.tokens)


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
