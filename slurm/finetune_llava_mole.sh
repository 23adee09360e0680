#!/usr/bin/env bash
# Tune LLaVA-MoLE's LoRA experts: sbatch slurm/finetune_llava_mole.sh [section.key=value ...]. Before it comes the dense stage:
# CONFIG=configs/dense_quickstart.yaml sbatch slurm/pretrain_moma.sh
#SBATCH --job-name=llava_mole
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH --output=%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@120
CONFIG=${CONFIG:-configs/llava_mole_quickstart.yaml}
command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p;T;q')
command=${command:-$SLURM_SUBMIT_DIR/slurm/finetune_llava_mole.sh}  # the controller may be too busy to answer
source "$(dirname "${command%%.sh*}")/env.sh"
train "$@"
