#!/usr/bin/env bash
# Pre-train MoMa: sbatch slurm/pretrain_moma.sh [section.key=value ...]. CONFIG=configs/NAME.yaml: another recipe.
# Nodes and GPUs, as an example: sbatch -N 4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 slurm/pretrain_moma.sh
#SBATCH --job-name=moma
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH --output=%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@120
recipe=moma_quickstart
text=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p;T;q') script=''
until [ -e "${script%/*}/stage.sh" ] || [[ $text != *.sh* ]]; do script+=${text%%.sh*}.sh text=${text#*.sh}; done
folder=${script%/*} && source "${folder:-$SLURM_SUBMIT_DIR/slurm}/stage.sh" "$@"
