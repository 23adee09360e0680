# Two commands do everything on a fresh machine: `make train` and `make test`.
# Another Python, in an environment of its own: `make test-fast PYTHON=python3.12 VENV=.venv312` (README, "Versions").
PYTHON ?= python3.11
VENV := .venv
CONFIG ?= configs/moma_quickstart.yaml
ARGS ?=
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4
.DELETE_ON_ERROR:
# How a recipe starts here: ranks (RANKS=N sets them), GPUs, overrides (moe_dist/training/fit.py).
FIT = fit=$$($(BIN)/python -m moe_dist.training.fit $(1) $(RANKS)) && eval "$$fit" &&
# Without a GPU, glibc would give every large gradient back to the system and pay for its pages again at every step.
LAUNCH = MALLOC_MMAP_MAX_="$${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="$${MALLOC_TRIM_THRESHOLD_:-100000000000}" \
	PYTORCH_ALLOC_CONF="$${PYTORCH_ALLOC_CONF:-$${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}" \
	OMP_NUM_THREADS="$${OMP_NUM_THREADS:-$$(( ($$(nproc) + ranks - 1) / ranks ))}" \
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed $$placement
# Tests that compare layouts, and settings under which one machine computes with the kernels of others (docs/testing.md).
EXACT := tests/training/test_near_ties.py tests/training/test_exactness.py tests/training/test_any_layout.py \
	tests/training/test_recipes.py tests/training/test_lora_training.py tests/training/test_trainable.py tests/training/test_zero.py \
	tests/training/test_refused_steps.py tests/training/test_router_state.py tests/training/test_step_metrics.py \
	tests/checkpoint/test_checkpoint.py tests/checkpoint/test_init_from.py tests/losses/test_balance_layouts.py tests/losses/test_manifold.py tests/model/test_expert_parallel.py \
	tests/launch/test_train.py tests/launch/test_causal_run.py
PROCESSORS := plain avx2 scalar other-products two-threads
KERNELS_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
KERNELS_scalar := ATEN_CPU_CAPABILITY=default
KERNELS_other-products := MKL_CBWR=COMPATIBLE
KERNELS_two-threads := MOE_DIST_TEST_THREADS=2
.PHONY: train roma test test-fast test-long test-processors gpu-check $(PROCESSORS:%=test-on-%) lint setup data

train: data  ## pre-train the quickstart; `make train ARGS="train.steps=20 run.dir=runs/x"` passes overrides on
	$(call FIT,$(CONFIG)) $(LAUNCH) launch/train.py --config $(CONFIG) $$overrides $(ARGS)

roma: runs/roma_comparison.json  ## RoMA from SmolLM2 to the comparison with its control; a step that is done is skipped

test: setup  ## all tests; what is skipped is told with the reason (no Slurm here: docs/slurm.md)
	$(PYTEST) -rs

test-fast: setup  ## the working loop
	$(PYTEST) -m "not slow"

test-long: setup  ## kill -9 at many places of steps and saves, under all launchers; every repeated layout
	MOE_DIST_LONG=1 $(BIN)/python -m pytest tests/checkpoint/test_kills.py tests/launch/test_lost_rank.py \
		tests/core/test_fused.py tests/fuzz tests/benchmarks/test_moma_eta_gpu.py tests/harness/test_tasks.py $(EXACT)

test-processors: $(PROCESSORS:%=test-on-%)  ## the exactness tests with the kernels of other processors, and on two threads

$(PROCESSORS:%=test-on-%): test-on-%: setup
	$(KERNELS_$*) $(PYTEST) -rs $(EXACT)

gpu-check: setup  ## does it run, is it right and how fast, on this machine's GPU (docs/gpu.md); 300 s
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

lint: setup  ## the hooks of .pre-commit-config.yaml over all files
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell && $(BIN)/mypy && $(BIN)/python -m tests.support.prose

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade --quiet pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,report,corpora,mpi,models,eval]'
	touch $@

data: setup  ## what CONFIG needs first, as it says itself (`needs`): corpora, tokenizers, earlier stages
	@needs=$$($(BIN)/python -m moe_dist.config.prerequisites $(CONFIG)) && PATH="$(CURDIR)/$(BIN):$$PATH" sh -ecx "$$needs"

# RoMA (docs/roma.md): few questions to train on, so that the pipeline is short, and many to be examined in.
data/smollm2/config.json data/minilm/config.json: data/%/config.json: | setup
	$(BIN)/python launch/prepare_model.py model=$* out=data/$*

data/smollm2_checkpoint/manifest.json: | data/smollm2/config.json
	$(BIN)/python launch/convert.py import --format hf --from data/smollm2 --to data/smollm2_checkpoint

runs/roma_experts/.done: | setup
	$(MAKE) train CONFIG=configs/roma_experts.yaml ARGS=
	touch $@

runs/roma_neighbours/samples.safetensors: | runs/roma_experts/.done
	$(call FIT,configs/roma_experts.yaml) $(LAUNCH) launch/align.py collect configs/roma_quickstart.yaml

runs/roma_neighbours/neighbours.safetensors: | runs/roma_neighbours/samples.safetensors data/minilm/config.json
	$(BIN)/python launch/align.py neighbours configs/roma_quickstart.yaml data/minilm

runs/roma_quickstart/.done: | runs/roma_neighbours/neighbours.safetensors
	$(MAKE) train CONFIG=configs/roma_quickstart.yaml ARGS=
	touch $@

runs/roma_control/.done: | runs/roma_neighbours/neighbours.safetensors
	$(MAKE) train CONFIG=configs/roma_quickstart.yaml ARGS="losses.manifold.weight=0 run.dir=runs/roma_control"
	touch $@

runs/roma_comparison.json: | runs/roma_quickstart/.done runs/roma_control/.done
	$(call FIT,configs/roma_experts.yaml) $(LAUNCH) launch/multiple_choice.py runs/roma_experts runs/roma_control runs/roma_quickstart --out $@
