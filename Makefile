# Two commands for a fresh machine: `make demo` and `make test`. Each makes its own environment first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

MINUTES ?= 25
OUT    ?= demo
export DEVICE GPUS MODELS XML

.PHONY: help install demo test fast test-slow gpu docs lint clean

help:
	@echo "make install    the environment in .venv; activate it with: . .venv/bin/activate"
	@echo "make demo       ImageNet weights and drawings, both stages, an out-of-domain evaluation, a report"
	@echo "make test       style, types and the fast test suite"
	@echo "make test-slow  slow tests, at most MINUTES=25 minutes of them"
	@echo "make gpu        is a GPU right, how fast is it; GPUS=N: on N; DEVICE=cpu tries it out, XML=FILE: its rows"
	@echo "make docs       the pages as HTML in build/html, with all configuration keys and the Python reference"
	@echo "make lint       style and types alone"
	@echo "make clean      remove the environment and the demo folder"

$(VENV)/installed: pyproject.toml setup.py visft_ds/__init__.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/visft demo --out $(OUT)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Side by side: without its cache mypy alone takes forty seconds of one core.
test: install
	@$(MAKE) --jobs 2 --no-print-directory lint fast

# In the order of tests/conftest.py, not by the number of tests in a file.
fast: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow --timeout 900 --minutes $(MINUTES)

gpu: install
	@PYTHON=$(BIN)/python tools/gpu.sh $(ARGS)

docs: install
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/html

clean:
	rm -rf .venv demo build
