# make test    set up .venv, build, run the tests          make demo   the whole story on a tiny model
# make bench   measure against the peers that are there    make lint   what pre-commit runs
# make docs    static pages of docs/ into out/docs         make clean
# make gpu     build, test, measure on this machine's GPU  make sanitize   its kernels' tests under compute-sanitizer
#
# TORCH: what pip installs as torch, for example TORCH="torch==2.6.0". PYTHON: the interpreter.
# FAMILY: one family (bench, gpu). All set-up is done here and only once, except for gpu, which takes
# GPU_PYTHON with the packages it has. FINEFUSE_CUDA: see README; without a GPU the tests have the CUDA
# kernels built as C++ (tests/cuda_on_cpu).

PYTHON ?= python3
GPU_PYTHON ?= python3
TORCH ?= torch==2.13.0
FAMILY ?=
PYTEST_FLAGS ?= -q -n auto

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
# Set up anew when TORCH or PYTHON is another.
READY := $(STAMPS)/venv-$(shell printf '%s' '$(PYTHON) $(TORCH)' | cksum | cut -d' ' -f1)
SOURCES := $(wildcard csrc/*/* tests/cuda_on_cpu/* kernels/*.py python/finefuse/*.py python/finefuse/*/*.py) \
           CMakeLists.txt pyproject.toml
export FINEFUSE_CUDA ?= $(if $(wildcard /dev/nvidia[0-9]*),AUTO,ON_CPU)
MACHINE_PATH := $(PATH)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DELETE_ON_ERROR:
.PHONY: test demo bench docs lint gpu sanitize clean

test: $(STAMPS)/build $(STAMPS)/test $(STAMPS)/test-torch
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

demo: $(STAMPS)/build $(STAMPS)/demo
	$(BIN)/python examples/finetune.py $(ARGS)

bench: $(STAMPS)/build $(STAMPS)/bench
	$(BIN)/python -m benchmarks $(FAMILY) $(ARGS)

docs: $(STAMPS)/build $(STAMPS)/docs
	$(BIN)/python -m sphinx -W --keep-going -q -d out/doctrees -c docs . out/docs

lint: $(STAMPS)/build $(STAMPS)/lint
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

# No set-up here: the machine's own Python, not .venv's, with what it has.
gpu sanitize: export PATH := $(MACHINE_PATH)
gpu: export PYTEST_FLAGS := $(PYTEST_FLAGS)
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py $(FAMILY)
sanitize:
	$(GPU_PYTHON) benchmarks/gpu.py --sanitize $(FAMILY)

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

$(STAMPS)/test $(STAMPS)/test-torch $(STAMPS)/demo $(STAMPS)/bench $(STAMPS)/docs $(STAMPS)/lint: $(READY) pyproject.toml
	$(PIP) install -q --group $(@F)
	touch $@
