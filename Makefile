# The Python (3.11, 3.12 or 3.13) that .venv is made with; to change it later, `make clean` first.
PYTHON ?= python3
ENV ?= SafetyAntRun
ALGO ?= marvel
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# Written last, so a half-made .venv has no stamp and is rebuilt from scratch.
STAMP := $(VENV)/.complete

.DEFAULT_GOAL := help
.PHONY: help setup run test test-all clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "Example: make run ENV=$(ENV) ALGO=$(ALGO) ARGS='--help'   (these are the defaults, except ARGS, which is empty)"

setup: $(STAMP)  ## Create .venv with the locked dependencies; does nothing when it is up to date

# A complete .venv whose requirements changed is updated in place, so that programs running from it survive.
$(STAMP): requirements.txt requirements.lock $(wildcard envs/packaging/safety_gymnasium/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: name one with make PYTHON=..." >&2; exit 1; }
	test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt -c requirements.lock
	@touch $@

run: setup  ## Train: make run ENV=SafetyAntRun ALGO=marvel ARGS='...'
	$(PY) algos/$(ALGO).py --env $(ENV) $(ARGS)

test: setup  ## Run the tests, except those marked slow
	$(PY) -m pytest -m "not slow"

test-all: setup  ## Run all tests
	$(PY) -m pytest

clean:  ## Remove .venv and caches (not runs)
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
