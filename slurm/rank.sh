#!/usr/bin/env bash
# One rank: rank.sh launch/PROGRAM.py [argument ...]. Its output goes to its own file.
set -euo pipefail
exec > "$LOGS/rank-${RANK:-$SLURM_PROCID}.log" 2>&1
exec python -u "$@"
