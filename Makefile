# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3.11
RANKS ?= 2
CONFIG ?= configs/moma_quickstart.yaml
ARGS ?=
BIN := .venv/bin
.DELETE_ON_ERROR:
.PHONY: train test test-fast lint setup data

train: data  ## pre-train the quickstart; `make train ARGS="train.steps=20 run.dir=runs/x"` passes overrides on
	OMP_NUM_THREADS="$${OMP_NUM_THREADS:-$$(( ($$(nproc) + $(RANKS) - 1) / $(RANKS) ))}" \
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus $(RANKS) launch/train.py --config $(CONFIG) $(ARGS)

test: setup  ## all tests
	$(BIN)/python -m pytest

test-fast: setup  ## the working loop
	$(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff check . && $(BIN)/mypy

setup: .venv/.installed

.venv/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade --quiet pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

data: data/emoji/corpus.json data/tokenizers/.done  ## corpus, tokenizers

data/emoji/corpus.json: | setup
	$(BIN)/python launch/prepare_data.py corpus=emoji out=data/emoji

data/tokenizers/.done: | data/emoji/corpus.json
	$(BIN)/python launch/train_tokenizers.py shards=data/emoji out=data/tokenizers
	touch $@
