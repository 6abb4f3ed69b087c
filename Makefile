# Two commands for a fresh machine: `make demo` and `make test`. Each makes its own environment first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
COCO   ?=
OLD    ?= HEAD~1
NEW    ?= HEAD
TIER   ?= 1
OUT    ?= $(if $(COCO),demo-coco,demo)

.PHONY: help install test test-parallel lint demo golden freeze clean

help:
	@echo "make demo               toy COCO set -> shards -> stage 1 -> stage 2 -> evaluation -> merged weights -> report"
	@echo "make demo COCO=FOLDER   the same on an ordinary COCO tree (train2017/ val2017/ annotations/)"
	@echo "make test               style, types and the fast test suite"
	@echo "make test-parallel      all proofs over engines, ranks and checkpoints (slow)"
	@echo "make golden             write the golden losses again (after a deliberate change of maths)"
	@echo "make freeze OLD=COMMIT  what that commit and HEAD compute and write differently (TIER=2: and print, plan, evaluate)"
	@echo "make clean              remove the environment and the demo folder"

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

install: $(VENV)/installed

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-parallel: install
	$(BIN)/python -m pytest -n 0 -m "slow or not slow" tests/integration/test_engines.py \
		tests/integration/test_pipeline.py tests/integration/test_pipeline_train.py \
		tests/integration/test_checkpoint_matrix.py tests/integration/test_checkpoints.py tests/unit/test_checkpoint_faults.py \
		tests/integration/test_refusal.py tests/integration/test_unchanged.py tests/integration/test_overflow.py tests/integration/test_start.py \
		tests/integration/test_gathered.py \
		tests/integration/test_packed_engines.py tests/integration/test_few_bits.py \
		tests/integration/test_timm_engines.py tests/integration/test_tuning_runs.py

demo: install
	$(BIN)/python tools/demo.py --out $(OUT) $(if $(COCO),--coco "$(COCO)")

golden: install
	$(BIN)/python -m tests.golden.losses

freeze: install
	$(BIN)/python -m tests.freeze $(OLD) $(NEW) --tier $(TIER)

clean:
	rm -rf $(VENV) $(OUT)
