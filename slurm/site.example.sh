# Settings of your site: copy to slurm/site.sh, which git ignores. Every job reads it. What sbatch itself has to know is in
# SBATCH_* variables: `source slurm/site.sh` in your shell (or its start-up file) before you submit; options on sbatch's
# command line come before these, and these before the scripts' own.
export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my_account SBATCH_TIMELIMIT=24:00:00

MODULES='cuda/12.4 gcc/12'     # loaded before training; '' for none
VENV=$root/.venv               # a Python environment with the packages; $root is this repository

# Or a container (enroot/pyxis) with the packages, in which modules and VENV do not count. It sees this repository, and:
CONTAINER=                     # an image, as --container-image takes it
CONTAINER_MOUNTS=              # more of the machine: /data:/data,/scratch:/scratch

START=srun                     # one task a rank; or deepspeed: one task a node, which starts the node's ranks
MAX_FAILURES=3                 # a job gives up after so many failures in a row without a newer checkpoint

# Whatever the ranks' environment needs:
# export NCCL_SOCKET_IFNAME=ib0
# export PYTORCH_ALLOC_CONF=expandable_segments:False   # env.sh sets True where you set nothing
