# `make` lists the targets. The environment is .venv; `make env PYTHON=python3.12` chooses another Python for it.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?=
VENV_PYTHON := .venv/bin/python
# Marks a finished installation. It carries the directory, since an environment that was moved or copied still imports from the old one.
INSTALLED := .venv/installed-$(firstword $(shell pwd | cksum))
JOBS ?= 2

# The same programs are compiled again and again: what one process compiled, the next one reads.
export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0.2
PYTEST := $(VENV_PYTHON) -m pytest -n $(JOBS) --dist worksteal

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

.PHONY: env
env: $(INSTALLED) ## make the environment .venv, or bring it up to date
	@echo "env: .venv is ready ($$($(VENV_PYTHON) --version))"

# The stamp goes first and comes back last: an environment without one was interrupted and is made anew.
$(INSTALLED): pyproject.toml constraints.txt
	@if [[ -f $@ ]] && $(VENV_PYTHON) -c '' 2> /dev/null; then
	  echo "env: pyproject.toml or constraints.txt is newer than .venv: bringing it up to date"
	else
	  for python in $(or $(PYTHON),python3.11 python3); do
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then found=$$python; break; fi
	  done
	  if [[ -z "$${found:-}" ]]; then
	    echo "env: no Python 3.11 or newer among: $(or $(PYTHON),python3.11 python3). Install one, or name it: make env PYTHON=/path/to/python" >&2
	    exit 2
	  fi
	  if ! "$$found" -c 'import ensurepip, venv' 2> /dev/null; then
	    echo "env: $$found lacks the modules venv and ensurepip; install them (on Debian and Ubuntu: the package python3-venv)" >&2
	    exit 2
	  fi
	  echo "env: making .venv with $$found ($$("$$found" --version))"
	  "$$found" -m venv --clear .venv
	fi
	rm -f $@
	echo "env: installing ar_jax and its dependencies, at the versions of constraints.txt (minutes at the first time)"
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@
	echo "env: installed in $$SECONDS s"

.PHONY: demo
demo: env ## train the digits model, evaluate it and draw samples; a finished run is kept
	@echo "demo: training configs/digits.py into runs/digits"
	$(VENV_PYTHON) train.py --config=configs/digits.py --workdir=runs/digits
	echo "demo: trained after $$SECONDS s; evaluating"
	$(VENV_PYTHON) eval.py --workdir=runs/digits
	echo "demo: done in $$SECONDS s; metrics and pictures (samples.png) are in runs/digits/eval"

# The compiler for TPUs, with which the tests compile kernels for chips that are not here. It stays out of the environment:
# where libtpu is installed, JAX looks for a TPU at every start.
LIBTPU_VERSION := 0.0.52
LIBTPU := .cache/libtpu-$(LIBTPU_VERSION)
export AR_JAX_LIBTPU := $(CURDIR)/$(LIBTPU)/libtpu/libtpu.so

$(LIBTPU): | $(INSTALLED)
	@echo "test: installing the TPU's compiler into $(LIBTPU)"
	rm -rf $@.part
	if $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part libtpu==$(LIBTPU_VERSION); then
	  mv $@.part $@
	else
	  echo "test: there is none for this machine; tests that compile for TPUs will be skipped" >&2
	fi

.PHONY: test
test: env $(LIBTPU) ## run the tests, without the long ones
	@echo "test: running the tests on $(JOBS) processes (JOBS=n for more); compiled programs are kept in .cache/jax"
	$(PYTEST)

# The second flag: see `one_order` in ar_jax/training/mesh.py; programs that are read from a cache have forgotten it.
EIGHT_DEVICES := --xla_force_host_platform_device_count=8 --xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED

.PHONY: test-all
test-all: env $(LIBTPU) ## run all tests
	@echo "test-all: running all tests, the long ones too, on $(JOBS) processes; those of meshes on eight devices"
	$(PYTEST) -m '' --ignore=tests/training/test_parallel.py
	XLA_FLAGS="$(EIGHT_DEVICES)" $(PYTEST) -m '' tests/training/test_parallel.py

.PHONY: check
check: env ## check format, lint and types
	@echo "check: format"
	$(VENV_PYTHON) -m ruff format --check
	echo "check: lint"
	$(VENV_PYTHON) -m ruff check
	echo "check: types"
	$(VENV_PYTHON) -m mypy

.PHONY: docs
docs: env ## write the generated pages of docs/
	@echo "docs: writing docs/systems.md"
	$(VENV_PYTHON) -m ar_jax.systems --markdown > .venv/systems.md
	mv .venv/systems.md docs/systems.md
	echo "docs: drawing docs/orders.png"
	$(VENV_PYTHON) -m ar_jax.orders.draw docs/orders.png

.PHONY: clean
clean: ## remove the environment and all caches; runs are kept
	@echo "clean: removing .venv and all caches, keeping runs"
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build ar_jax.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each recipe is one bash script, so that a message can tell the seconds since its start.
.ONESHELL:
