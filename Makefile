# Two commands from a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Two processes with one thread each: more threads a process only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: demo test test-full test-llama-cpp lint format audit

demo: $(INSTALLED)  ## fine-tune the embedded model, show answers before and after
	$(BIN)/myna demo

test: $(INSTALLED) lint  ## lint, types, tests
	$(PYTEST) -m "not full"

test-full: $(INSTALLED) lint  ## the long forms too
	$(PYTEST)

test-llama-cpp: $(INSTALLED)  ## exported files in llama.cpp itself, which is built from source (minutes)
	$(BIN)/python -m pip install --quiet llama-cpp-python
	$(BIN)/python -m pytest -q tests/export/test_llama_cpp.py

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
