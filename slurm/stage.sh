# The body of the sbatch scripts, each of which names its `recipe`. Slurm runs a copy of a script, so it asks the controller
# for the `command` it was submitted as; a controller that is too busy to answer leaves it empty.
CONFIG=${CONFIG:-configs/$recipe.yaml}
command=${command:-$SLURM_SUBMIT_DIR/slurm/pretrain_moma.sh}  # any of them trains CONFIG
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
train "$@"
