# Two commands for a fresh machine: `make demo` and `make test`. Each makes its own environment first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
COCO   ?=
MODEL  ?=
MINUTES ?= 30
INPUTS ?= 50000
SEED   ?= 0
DEVICE ?= cuda
GPUS   ?= 1
OLD    ?= HEAD~1
NEW    ?= HEAD
TIER   ?= 1
OUT    ?= $(if $(COCO),demo-coco,demo$(if $(MODEL),-$(MODEL)))

.PHONY: docs fuzz full-size help install test test-parallel test-slow test-cluster reach lint demo gpu golden freeze clean

help:
	@echo "make demo               ImageNet weights and drawings -> both stages -> gained and lost in another style -> report"
	@echo "make demo MODEL=debug   the same way with a tiny random tower; COCO=FOLDER: on an ordinary COCO tree"
	@echo "make install            the environment alone, in .venv; enter it with: . .venv/bin/activate"
	@echo "make test               style, types and the fast test suite"
	@echo "make test-parallel      all proofs over engines, ranks and checkpoints (slow)"
	@echo "make test-slow          slow tests for MINUTES=30, in an order that the commit decides"
	@echo "make test-cluster       a real SLURM, pdsh over ssh and torchrun on two hosts in namespaces; says what is missing for it"
	@echo "make fuzz               INPUTS=50000 damaged files for every reader: a right result or a clear error, nothing else"
	@echo "make full-size          all 64 blocks of EVA-ViT-E on a CPU with 18 GiB free, from random weights to a merged tower"
	@echo "make docs               the pages as HTML in build/html; a link that leads nowhere is an error"
	@echo "make reach              size of the code and how far it is to the first loss, beside tests/house.json"
	@echo "make gpu                is a GPU right? GPUS=N: are N of them? DEVICE=cpu tries it out, OUT=FILE keeps the rows"
	@echo "make golden             write the golden losses again (after a deliberate change of maths)"
	@echo "make freeze OLD=COMMIT  what that commit and HEAD compute and write differently (TIER=2: and print, plan, evaluate)"
	@echo "make clean              remove the environment and the demo folder"

$(VENV)/installed: setup.py visft_ds/__init__.py
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
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-parallel: install
	$(BIN)/python -m pytest -n 0 -m "slow or not slow" tests/parallel tests/checkpoint \
		tests/train/test_pipeline.py tests/train/test_overflow.py tests/train/test_tuning.py

test-slow: install
	$(BIN)/python -m tests.slow --minutes $(MINUTES)

# With BIN=FOLDER that folder's python runs it as it is.
test-cluster: $(if $(filter file,$(origin BIN)),install)
	$(BIN)/python -m pytest -n 0 -m slow tests/cluster

fuzz: install
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS) --seed $(SEED)

full-size: install
	$(BIN)/python -m tests.full_size

docs: install
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/html

reach: install
	$(BIN)/python -m tests.house

demo: install
	$(BIN)/python tools/demo.py --out $(OUT) $(if $(COCO),--coco "$(COCO)") $(if $(MODEL),--model $(MODEL))

# With BIN=FOLDER that folder's python runs it as it is, and nothing is installed.
gpu: $(if $(filter file,$(origin BIN)),install)
	$(BIN)/python tools/gpu.py --device $(DEVICE) --gpus $(GPUS) $(if $(filter file,$(origin OUT)),,--out "$(OUT)") $(ARGS)

golden: install
	$(BIN)/python -m tests.golden.losses

freeze: install
	$(BIN)/python -m tests.freeze $(OLD) $(NEW) --tier $(TIER)

clean:
	rm -rf .venv demo demo-debug demo-coco build
