# The whole life of a checkout. `make` lists what there is. Needs GNU make, Python 3.11 or newer and a package registry.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := controller,lab,langgraph,openai-agents,strands,dev

# Arguments that people may give: make bench ARGS="--quick"; make demo AGENTS=500 ARGS="--keep"; make test PYTEST_ARGS="-k lease -x"
AGENTS      ?=
MINUTES     ?=
ARGS        ?=
PYTEST_ARGS ?=

# Two workers, also where there are more cores: whole labs take turns, and bounds in tests are set for two. -n 0 in PYTEST_ARGS: none.
# A test that runs into its timeout ends its worker, and pytest-xdist plays it again: not more than twice.
WORKERS := -n 2 --max-worker-restart 2

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

.PHONY: help setup audit demo test test-fast simulate faults soak fuzz model bench lint lock clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: $(STAMP) ## build .venv from requirements.lock (hashes are checked); instant when nothing changed

# uv is quick, and comes from the lock file like everything else. It does not read pip's configuration: where only pip knows the
# way to a registry, pip installs the same lock file.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -c 'import pip' 2>/dev/null || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@awk '/^[^ #]/ { wanted = /^uv==/ } wanted' requirements.lock > $(VENV)/uv.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.lock \
	    || echo "uv cannot be had here: going on with pip" >&2
	@{ test -x $(BIN)/uv \
	    && $(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock; } \
	    || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## three regions on this machine, a disaster, a promotion (AGENTS=N, ARGS="…")
	$(BIN)/drctl lab demo $(if $(AGENTS),--agents $(AGENTS)) $(ARGS)

audit: setup ## known vulnerabilities of what is locked; NOT AUDITED where no source is reached (ADVISORIES=FOLDER: a copy of one)
	@$(BIN)/python -m tests.audit $(if $(ADVISORIES),--advisories "$(ADVISORIES)")

lint: setup ## ruff, mypy and the layers
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint audit ## everything that a change has to pass (PYTEST_ARGS="…")
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

test-fast: setup ## the tests that need neither servers nor time
	$(BIN)/python -m pytest -q $(WORKERS) -m "not (etcd or aws or lab or slow)" $(PYTEST_ARGS)

simulate: setup ## random faults on whole groups, all promises checked (SEEDS=N, FAILOVERS=N, SEED=n for one, JOBS=n, ARGS="--mutants")
	$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),$(if $(SEEDS),--seeds $(SEEDS))) $(if $(FAILOVERS),--failovers $(FAILOVERS)) \
	    $(if $(MARATHON),--marathon) $(if $(JOBS),--jobs $(JOBS)) $(ARGS)

faults: setup ## real partitions, kills, full and frozen disks on a real group; needs root (ARGS="--list", "--only kill", "--failovers 1000 --groups 2")
	$(BIN)/python -m tests.faults $(ARGS)

soak: setup ## random faults on one group at work: memory and descriptors stay flat, checkers quiet; needs root (MINUTES=N)
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10) $(ARGS)

fuzz: setup ## bad input, thousands of examples each (PYTEST_ARGS="-k api")
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -q -o timeout=0 tests/fuzz $(PYTEST_ARGS)

bench: setup ## measure beside a peer and write tests/benchmarks/README.md, at most 25 minutes (ARGS="--quick")
	$(BIN)/python -m tests.benchmarks $(ARGS)

model: setup ## TLC checks the formal model and that every mutant of it is caught (ARGS="--deep"); needs Java 11 or newer
	$(BIN)/python tests/model/check.py $(ARGS)

lock: setup ## resolve requirements.lock anew from pyproject.toml
	@{ echo '# Every dependency of every extra, for every Python and platform that pyproject.toml allows, with hashes.'; \
	   echo '# Written by `make lock`; do not edit.'; \
	   $(BIN)/uv pip compile pyproject.toml --quiet --all-extras --universal --python-version 3.11 --upgrade --generate-hashes \
	       --no-header --no-annotate --no-emit-index-url --no-emit-find-links; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean: ## remove the environment and what tools leave behind
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
