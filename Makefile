# The Python (3.11, 3.12 or 3.13) that .venv is made with; to change it later, `make clean` first.
PYTHON ?= python3
# Not ?=: shells and clusters use a variable of this name for other things.
ENV = SafetyAntRun
ALGO ?= marvel
ARGS ?=
# For sweep, diff and accept; empty means the scripts' own defaults (all). More options of a script: OPTIONS='--dry-run'
ENVS ?=
ALGOS ?=
SEEDS ?=
LIMITS ?=
RUNS ?=
STUDY ?=
LAUNCHER ?=
ADDRESS ?=
GPUS ?=
OPTIONS ?=
# Interpreters that `make bench` measures beside: torch with osrl-lib, crax-bench, safety-gymnasium as published
TORCH ?=
CRAX ?=
REFERENCE ?=
# Python 3.11, for `make setup-bullet` only
BULLET_PYTHON ?= python3.11

VENV := .venv
PY := $(VENV)/bin/python
# Written last, so a half-made .venv has no stamp and is rebuilt from scratch.
STAMP := $(VENV)/.complete

.DEFAULT_GOAL := help
.PHONY: help setup setup-bullet run sweep diff accept report bench check test test-all clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo "Example: make run ENV=$(ENV) ALGO=$(ALGO) ARGS='--help'   (these are the defaults, except ARGS, which is empty)"

setup: $(STAMP)  ## Create .venv with the locked dependencies; does nothing when it is up to date

# A complete .venv whose requirements changed is updated in place, so that programs running from it survive.
$(STAMP): requirements.txt requirements.lock $(wildcard envs/packaging/safety_gymnasium/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: name one with make PYTHON=..." >&2; exit 1; }
	test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt -c requirements.lock
	@touch $@

setup-bullet: .venv-bullet/.complete  ## Create .venv-bullet for the bullet/ tasks (optional; needs Python 3.11)

.venv-bullet/.complete: requirements-bullet.txt
	@$(BULLET_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "$(BULLET_PYTHON) is not Python 3.11: name one with make setup-bullet BULLET_PYTHON=..." >&2; exit 1; }
	$(BULLET_PYTHON) -m venv --clear .venv-bullet
	.venv-bullet/bin/python -m pip install --disable-pip-version-check --no-deps -r requirements-bullet.txt
	@touch $@

run: setup  ## Train: make run ENV=SafetyAntRun ALGO=marvel ARGS='...'
	$(PY) algos/$(ALGO).py --env $(ENV) $(ARGS)

WHERE = $(if $(RUNS),--runs $(RUNS)) $(if $(ENVS),--envs $(ENVS)) $(if $(ALGOS),--algos $(ALGOS))

sweep: setup  ## Run what runs/ lacks: make sweep ENVS='...' ALGOS='...' SEEDS=5 LIMITS=20 ARGS='...' STUDY=file OPTIONS=--dry-run
	$(PY) results/sweep.py $(if $(STUDY),@$(STUDY)) $(WHERE) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(LIMITS),--limits $(LIMITS)) \
		$(if $(ARGS),--args='$(subst ','\'',$(ARGS))') $(if $(LAUNCHER),--launcher $(LAUNCHER)) $(if $(ADDRESS),--address $(ADDRESS)) \
		$(if $(GPUS),--gpus $(GPUS)) $(OPTIONS)

diff: setup  ## Compare fresh runs with the committed results; fails if something is worse
	$(PY) results/diff.py $(WHERE) $(OPTIONS)

accept: setup  ## Move fresh runs into results/ and renew the report
	$(PY) results/diff.py --accept $(WHERE) $(OPTIONS)
	$(PY) results/report.py

report: setup  ## Write results/README.md and its figures from the CSVs
	$(PY) results/report.py

bench: setup  ## Measure speed beside others: make bench TORCH=python CRAX=python REFERENCE=python OPTIONS='--only cpq online floor'
	$(PY) results/speed/bench.py $(if $(TORCH),--torch $(TORCH)) $(if $(CRAX),--crax $(CRAX)) \
		$(if $(REFERENCE),--reference $(REFERENCE)) $(OPTIONS)

# XLA compiles on one core: two processes, each with whole files (their fixtures are runs that are made once)
PARALLEL = -n 2 --dist loadfile

check: setup  ## Check format, lint and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

test: check  ## Check, and run the tests, except those marked slow
	$(PY) -m pytest $(PARALLEL) -m "not slow"

test-all: check  ## Check, and run all tests
	$(PY) -m pytest $(PARALLEL)

clean:  ## Remove .venv, .venv-bullet and caches (not runs)
	rm -rf $(VENV) .venv-bullet .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
