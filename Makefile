# SPDX-License-Identifier: Apache-2.0
# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
#
# Python packages live in $(VENV), which is made once. Its stamps under $(VENV)/.fastbb hold what
# was installed and built, so a second run starts at once: packages are installed again when
# pyproject.toml asks for others, C++ is rebuilt when its files changed, Python is used in place.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
# CUDA kernels: on, off, or auto where there is a toolkit; for which compute capabilities (80;90).
FASTBB_CUDA ?= auto
FASTBB_CUDA_ARCHS ?=
export FASTBB_CUDA FASTBB_CUDA_ARCHS
# The lowest torch that a wheel must run on, in an environment of its own.
ABI_TORCH ?= torch==2.13.0
ABI_VENV ?= .venv-abi
# A CUDA compiler for tests, where the system has none, apart from what torch brings along.
CUDA_TOOLKIT := "nvidia-cuda-nvcc>=13" nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl nvidia-nvvm
CUDA_VENV ?= .venv-cuda
# More arguments for what demo, test and bench run.
ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/.fastbb
DEPS := $(STAMPS)/demo.txt
# One environment may serve several checkouts in turn; the stamp names the one it holds.
BUILT := $(STAMPS)/built$(subst /,-,$(CURDIR))-$(FASTBB_CUDA)-$(subst ;,-,$(FASTBB_CUDA_ARCHS))
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SIMT_FILES := $(shell find tools/simt tools/aarch64 -name '*.h' -o -name '*.cpp' -o -name '*.cuh')
CMAKE_FILES := CMakeLists.txt $(wildcard cmake/*.cmake)

# $(call logged,log,filter,command): runs the command, shows the lines of its output that the sed
# filter prints, keeps all of them in the log, and shows the log's end when the command fails.
logged = mkdir -p $(dir $1); \
	{ $3; } 2>&1 | tee $1 | sed -nE '$2' || { tail -n 60 $1; echo "failed; all output: $1"; exit 1; }
PIP_LINES := s/^ *Downloading ([^ ]+) \(([^)]+)\).*/   \1 (\2)/p; \
	s/^Installing collected packages: .*/   unpacking/p
BUILD_LINES := /^ *\[[0-9]+\/[0-9]+\]/p; /csrc\/.*warning:/p; s/^ *-- (torch|FASTBB|CUDA)/   \1/p

# $(call install,extra): what pyproject.toml lists for the extra, in one pip command. The stamp is
# the list itself: an edit of pyproject.toml that changes no requirement installs nothing.
define install
	@mkdir -p $(STAMPS)
	@$(BIN)/python tools/requirements.py $1 > $(STAMPS)/$1.new
	@if ! cmp -s $(STAMPS)/$1.new $(STAMPS)/$1.txt; then \
		echo ">> installing packages for '$1' into $(VENV)$2"; \
		$(call logged,$(STAMPS)/$1.log,$(PIP_LINES),\
			$(BIN)/python -m pip install --progress-bar off -r $(STAMPS)/$1.new); \
	fi
	@mv $(STAMPS)/$1.new $(STAMPS)/$1.txt
endef

.PHONY: help
help:  ## this list
	@echo "fastbb: make TARGET [PYTHON=python3.11] [VENV=/path/of/an/environment] [ARGS=...]"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

.PHONY: demo
demo: $(BUILT)  ## install, build, and run the main job: a backbone before and after, on photographs
	$(BIN)/fastbb demo $(ARGS)

.PHONY: test
test: $(BUILT) $(STAMPS)/test.txt  ## run all tests (ARGS="-k window" for some)
	$(BIN)/python -m pytest $(ARGS)

.PHONY: bench
bench: $(BUILT)  ## time attention layers against eager, SDPA and torch.compile
	$(BIN)/fastbb bench $(ARGS)

.PHONY: bench-results
bench-results: $(BUILT)  ## measure layers and whole models, rewrite bench/results (an hour)
	$(BIN)/python bench/bench_window_attention.py --modes forward,forward+backward
	$(BIN)/python bench/bench_models.py
	$(BIN)/python bench/bench_binary_linear.py
	$(BIN)/python bench/bench_binary_models.py
	$(BIN)/python bench/report.py

.PHONY: test-abi
test-abi: $(BUILT) $(ABI_VENV)/.fastbb/torch  ## one wheel, two torch releases, the same results
	$(BIN)/python tools/check_stable_abi.py $(BIN)/python $(ABI_VENV)/bin/python

.PHONY: cuda-toolkit
cuda-toolkit: $(CUDA_VENV)/.fastbb/toolkit  ## install a CUDA compiler; prints where, for NVCC=
	@ls $(CUDA_VENV)/lib/python3*/site-packages/nvidia/cu13/bin/nvcc

.PHONY: cuda-budgets
cuda-budgets: $(BUILT) $(STAMPS)/test.txt  ## rewrite what CUDA kernels may use (tests/cuda_budgets.json)
	FASTBB_REWRITE_BUDGETS=1 $(BIN)/python -m pytest -q tests/test_cuda_budgets.py

.PHONY: test-simt
test-simt: $(BUILT) $(STAMPS)/test.txt  ## CUDA sources as C++ on the host, many random samples
	FASTBB_SIMT_ROUNDS=60 $(BIN)/python -m pytest tests/test_*_simt.py $(ARGS)

.PHONY: build
build: $(BUILT)  ## install what is needed and build, nothing more

.PHONY: lint
lint: $(DEPS) $(STAMPS)/lint.txt  ## check style and types: ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES) $(SIMT_FILES)
	$(BIN)/mypy

.PHONY: format
format: $(STAMPS)/lint.txt  ## rewrite sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES) $(SIMT_FILES)

.PHONY: docs
docs: $(BUILT)  ## rewrite the generated tables of docs/backends.md
	$(BIN)/python tools/inventory.py --write

.PHONY: clean
clean:  ## remove build trees and caches, keep environments
	rm -rf build dist fastbb-demo fastbb-binary-minilm .pytest_cache .ruff_cache .mypy_cache .benchmarks
	rm -f $(STAMPS)/built*
	find python tests bench tools -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean  ## clean, and remove the environments made here
	rm -rf .venv .venv-abi .venv-cuda

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastbb needs Python 3.10 or newer, got $$($(PYTHON) --version); use make PYTHON=..."; exit 1; }
	@echo ">> making the environment $* with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $*

$(DEPS): pyproject.toml tools/requirements.py | $(BIN)/python
	$(call install,demo, (torch and its libraries take about 6 GB of disk the first time))

# After $(DEPS): torch, torchvision and timm are chosen together.
$(STAMPS)/test.txt: $(DEPS)
	$(call install,test)

$(STAMPS)/lint.txt: $(DEPS)
	$(call install,lint)

# The build tree is kept (build/<wheel tag>), so ninja compiles only what changed.
$(BUILT): $(CXX_FILES) $(CMAKE_FILES) pyproject.toml $(DEPS)
	@echo ">> building fastbb (FASTBB_CUDA=$(FASTBB_CUDA))"
	@$(call logged,$(STAMPS)/build.log,$(BUILD_LINES),\
		$(BIN)/python -m pip install -v --no-build-isolation --no-deps -e .)
	@rm -f $(STAMPS)/built*
	@touch $@

$(ABI_VENV)/.fastbb/torch: | $(ABI_VENV)/bin/python
	@echo ">> installing $(ABI_TORCH) into $(ABI_VENV)"
	@$(call logged,$(ABI_VENV)/.fastbb/pip.log,$(PIP_LINES),\
		$(ABI_VENV)/bin/python -m pip install --progress-bar off "$(ABI_TORCH)" numpy)
	@touch $@

$(CUDA_VENV)/.fastbb/toolkit: | $(CUDA_VENV)/bin/python
	@echo ">> installing a CUDA compiler into $(CUDA_VENV)"
	@$(call logged,$(CUDA_VENV)/.fastbb/pip.log,$(PIP_LINES),\
		$(CUDA_VENV)/bin/python -m pip install --progress-bar off $(CUDA_TOOLKIT))
	@touch $@
