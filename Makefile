# Everything runs in .venv, which is made anew when pyproject.toml changes or another
# interpreter is selected:  make run PYTHON=python3.12
PYTHON ?= python3
WORKERS ?= 2
RUN = generate --compare
PEER_OUT = benchmarks/results/tiny_model/peer.csv

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

# PYTHON's version and home (a word that names the stamp of its .venv), then its state.
PROBE := import sys, zlib; from importlib.util import find_spec; v = sys.version_info; \
  print("%d.%d.%d-%08x" % (v[0], v[1], v[2], zlib.crc32(sys.base_prefix.encode()))); \
  print("old" if v < (3, 11) else "ready" if find_spec("ensurepip") else "bare")
PROBED := $(shell $(PYTHON) -c '$(PROBE)' 2>/dev/null)
VERSION := $(firstword $(subst -, ,$(PROBED)))
VENV := .venv/made-$(firstword $(PROBED))

.PHONY: help run test lint figures golden peer test-gpu clean
help:
	@echo "make run       decode with the model that ships, speculatively and plainly"
	@echo "make test      run the tests"
	@echo "make lint      check style and types"
	@echo "make figures   make README's tables and figures from the runs in benchmarks/results"
	@echo "make golden    compute tests/golden anew with Hugging Face's code (installs torch)"
	@echo "make peer      time transformers and ds4jax on this CPU (installs torch)"
	@echo "make test-gpu  run the GPU's tests (installs CUDA)"
	@echo "make clean     remove .venv and .venv-peer"

run: .venv/run
	@$(BIN)/ds4jax $(RUN)

# In two parts, which conftest.py compiles differently.
test: .venv/test
	@$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal -m "not optimised"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal -m optimised

lint: .venv/test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright

figures: .venv/run
	@$(BIN)/python benchmarks/figures.py

golden: .venv/golden
	@$(BIN)/python tests/golden/make_golden.py

peer: .venv-peer/ready
	@JAX_PLATFORMS=cpu .venv-peer/bin/python benchmarks/peer.py --out=$(PEER_OUT)

test-gpu: .venv/cuda
	@JAX_PLATFORMS=cuda,cpu $(BIN)/python -m pytest -m gpu -o addopts=

clean:
	rm -rf .venv .venv-peer

$(VENV): pyproject.toml
	$(if $(VERSION),,$(error $(PYTHON) is not a working Python 3; select one with PYTHON=python3.12))
	$(if $(filter old,$(PROBED)),$(error ds4jax needs Python 3.11 or newer and $(PYTHON) is $(VERSION); select one with PYTHON=python3.12))
	$(if $(filter bare,$(PROBED)),$(error $(PYTHON) has no ensurepip and cannot make .venv; install python3-venv or select another with PYTHON=python3.12))
	@echo "Making .venv with Python $(VERSION)"
	@$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/run: extras = [plot]
.venv/test: extras = [test]
.venv/golden: extras = [test,golden]
.venv/cuda: extras = [test,cuda]
.venv/run .venv/test .venv/golden .venv/cuda: $(VENV)
	@echo "Installing ds4jax$(extras) and what it needs: a few minutes the first time"
	@$(PIP) install --editable '.$(extras)'
	@touch $@

# Apart from .venv: torch is large, and what is timed should not change with the tests.
.venv-peer/ready: pyproject.toml $(VENV)
	@echo "Installing ds4jax[golden], torch among it: many minutes the first time"
	@$(PYTHON) -m venv --clear .venv-peer
	@.venv-peer/bin/python -m pip --disable-pip-version-check -qq install \
	  --editable '.[golden]'
	@touch $@
