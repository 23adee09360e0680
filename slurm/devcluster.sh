#!/usr/bin/env bash
# A real Slurm on this one machine, to try the scripts and to test them: slurmctld and N slurmd from Debian's packages
# (slurmctld slurmd slurm-client munge), as root or as an ordinary user.
#   slurm/devcluster.sh up N          start N nodes, or bring back those that are dead (2 CPUs and 4 pretended GPUs each)
#   eval "$(slurm/devcluster.sh env)" what a shell needs for sbatch, squeue and scontrol to speak to it
#   slurm/devcluster.sh status
#   slurm/devcluster.sh kill-node N   everything that runs on node N dies at once, as in a power cut
#   slurm/devcluster.sh down
# DEVCLUSTER_DIR: where its state lies (default: a folder of this user and this checkout below /tmp).
set -euo pipefail
shopt -s nullglob
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=${DEVCLUSTER_DIR:-/tmp/devcluster-$(id -u)-$(cksum <<<"$checkout" | cut -d ' ' -f 1)}
export SLURM_CONF=$dir/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

die() { echo "devcluster: $*" >&2; exit 1; }

# The processes of this cluster, or of one of its nodes: a daemon by the log file that it holds open (slurmstepd overwrites
# its environment, but inherits slurmd's log), the tasks of jobs by what Slurm tells them.
pids() {  # [name of a daemon or node]
  {
    find /proc/[0-9]*/fd -maxdepth 1 \( -lname "$dir/${1:-*}.log" -o -lname "$dir/slurmd.${1:-*}.log" \) 2>/dev/null
    grep -lzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null |
      xargs -r grep -lzxE "SLURMD_NODENAME=${1:-.*}" 2>/dev/null
  } | cut -d / -f 3 | sort -u || true  # processes come and go while we look
}

kill_all() {  # [node]: until none is left, since a dying step may have started one more process
  local found
  for _ in 1 2 3 4 5; do
    found=$(pids "$@")
    [ -n "$found" ] || return 0
    # shellcheck disable=SC2086
    kill -KILL $found 2>/dev/null || true
    sleep 0.1
  done
}

node() { echo "127.0.1.$1"; }  # names that resolve everywhere on this machine, so that ranks can meet on them
alive() { [ -n "$(pids "$1")" ]; }

# A run of free TCP ports below those that the system hands out: this checkout's own, or the next that is free.
free_ports() {  # how many
  local port=$((10000 + $(cksum <<<"$dir" | cut -d ' ' -f 1) % 9000)) first used
  used=$(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk '{ sub(/.*:/, "", $2); print $2 }' | sort -u)
  for ((first = port; first < port + 9000; first += $1)); do
    local free=1 i
    for ((i = first; i < first + $1; i++)); do
      ! grep -qix "$(printf '%04X' "$i")" <<<"$used" || { free=0; break; }
    done
    ((free)) && { echo "$first"; return; }
  done
  die "no $1 free ports"
}

configure() {  # number of nodes
  local port user
  port=$(free_ports $(($1 + 1)))
  user=$(id -un)
  mkdir -p "$dir/state" "$dir/spool"
  chmod 755 "$dir"
  printf 'Name=gpu File=/dev/%s\n' null zero full random > "$dir/gres.conf"  # any device will do
  cat > "$SLURM_CONF" <<EOF
# $1 nodes
ClusterName=dev
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=5
MessageTimeout=5
KillWait=30
CompleteWait=0
InactiveLimit=0
MinJobAge=3600
FirstJobId=$((port % 5000 + 1))
NodeName=127.0.1.[1-$1] NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1))-$((port + $1)) CPUs=2 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
EOF
}

up() {  # number of nodes
  [[ ${1-} =~ ^[1-9][0-9]?$ ]] || die "up needs the number of nodes, 1 to 99"
  local program i states
  ((${#dir} <= 55)) || die "DEVCLUSTER_DIR=$dir is longer than 55 characters, too long for the names of sockets below it"
  for program in munged slurmctld slurmd sinfo; do
    command -v "$program" >/dev/null || die "$program is not installed: apt-get install slurmctld slurmd slurm-client munge"
  done
  if ! alive slurmctld || [ "$(sed -n 1p "$SLURM_CONF" 2>/dev/null)" != "# $1 nodes" ]; then
    down
    configure "$1"
    (umask 077; head -c 1024 /dev/urandom > "$dir/munge.key")
    munged --force --socket="$dir/munge.sock" --key-file="$dir/munge.key" \
      --log-file="$dir/munged.log" --pid-file="$dir/munged.pid" --seed-file="$dir/munged.seed"
    slurmctld -c
  fi
  for ((i = 1; i <= $1; i++)); do
    alive "$(node "$i")" || slurmd -N "$(node "$i")"
  done
  for ((i = 0; i < 200; i++)); do
    states=$(sinfo --noheader --Node --partition=main --format=%T 2>/dev/null) || true
    [ "$(grep -cxE 'idle|mixed|allocated' <<<"$states")" != "$1" ] || { echo "$1 nodes are up: eval \"\$($0 env)\""; return; }
    sleep 0.1
  done
  die "the nodes did not come up: $(tail -n 3 "$dir"/*.log)"
}

down() {
  [ -d "$dir" ] || return 0
  kill_all
  rm -rf "$dir"
}

case ${1-} in
  up) up "${2-}" ;;
  down) down ;;
  env) [ -e "$SLURM_CONF" ] || die "is down"; echo "export SLURM_CONF='$SLURM_CONF' SLURM_TIME_FORMAT=standard" ;;
  status) alive slurmctld || { echo "down"; exit 1; }; sinfo --Node --long; squeue ;;
  kill-node) [ -e "$SLURM_CONF" ] || die "is down"; kill_all "$(node "${2:?kill-node needs a number}")" ;;
  *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
