#!/usr/bin/env bash
# Pre-train MoMa under Slurm, one task a rank: sbatch slurm/pretrain_moma.sh [section.key=value ...]
# Partition, account, nodes and tasks are sbatch's own options; CONFIG=... names another recipe.
#SBATCH --job-name=moma
#SBATCH --ntasks=2
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source .venv/bin/activate
srun --kill-on-bad-exit python launch/train.py --config "${CONFIG:-configs/moma_quickstart.yaml}" "$@"
