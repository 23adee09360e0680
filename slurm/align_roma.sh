#!/usr/bin/env bash
# Align routers (RoMA): sbatch slurm/align_roma.sh [section.key=value ...]. Before it come the experts' stage,
# CONFIG=configs/roma_experts.yaml sbatch slurm/pretrain_moma.sh, and the neighbour store (docs/roma.md).
#SBATCH --job-name=roma
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH --output=%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@120
CONFIG=${CONFIG:-configs/roma_quickstart.yaml}
command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p;T;q')
command=${command:-$SLURM_SUBMIT_DIR/slurm/align_roma.sh}  # the controller may be too busy to answer
source "$(dirname "${command%%.sh*}")/env.sh"
train "$@"
