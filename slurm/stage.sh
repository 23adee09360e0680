# The body of the sbatch scripts, each of which names its `recipe`. Slurm runs a copy of a script, so it asks the controller
# for the command it was submitted as. The `script` is the shortest beginning of it that ends in .sh and has this file in
# its folder, since folders and arguments may have .sh in them, too. A controller too busy to answer leaves it empty.
CONFIG=${CONFIG:-configs/$recipe.yaml}
script=${script:-$SLURM_SUBMIT_DIR/slurm/pretrain_moma.sh}  # any of them trains CONFIG
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
train "$@"
