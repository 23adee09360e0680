#!/usr/bin/env bash
# Tune LLaVA-MoLE's LoRA experts: sbatch slurm/finetune_llava_mole.sh [section.key=value ...]. Before it comes the dense stage:
# CONFIG=configs/dense_quickstart.yaml sbatch slurm/pretrain_moma.sh
#SBATCH --job-name=llava_mole
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH --output=%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@120
recipe=llava_mole_quickstart
text=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p;T;q') script=''
until [ -e "${script%/*}/stage.sh" ] || [[ $text != *.sh* ]]; do script+=${text%%.sh*}.sh text=${text#*.sh}; done
folder=${script%/*} && source "${folder:-$SLURM_SUBMIT_DIR/slurm}/stage.sh" "$@"
