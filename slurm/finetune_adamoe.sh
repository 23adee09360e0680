#!/usr/bin/env bash
# Train AdaMoE (null experts): sbatch slurm/finetune_adamoe.sh [section.key=value ...]. CONFIG=configs/NAME.yaml: another recipe.
#SBATCH --job-name=adamoe
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH --output=%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@120
CONFIG=${CONFIG:-configs/adamoe_quickstart.yaml}
command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p;T;q')
command=${command:-$SLURM_SUBMIT_DIR/slurm/finetune_adamoe.sh}  # the controller may be too busy to answer
source "$(dirname "${command%%.sh*}")/env.sh"
train "$@"
