#!/usr/bin/env bash
# Train AdaMoE (null experts): sbatch slurm/finetune_adamoe.sh [section.key=value ...]. CONFIG=configs/NAME.yaml: another recipe.
#SBATCH --job-name=adamoe
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH --output=%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@120
recipe=adamoe_quickstart
text=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p;T;q') script=''
until [ -e "${script%/*}/stage.sh" ] || [[ $text != *.sh* ]]; do script+=${text%%.sh*}.sh text=${text#*.sh}; done
folder=${script%/*} && source "${folder:-$SLURM_SUBMIT_DIR/slurm}/stage.sh" "$@"
