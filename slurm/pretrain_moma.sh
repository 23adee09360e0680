#!/usr/bin/env bash
# Pre-train MoMa: sbatch slurm/pretrain_moma.sh [section.key=value ...]. CONFIG=configs/NAME.yaml: another recipe.
# Nodes and GPUs, as an example: sbatch -N 4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 slurm/pretrain_moma.sh
#SBATCH --job-name=moma
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH --output=%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@120
CONFIG=${CONFIG:-configs/moma_quickstart.yaml}
command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p;T;q')
command=${command:-$SLURM_SUBMIT_DIR/slurm/pretrain_moma.sh}  # the controller may be too busy to answer
source "$(dirname "${command%%.sh*}")/env.sh"
train "$@"
