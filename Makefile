# make test    set up .venv, build, run the tests          make demo   train a tiny model, both ways
# make bench   measure against the peers that are there    make lint   what pre-commit runs
# make gpu     build and test for this machine's GPU       make clean
#
# TORCH: what pip installs as torch, for example TORCH="torch==2.6.0". PYTHON: the interpreter.
# FAMILY: one benchmark family. All set-up is done here and only once.

PYTHON ?= python3
TORCH ?= torch==2.13.0
FAMILY ?=
PYTEST_FLAGS ?= -q -n auto

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
# Set up anew when TORCH or PYTHON is another.
READY := $(STAMPS)/venv-$(shell printf '%s' '$(PYTHON) $(TORCH)' | cksum | cut -d' ' -f1)
SOURCES := $(wildcard csrc/*/* kernels/*.py python/finefuse/*.py python/finefuse/*/*.py) \
           CMakeLists.txt pyproject.toml
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DELETE_ON_ERROR:
.PHONY: test demo bench lint gpu clean

test: $(STAMPS)/build $(STAMPS)/test
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

demo: $(STAMPS)/build $(STAMPS)/demo
	$(BIN)/python examples/finetune.py $(ARGS)

bench: $(STAMPS)/build $(STAMPS)/bench
	$(BIN)/python -m benchmarks $(FAMILY) $(ARGS)

lint: $(STAMPS)/build $(STAMPS)/lint
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

gpu: export FINEFUSE_CUDA := ON
gpu: $(READY) $(STAMPS)/test
	@$(BIN)/python -c "import torch, sys; sys.exit(0 if torch.cuda.is_available() else \
	'make gpu: no GPU that this torch can use')"
	$(PIP) install -q --no-build-isolation --force-reinstall --no-deps -e .
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(VENV)
	find . -name __pycache__ -prune -exec rm -rf {} +

# A stamp is written last, so that an interrupted step is done again.
$(READY):
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -U "pip>=25.1" "scikit-build-core>=0.11" "pybind11>=3.0" "cmake>=3.28" ninja
	$(PIP) install -q $(TORCH) "numpy>=1.24"
	mkdir -p $(STAMPS) && rm -f $(STAMPS)/* && touch $@

$(STAMPS)/build: $(READY) $(SOURCES)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

$(STAMPS)/test $(STAMPS)/demo $(STAMPS)/bench $(STAMPS)/lint: $(READY) pyproject.toml
	$(PIP) install -q --group $(@F)
	touch $@
