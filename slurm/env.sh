# Functions of stage.sh, the body of the sbatch scripts; docs/slurm.md explains them. A site's settings: slurm/site.sh, never here.
# train [section.key=value ...] runs the recipe CONFIG on every rank, and has Slurm run the job again where that helps.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# --- settings, with what they are where site.sh does not say
MODULES='' CONTAINER='' CONTAINER_MOUNTS='' VENV=$root/.venv START=${START:-srun} MAX_FAILURES=3
site=${SITE:-$root/slurm/site.sh}
# shellcheck disable=SC1090
[ ! -e "$site" ] || source "$site"

container=()
if [ -n "$CONTAINER" ]; then
  container=(--container-image="$CONTAINER" --container-workdir="$root"
    --container-mounts="$root:$root${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
else
  # shellcheck disable=SC2086
  [ -z "$MODULES" ] || module load $MODULES
  # shellcheck disable=SC1091
  [ ! -e "$VENV/bin/activate" ] || source "$VENV/bin/activate"
fi

# --- what every rank needs to know
nodes=$SLURM_NNODES ranks_per_node=$(((SLURM_NTASKS + SLURM_NNODES - 1) / SLURM_NNODES))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# GPU memory in segments that grow: sizes differ from step to step, and fixed segments would leave gaps.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
export NODES='' MASTER_ADDR='' MASTER_PORT=$((20000 + 1009 * SLURM_JOB_ID % 10000))
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${NODES%%$'\n'*}
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# One process, where the packages are. srun always passes on the environment of this script: after `sbatch --export=NONE`
# it would withhold what is set above.
once() {
  if [ -n "$CONTAINER" ]; then srun --export=ALL --nodes=1 --ntasks=1 --overlap "${container[@]}" python "$@"; else python "$@"; fi
}

# A question to the controller, which may be busy.
insist() { "$@" || { sleep 2; "$@"; } || { sleep 10; "$@"; }; }

# A program of launch/ on every rank, in the way that START says; the output of rank N is in $logs/rank-N.log, and that of
# rank 0 is shown here as well. A rank that ends alone gives the others a while to say what has happened to them.
ranks() {
  local launcher=(srun --export=ALL --kill-on-bad-exit=0 --wait=60 "${container[@]}") shown
  mkdir -p "$logs"
  export LOGS=$logs
  case $START in
    srun)
      [ -z "${SLURM_CPUS_PER_TASK-}" ] || launcher+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
      launcher+=(slurm/rank.sh) ;;
    deepspeed)
      launcher+=(--ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none slurm/node.sh "$ranks_per_node") ;;
    *) echo "error: START=$START is neither srun nor deepspeed" >&2; return 2 ;;
  esac
  "${launcher[@]}" "$@" &
  running=$!
  tail --lines=+1 --follow=name --retry --sleep-interval=0.5 --pid="$running" "$logs/rank-0.log" 2>/dev/null &
  shown=$!
  while kill -0 "$running" 2>/dev/null; do wait "$running" || true; done  # a signal ends `wait`, not the ranks
  wait "$shown" || true
  wait "$running"
}

# --- the life of a job
running='' told=''
pass_on() {
  told=1
  [ -z "$running" ] || kill -USR1 "$running" 2>/dev/null || true  # srun hands it to the tasks
}
trap pass_on USR1    # the time limit is near (--signal=B:USR1@SECONDS)
trap 'told=1' TERM   # Slurm ends this job, and has told the ranks itself: wait for their last checkpoint

train() {
  local plan run code=0 verdict=75
  plan=$(once launch/job.py begin --job "$job" --restarts "${SLURM_RESTART_COUNT:-0}" --max-failures "$MAX_FAILURES" \
    --config "$CONFIG" "$@") || code=$?
  [ "$code" != 10 ] || exit 0  # there is nothing left to do
  [ "$code" = 0 ] || exit "$code"
  run=$(head -n 1 <<<"$plan") logs=$run/logs/$job.${SLURM_RESTART_COUNT:-0}
  echo "job $job ($SLURM_JOB_NAME): $CONFIG on $nodes nodes, $ranks_per_node ranks each, by $START; logs of all ranks: $logs"
  if [ -z "$told" ]; then
    ranks launch/train.py --config "$CONFIG" "$@" $(tail -n +2 <<<"$plan") || code=$?
    verdict=0
    once launch/job.py end --code "$code" --max-failures "$MAX_FAILURES" "$run" || verdict=$?
  fi
  echo "run folder: $run"
  [ "$verdict" = 0 ] && [ "$code" = 0 ] || echo "to go on by hand: CONFIG=$CONFIG sbatch $script $*"
  [ "$verdict" = 75 ] || exit "$verdict"
  if [ "$(insist squeue --noheader --jobs="$job" --format=%T)" != RUNNING ]; then
    exit "$code"  # cancelled, or Slurm is starting it again already
  fi
  echo "job $job: asks Slurm to start it again"
  insist scontrol requeue "$job" || echo "job $job is not started again; the next job goes on from the last checkpoint"
}
