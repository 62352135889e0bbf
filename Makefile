# `make train` and `make test` work in a fresh clone: each installs what it needs into .venv.
# ARGS adds flags: make train ARGS="--train-iters 300".

PYTHON ?= python3
# PyPI's build of torch is the CUDA one. If an index or folder configured for pip has a CPU build of
# this version, pip prefers that.
TORCH ?= torch==2.13.0
# All other packages have the versions of constraints.txt, or the newest ones with CONSTRAINTS=
CONSTRAINTS ?= constraints.txt
ARGS ?=
# Number of test files that run in parallel; most keep one core busy. 0 runs all in one process,
# which --pdb needs.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STORE := data/python-library/tokens
# `make train` starts a rank for each visible GPU, up to two; two on a CPU.
GPUS = $(shell tools/count_gpus.sh)
RANKS = $(if $(filter 1,$(GPUS)),1,2)
# Without this variable and a GPU, DeepSpeed searches for an accelerator and warns.
ON_CPU = $(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu)
# deepspeed ignores CUDA_VISIBLE_DEVICES where a number of GPUs is given; torchrun does not.
LAUNCHER = $(if $(and $(CUDA_VISIBLE_DEVICES),$(filter-out 0,$(GPUS))),torchrun \
	--nproc-per-node $(RANKS),deepspeed --log_level warning --num_gpus $(RANKS))

IN_PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# Without compiling all modules to bytecode, which Python does for those that it imports. It must be
# allowed to: otherwise each process compiles torch and DeepSpeed again, 4 to 5 s of CPU time.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := pip install --quiet --disable-pip-version-check --no-compile
# A file for pip with the constraints that fit the installed torch.
USABLE := $(BIN)/.constraints
FIT = $(if $(CONSTRAINTS),--constraint $(USABLE))
write_usable = $(if $(CONSTRAINTS),$(BIN)/python tools/constraints.py usable > $(USABLE))

# On a machine with a GPU these use PYTHON as it is, with its torch, and install nothing: such
# machines have no network. Each has its time limit and keeps what it has found in GPU_RESULTS.
GPU_RESULTS ?= gpu-results
# The files of tests/gpu run side by side where pytest-xdist is installed.
GPU_IN_PARALLEL = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && \
	echo "--numprocesses 4 --dist loadfile --no-loadscope-reorder")

.PHONY: train demo-needles test test-all test-slurm test-docker test-links test-flash4 check
.PHONY: bench clean test-gpu bench-gpu bench-step bench-profile tune-gpu
.PHONY: constraints constraints-check

train: $(BIN)/.installed $(STORE).json
	$(ON_CPU) $(BIN)/$(LAUNCHER) pretrain_gpt.py \
		--config configs/tiny-cpu.yaml --context-parallel striped $(ARGS)

# Trains a small model to retrieve, extends it to four times its length, and draws a heatmap of
# each in docs/; docs/guide/needles.md describes the recipe.
NEEDLES := runs/needles
NEEDLE_TEXTS := data/needles
LEARN = $(ON_CPU) $(BIN)/$(LAUNCHER) pretrain_gpt.py --config configs/needles.yaml
ASK = $(ON_CPU) $(BIN)/$(LAUNCHER) tools/evaluate.py needles --tasks single keys \
	--wording pair --haystack needles --needles 8 --dtype fp32

demo-needles: $(BIN)/.installed $(NEEDLE_TEXTS)/far.json
	rm -rf $(NEEDLES)
	$(LEARN) --data-path $(NEEDLE_TEXTS)/near --save $(NEEDLES)/near $(ARGS)
	$(ASK) --load $(NEEDLES)/near --lengths 128 256 512 1024 --output $(NEEDLES)/needles-1024.json
	$(LEARN) --data-path $(NEEDLE_TEXTS)/far --load $(NEEDLES)/near --finetune \
		--save $(NEEDLES)/far --seq-length 4096 --micro-batch-size 1 \
		--rope-scaling yarn --rope-scaling-factor 4 --train-iters 60 --lr 1.0e-3
	$(ASK) --load $(NEEDLES)/far --lengths 512 1024 2048 4096 --output $(NEEDLES)/needles-4096.json
	cp $(NEEDLES)/needles-1024.png $(NEEDLES)/needles-4096.png docs/

# Documents of up to 1,024 tokens, and of more, up to 4,096.
RETRIEVAL_DOCUMENTS = $(BIN)/python tools/make_retrieval_documents.py --new-share 0.15 \
	--haystack-share 0 --popularity-ratio 100
