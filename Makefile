# Two commands need nothing but Python 3.10+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Where `make gpu-check` leaves its tables and logs.
OUT ?= gpu-check
# Processes that tests run in, of one thread each.
JOBS ?= 2
# Pin torch and torchvision here if need be: make test TORCH="torch==2.14.1 torchvision==0.29.1"
TORCH ?=

BIN := $(VENV)/bin

.PHONY: demo test lint bench kernel-sheet gpu-check fuzz kills clean

demo: $(VENV)/.installed
	$(BIN)/fastdet demo --out runs/demo

# The second run interprets every Triton kernel on the CPU and compares it with the CPU implementation.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m kernel

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m pytest --benchmark-only

# Registers, spills and loads of every kernel, compiled for devices that need not be here.
kernel-sheet: $(VENV)/.installed
	$(BIN)/python -m tools.kernel_sheet

# Hostile arguments, drawn at random, for so long.
FUZZ_MINUTES ?= 60
fuzz: $(VENV)/.installed
	$(BIN)/python -m tools.fuzz --minutes $(FUZZ_MINUTES)

# Training runs that are killed at random moments and resumed, so often in all.
KILLS ?= 200
kills: $(VENV)/.installed
	KILLS=$(KILLS) $(BIN)/python -m pytest tests/hostile/test_run_folder.py -k killed_

# All that needs a GPU, in nine minutes at most, with an interpreter that has torch, triton and pytest: no network.
gpu-check:
	$(PYTHON) -m tools.gpu_check --out $(OUT)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
