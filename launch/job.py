"""Decide for slurm/env.sh whether a job may start and, after it has ended, whether to start it again (docs/slurm.md):

launch/job.py begin --job ID --restarts N --max-failures N --config configs/NAME.yaml [section.key=value ...]
    Called before the ranks start. Prints the run folder, then the overrides to append to the training command. Exits
    with status 10 if the run is done already.
launch/job.py end --code STATUS --max-failures N RUN
    Called after the ranks have ended. Prints the outcome. Exit status 0: done, or stopped on purpose; 75: start it
    again; 1 and 2: do not start it again.
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
    step.add_argument("--job", required=True, help="the job's number; for a task of an array, with the task's number")
    step.add_argument("--restarts", type=int, required=True, help="number of earlier starts of the job")
    step.add_argument("--max-failures", type=int, required=True, help="limit of failures without a newer checkpoint")
    step.add_argument("--config", required=True, help="the recipe, a YAML file")
    step.add_argument("overrides", nargs="*", metavar="section.key=value")
    step = steps.add_parser("end")
    step.add_argument("--code", type=int, required=True, help="exit status of the launcher")
    step.add_argument("--max-failures", type=int, required=True, help="limit of failures without a newer checkpoint")
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
    print(f"start {arguments.restarts + 1} of job {arguments.job}: continues after step {plan.step}", file=sys.stderr)
    print("\n".join([config.run.dir, *plan.overrides]))
    return 0


if __name__ == "__main__":
    try:  # not run_rank, which imports torch: a wrong configuration should be reported at once
        status = main()
    except (UserError, OSError) as problem:
        print(f"error: {as_user_error(problem) or problem}", file=sys.stderr)
        status = 2
    sys.exit(status)
