# Two commands from a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-full lint format audit

demo: $(INSTALLED)  ## fine-tune the embedded model, show answers before and after
	$(BIN)/myna demo

test: $(INSTALLED) lint  ## lint, types, tests
	$(BIN)/python -m pytest -q -m "not full"

test-full: $(INSTALLED) lint  ## the long forms too
	$(BIN)/python -m pytest -q

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit:  ## look the pinned dependencies up in the advisory databases (needs the network)
	$(PYTHON) tools/audit.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(INSTALLED)
