#!/usr/bin/env bash
# Align routers (RoMA): sbatch slurm/align_roma.sh [section.key=value ...]. Before it come the experts' stage,
# CONFIG=configs/roma_experts.yaml sbatch slurm/pretrain_moma.sh, and the neighbour store (docs/roma.md).
#SBATCH --job-name=roma
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH --output=%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@120
recipe=roma_quickstart
text=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p;T;q') script=''
until [ -e "${script%/*}/stage.sh" ] || [[ $text != *.sh* ]]; do script+=${text%%.sh*}.sh text=${text#*.sh}; done
folder=${script%/*} && source "${folder:-$SLURM_SUBMIT_DIR/slurm}/stage.sh" "$@"
