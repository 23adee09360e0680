#!/usr/bin/env bash
# One node's ranks under the DeepSpeed launcher: node.sh RANKS_PER_NODE launch/PROGRAM.py [argument ...]
set -euo pipefail
exec > "$LOGS/launcher-$SLURM_NODEID.log" 2>&1
hostfile=$(mktemp)
sed "s/\$/ slots=$1/" <<<"$NODES" > "$hostfile"

# The launcher would die of USR1, which means to stop with a checkpoint: it ignores it, and ranks set a handler of their
# own. They are sent it from here, through their process group: many sites' Slurm tells the first process of a task alone.
forward() { trap '' USR1; kill -USR1 0; trap forward USR1; }
trap forward USR1
(
  trap '' USR1
  exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" \
    --master_port "$MASTER_PORT" --no_python --no_local_rank slurm/rank.sh "${@:2}"
) &
trap : TERM  # the launcher gets it, too, and tells its ranks
while kill -0 $! 2>/dev/null; do wait $! || true; done  # a signal ends `wait`, not the launcher
rm -f "$hostfile"
wait $!