$(NEEDLE_TEXTS)/far.json: tools/make_retrieval_documents.py megatron_ring/data/retrieval.py \
		| $(BIN)/.installed
	$(RETRIEVAL_DOCUMENTS) --output $(NEEDLE_TEXTS)/near.jsonl --documents 8000 --lines 12 341
	$(RETRIEVAL_DOCUMENTS) --output $(NEEDLE_TEXTS)/far.jsonl --documents 300 --lines 341 1365 \
		--seed 2
	rm -f $(NEEDLE_TEXTS)/tokenizer.model
	$(BIN)/python tools/prepare_data.py --input $(NEEDLE_TEXTS)/near.jsonl --vocab-size 512 \
		--output-prefix $(NEEDLE_TEXTS)/near
	$(BIN)/python tools/prepare_data.py --input $(NEEDLE_TEXTS)/far.jsonl \
		--tokenizer-model $(NEEDLE_TEXTS)/tokenizer.model --output-prefix $(NEEDLE_TEXTS)/far

test: $(BIN)/.installed-dev
	$(BIN)/python -m pytest $(IN_PARALLEL) $(ARGS)

test-all: $(BIN)/.installed-dev
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slurm and not docker and not links and not flash4 and not gpu" \
		--steps-of-pairs 20 $(ARGS)

# Starts a SLURM cluster on this machine; needs root.
test-slurm: $(BIN)/.installed-dev
	tests/slurm/install.sh
	PATH=$$PATH:/usr/sbin $(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

# Builds the images without a container engine, on a base made here; needs root.
test-docker: $(BIN)/.installed-dev
	tests/docker/install.sh
	PATH=$$PATH:/usr/sbin $(BIN)/python -m pytest -m docker tests/docker $(ARGS)

# Creates two network namespaces with a slow link between them; needs root.
test-links: $(BIN)/.installed-dev
	tests/links/install.sh
	PATH=$$PATH:/usr/sbin $(BIN)/python -m pytest -m links tests/links $(ARGS)

# Compiles the kernels of flash-attn 4 for Hopper GPUs, in an environment of its own; no GPU needed.
test-flash4: $(BIN)/.torch
	$(write_usable)
	$(PYTHON) -m venv $(VENV)-flash4
	$(VENV)-flash4/bin/$(PIP_INSTALL) $(FIT) "$(TORCH)"
	$(VENV)-flash4/bin/$(PIP_INSTALL) $(FIT) --editable ".[dev,flash]"
	$(VENV)-flash4/bin/python -m pytest -m flash4 tests/kernels/attention/test_flash_4.py $(ARGS)

check: $(BIN)/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports

# Update constraints.txt to the newest versions that are compatible with each other.
constraints:
	rm -rf $(VENV)-newest
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/$(PIP_INSTALL) "$(TORCH)"
	$(VENV)-newest/bin/$(PIP_INSTALL) --editable ".[dev]"
	$(VENV)-newest/bin/python tools/constraints.py write
	rm -rf $(VENV)-newest

# Check that constraints.txt has a line for every installed package, with the installed version.
constraints-check: $(BIN)/.installed-dev
	$(BIN)/python tools/constraints.py check

bench: $(BIN)/.installed
	$(BIN)/python -m benchmarks.bench_attention --nproc 2 --seq-length 16384 $(ARGS)

# Needs torch, Triton, DeepSpeed and pytest; at most 4 minutes on one H100.
test-gpu:
	mkdir -p $(GPU_RESULTS)
	TRITON_INTERPRET=0 timeout --signal INT --kill-after 10 240 $(PYTHON) -m pytest -m gpu \
		tests/gpu -rs --durations 10 --junitxml $(GPU_RESULTS)/test-gpu.xml \
		$(GPU_IN_PARALLEL) $(ARGS)

# Needs torch and Triton; at most 3 minutes.
bench-gpu:
	status=0; \
	timeout 130 $(PYTHON) -m benchmarks.bench_gpu --ring-sizes 1 8 --packs 65536 --minutes 1.9 \
		--json $(GPU_RESULTS)/bench-gpu.json $(ARGS) || status=$$?; \
	timeout 45 $(PYTHON) -m benchmarks.trace_overlap \
		--json $(GPU_RESULTS)/trace-overlap.json || status=$$?; \
	exit $$status

# Needs torch, Triton and DeepSpeed; at most 3 minutes.
bench-step:
	timeout 180 $(PYTHON) -m benchmarks.bench_step --minutes 2.5 \
		--json $(GPU_RESULTS)/bench-step.json $(ARGS)

# Needs torch and Triton; at most 2 minutes.
bench-profile:
	timeout 120 $(PYTHON) -m benchmarks.bench_profile --json $(GPU_RESULTS)/bench-profile.json $(ARGS)

# Needs torch and Triton; at most 2 minutes for one head dim on 16 cores.
tune-gpu:
	timeout 120 $(PYTHON) -m benchmarks.tune_blocks --head-dims 128 --minutes 1.8 \
		--json $(GPU_RESULTS)/tune-blocks.json $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-flash4 data runs

$(STORE).json: | $(BIN)/.installed
	$(BIN)/python tools/prepare_data.py --python-library --output-prefix $(STORE)

$(BIN)/.venv:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch is installed first: as a dependency of another package pip would install its newest build.
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
