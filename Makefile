# Two commands for a stranger: `make train` and `make test`. Each does all of its own set-up, in .venv.
# ARGS adds flags: make train ARGS="--train-iters 300".

PYTHON ?= python3
# PyPI's build of torch is the CUDA one; where a CPU build of this version lies ready, pip takes that.
TORCH ?= torch==2.13.0
# All else comes in the versions of constraints.txt, or with CONSTRAINTS= in the newest.
CONSTRAINTS ?= constraints.txt
ARGS ?=
# Files of tests that run beside each other: most keep one core busy. With 0 all is one process, which --pdb needs.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STORE := data/python-library/tokens
# Without a GPU, say so to DeepSpeed, which else asks around and warns.
ON_CPU := $(if $(shell command -v nvidia-smi),,DS_ACCELERATOR=cpu)

SHARED_OUT := --numprocesses $(WORKERS) --dist loadfile

PIP_INSTALL := pip install --quiet --disable-pip-version-check
# The versions that fit the torch that is installed, in a file for pip.
USABLE := $(BIN)/.constraints
FIT = $(if $(CONSTRAINTS),--constraint $(USABLE))
write_usable = $(if $(CONSTRAINTS),$(BIN)/python tools/constraints.py usable > $(USABLE))

.PHONY: train test test-all test-slurm test-docker test-links check bench bench-gpu clean
.PHONY: constraints constraints-check

train: $(BIN)/.installed $(STORE).json
	$(ON_CPU) $(BIN)/deepspeed --log_level warning --num_gpus 2 pretrain_gpt.py \
		--config configs/tiny-cpu.yaml --context-parallel striped $(ARGS)

test: $(BIN)/.installed-dev
	$(BIN)/python -m pytest $(SHARED_OUT) $(ARGS)

test-all: $(BIN)/.installed-dev
	$(BIN)/python -m pytest $(SHARED_OUT) -m "not slurm and not docker and not links" --steps-of-pairs 20 $(ARGS)

# A SLURM of two nodes on this machine, for which it needs root.
test-slurm: $(BIN)/.installed-dev
	tests/slurm/install.sh
	PATH=$$PATH:/usr/sbin $(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

# Images built without an engine, on a base made here, for which it needs root.
test-docker: $(BIN)/.installed-dev
	tests/docker/install.sh
	PATH=$$PATH:/usr/sbin $(BIN)/python -m pytest -m docker tests/docker $(ARGS)

# Two network namespaces with a slow link between them, for which it needs root.
test-links: $(BIN)/.installed-dev
	tests/links/install.sh
	PATH=$$PATH:/usr/sbin $(BIN)/python -m pytest -m links tests/links $(ARGS)

check: $(BIN)/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports

# Write constraints.txt anew, with the newest versions that fit each other.
constraints:
	rm -rf $(VENV)-newest
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/$(PIP_INSTALL) "$(TORCH)"
	$(VENV)-newest/bin/$(PIP_INSTALL) --editable ".[dev]"
	$(VENV)-newest/bin/python tools/constraints.py write
	rm -rf $(VENV)-newest

# Whether constraints.txt has a line for everything that is installed, and that version is.
constraints-check: $(BIN)/.installed-dev
	$(BIN)/python tools/constraints.py check

bench: $(BIN)/.installed
	$(BIN)/python -m benchmarks.bench_attention --nproc 2 --seq-length 16384 $(ARGS)

# Needs no more than torch and Triton, which lie ready where there is a GPU.
bench-gpu:
	$(PYTHON) -m benchmarks.bench_gpu --minutes 6 --json bench-gpu.json $(ARGS)
	timeout 90 $(PYTHON) -m benchmarks.trace_overlap --json trace-overlap.json

clean:
	rm -rf $(VENV) data runs

$(STORE).json: | $(BIN)/.installed
	$(BIN)/python tools/prepare_data.py --python-library --output-prefix $(STORE)

$(BIN)/.venv:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and alone: asked for by another package it would come in its newest and largest build.
$(BIN)/.torch: | $(BIN)/.venv
	$(write_usable)
	$(BIN)/$(PIP_INSTALL) $(FIT) "$(TORCH)"
	@touch $@

$(BIN)/.installed: pyproject.toml constraints.txt | $(BIN)/.torch
	$(write_usable)
	$(BIN)/$(PIP_INSTALL) $(FIT) --editable .
	@touch $@

$(BIN)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/.torch
	$(write_usable)
	$(BIN)/$(PIP_INSTALL) $(FIT) --editable ".[dev]"
	@touch $@ $(BIN)/.installed
