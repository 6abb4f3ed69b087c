# Two commands for a fresh machine: `make demo` and `make test`. Each makes its own environment first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

MINUTES ?= 25
DEVICE ?= cuda
MODEL  ?= $(if $(filter cpu,$(DEVICE)),debug,eva_e)
GPUS   ?= 1
OUT    ?= demo

.PHONY: help install demo test test-slow gpu docs lint clean

help:
	@echo "make install    the environment in .venv; activate it with: . .venv/bin/activate"
	@echo "make demo       ImageNet weights and drawings, both stages, an out-of-domain evaluation, a report"
	@echo "make test       style, types and the fast test suite"
	@echo "make test-slow  slow tests, at most MINUTES=25 minutes of them"
	@echo "make gpu        is a GPU right, how fast is it; GPUS=N: on N; DEVICE=cpu tries it out, OUT=FILE: rows as XML"
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

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow --timeout 900 --minutes $(MINUTES)

# With BIN=FOLDER that folder's python runs it as it is, and nothing is installed.
gpu: $(if $(filter file,$(origin BIN)),install)
	@status=0; VISFT_DEVICE=$(DEVICE) VISFT_GPUS=$(GPUS) $(BIN)/python -m pytest -n 1 -m gpu --timeout 900 tests/gpu \
	  $(if $(filter file,$(origin OUT)),,--junit-xml "$(OUT)") $(ARGS) || status=1; \
	for how in "--stage 1" "--stage 2" "--stage 2 --engine zero3"; do \
	  echo "visft profile --synthetic --model $(MODEL) $$how"; \
	  DS_ACCELERATOR=$(DEVICE) $(BIN)/python -m visft_ds profile --synthetic --model $(MODEL) --steps 3 $$how || status=1; \
	done; exit $$status

docs: install
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/html

clean:
	rm -rf .venv demo build
