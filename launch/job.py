"""For slurm/env.sh: may a job start, and shall it start again? (docs/slurm.md, "The life of a job")

launch/job.py begin --job ID --restarts N --max-failures N --config configs/NAME.yaml [section.key=value ...]
    Before the ranks. Prints the run folder, then overrides to add. Exit status 10: the run is done already.
launch/job.py end --code STATUS --max-failures N RUN
    After them. Prints how it went. Exit status 0: done, or stopped on purpose; 75: start it again; 2 and 1: do not.
"""

import argparse
import sys
from pathlib import Path

from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError, as_user_error
from moe_dist.health.job_attempts import begin, end

EXIT = {"done": 0, "stopped": 0, "again": 75, "wrong": 2, "given up": 1}
DONE = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("begin")
    step.add_argument("--job", required=True, help="its number, of an array's task with the task's")
    step.add_argument("--restarts", type=int, required=True, help="how often it was started before")
    step.add_argument("--max-failures", type=int, required=True, help="failures without a newer checkpoint")
    step.add_argument("--config", required=True, help="the recipe, a YAML file")
    step.add_argument("overrides", nargs="*", metavar="section.key=value")
    step = steps.add_parser("end")
    step.add_argument("--code", type=int, required=True, help="exit status of the launcher")
    step.add_argument("--max-failures", type=int, required=True, help="failures without a newer checkpoint")
    step.add_argument("run", type=Path, help="a run folder")
    arguments = parser.parse_args()
    if arguments.step == "end":
        ending = end(arguments.run, arguments.code, arguments.max_failures)
        print(ending.sentence, flush=True)
        return EXIT[ending.verdict]
    config = load_config(arguments.config, arguments.overrides)
    plan = begin(config, arguments.job, arguments.restarts, arguments.max_failures)
    if plan is None:
        print(f"{config.run.dir} is done: nothing is left to train", file=sys.stderr)
        return DONE
    print(f"start {arguments.restarts + 1} of job {arguments.job}: goes on after step {plan.step}", file=sys.stderr)
    print("\n".join([config.run.dir, *plan.overrides]))
    return 0


if __name__ == "__main__":
    try:  # not parallel.launch.run_rank, which imports torch: a wrong configuration shall show at once
        status = main()
    except (UserError, OSError) as problem:
        print(f"error: {as_user_error(problem) or problem}", file=sys.stderr)
        status = 2
    sys.exit(status)
