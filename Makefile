# The commands behind each target stand in README.md; nothing here is needed to use the project.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -qq install
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help quickstart test test-full prove check clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: .venv/.installed ## set everything up, train a small Python-writing model, print what it writes
	$(BIN)/python train.py configs/quickstart.yaml
	@for line in 'def fibonacci(n):' 'class Stack:' 'def read(self, path):'; do \
	    printf '%s\n' "$$line" | $(BIN)/python sample.py runs/quickstart --max-tokens 90 --temperature 0.7 \
	        --repetition-penalty 1.05 --seed 2 && echo || exit; \
	done

test: .venv/.dev ## set everything up and run the tests (minutes)
	$(PYTEST) -m "not slow"

test-full: .venv/.dev ## the slow proofs too
	$(PYTEST)

prove: .venv/.dev ## try to break every promise of docs/reliability.md (about an hour); a table of what survived
	$(BIN)/python tests/prove.py

check: .venv/.dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## delete the environment; data sets and runs stay
	rm -rf .venv

# The stamps come last, so that whatever was interrupted is done again, a half-made environment included.
.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 2; }
	@echo "installing into .venv, once (torch is large)"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) -r requirements.txt
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.dev: .venv/.installed requirements-dev.txt
	@$(INSTALL) -r requirements-dev.txt
	@touch $@
