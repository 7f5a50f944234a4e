# Everything runs in .venv, which `make setup` creates. GNU make ≥ 4.3, Python ≥ 3.11.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
PYTEST := $(PYTHON_IN_VENV) -m pytest
# A process for each core and a thread for each process: twice as fast on two cores as one process with two threads.
IN_PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n logical --maxprocesses 8 --dist worksteal

.PHONY: help setup demo demo-quick test test-all check format bench chaos docs wandb-merge gpu-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY) ## create .venv with the pinned packages (TORCH_INDEX=URL, PYTHON=python3.12)

$(READY): requirements.txt requirements-lock.txt setup.sh
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" ./setup.sh
	@touch $@

$(READY_DEV): $(READY) requirements-dev.txt
	@./setup.sh dev
	@touch $@

demo: $(READY) ## pretrain, distil and fine-tune on this machine in minutes, on one page (DATA=your file or folder)
	@$(PYTHON_IN_VENV) -m launch.commands.demo $(if $(DATA),path="$(DATA)")

demo-quick: $(READY) ## the same with tiny models in a minute (DATA=)
	@$(PYTHON_IN_VENV) -m launch.commands.demo quick=true $(if $(DATA),path="$(DATA)")

test: $(READY_DEV) ## the tests that run in minutes
	@$(IN_PARALLEL) -m "not slow and not chaos"

# Heavy tests are two at a time wherever they run, for many start several processes of their own; those of one file,
# which may share a SLURM or network names, one after another.
test-all: test ## also the slow tests, in an hour
	@OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile -m "slow and not chaos"

check: $(READY_DEV) ## lint, format, types, documentation, architecture
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(PYTHON_IN_VENV) -m docs.build_reference --check
	@$(PYTEST) tests/test_architecture.py

format: $(READY_DEV) ## let ruff rewrite what it can
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

bench: $(READY) ## speed and memory (NANOGPT=/path/to/nanoGPT and TRL_PYTHON=/path/to/python add these in the same run)
	@$(PYTHON_IN_VENV) -m benchmarks.benchmark_training_step $(if $(NANOGPT),--nanogpt "$(NANOGPT)")
	@$(PYTHON_IN_VENV) -m benchmarks.benchmark_distill $(if $(TRL_PYTHON),--trl-python "$(TRL_PYTHON)")
	@$(PYTHON_IN_VENV) -m benchmarks.benchmark_on_policy $(if $(TRL_PYTHON),--trl-python "$(TRL_PYTHON)")
	@$(PYTHON_IN_VENV) -m benchmarks.benchmark_ten_students
	@$(PYTHON_IN_VENV) -m benchmarks.benchmark_sweep_overhead
	@$(PYTHON_IN_VENV) -m benchmarks.benchmark_scaling
	@$(PYTHON_IN_VENV) -m benchmarks.benchmark_lm_head_loss
	@$(PYTHON_IN_VENV) -m benchmarks.benchmark_cpu_step
	@$(PYTHON_IN_VENV) -m benchmarks.benchmark_evaluation
	@$(PYTHON_IN_VENV) -m benchmarks.profile_step

chaos: $(READY_DEV) ## tests that kill processes and damage files, in an hour
	@OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile -m chaos

docs: $(READY_DEV) ## rewrite docs/reference.md from conf/, then build the site: build/site/index.html
	@$(PYTHON_IN_VENV) -m docs.build_reference
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	@echo "Open build/site/index.html"

wandb-merge: $(READY) ## one offline W&B run of a run that was killed and resumed (RUN=DIR), for wandb sync
	@$(PYTHON_IN_VENV) -m launch.commands.wandb_merge $(RUN)

gpu-check: $(READY) ## what a CPU cannot show; 12 minutes on one GPU, appends to benchmarks/RESULTS.md (NANOGPT=, TRL_PYTHON=)
	@$(PYTHON_IN_VENV) -m benchmarks.gpu_check $(if $(NANOGPT),--nanogpt "$(NANOGPT)") $(if $(TRL_PYTHON),--trl-python "$(TRL_PYTHON)")

clean: ## remove .venv and tool caches; runs, sweeps and prepared data stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
