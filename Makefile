# `make demo` and `make test` work from a bare clone; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= docs/figures
PYTEST_ARGS ?= -n 2
DEMO_ARGS ?=
MODELS_ARGS ?= --again

# `make gpu PY=python3` uses an interpreter that has everything already and makes no environment.
PY ?= $(VENV)/bin/python
ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/.ready
endif

# Nothing here needs a model hub: a look-up that slips in should fail at once and loudly.
export HF_HUB_OFFLINE = 1

.PHONY: help demo test lint types layers unit interpreter gpu needle-model figures models clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo     a tiny Qwen2.5-VL reads a video, dense and sparse (DEMO_ARGS="--video PATH" for another)'
	@echo 'make test     ruff, mypy, import-linter, tests on the CPU, kernels under the Triton interpreter'
	@echo 'make gpu      tests and benchmarks that need a CUDA device; figures go to OUT=$(OUT)'
	@echo 'make needle-model  train the model of the needle task from nothing (one GPU, minutes)'
	@echo 'make figures  put the tables of $(OUT) into README.md and docs/figures.md'
	@echo 'make models   every check of every model family, into docs/models.md (half an hour; MODELS_ARGS="--family NAME")'
	@echo 'make clean    remove the environment and every cache'
	@echo
	@echo 'Variables: PYTHON=$(PYTHON) (3.11 or later, makes the environment) VENV=$(VENV) TORCH=$(TORCH)'
	@echo 'PY=python3 runs in an environment of your own; PYTEST_ARGS="-x -k NAME" goes to pytest.'

demo: $(READY)
	@$(PY) -m mmcompile demo $(DEMO_ARGS)

test: lint types layers unit interpreter

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# mypy and import-linter walk folders, so they need the three floors laid out as one package.
# The folders themselves are named too: a file that is taken away must go from there as well.
$(VENV)/flat: $(READY) $(wildcard mmcompile/*.py mmcompile/*/*.py mmcompile/*/*/*.py passes/*.py kernels/*.py) mmcompile mmcompile/bench mmcompile/needle mmcompile/needle/training mmcompile/pattern_search mmcompile/pictures passes kernels pyproject.toml
	@rm -rf build $@
	@$(PY) -m pip install -q --no-deps --no-build-isolation --target $@ .
	@rm -rf build
	@touch $@

types: $(VENV)/flat
	cd $(VENV)/flat && $(abspath $(PY)) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

layers: $(VENV)/flat
	cd $(VENV)/flat && $(abspath $(dir $(PY)))/lint-imports --config $(CURDIR)/pyproject.toml --no-logo --no-cache

unit: $(READY)
	$(PY) -m pytest -m "not gpu and not interpreter" $(PYTEST_ARGS)

interpreter: $(READY)
	TRITON_INTERPRET=1 $(PY) -m pytest -m interpreter $(PYTEST_ARGS)

gpu: $(READY)
	$(PY) -m pytest -m gpu
	@mkdir -p $(OUT)
	$(PY) -m mmcompile bench kernels --out $(OUT)/kernels.json --plot $(OUT)/kernels.png
	$(PY) -m mmcompile bench kernels --device cpu --tokens 16384 --density 0.1 --dtype fp32,bf16 --repeats 3 \
		--table attention --out $(OUT)/kernels_cpu.json
	$(PY) -m mmcompile bench plan --out $(OUT)/plan.json --plot $(OUT)/plan.png
	$(PY) -m mmcompile bench prefill --out $(OUT)/prefill.json --plot $(OUT)/prefill.png
	$(PY) -m mmcompile bench prefill --tokens 32K,128K,256K,512K,1M --patterns paper --no-dense-form --repeats 1 \
		--out $(OUT)/prefill_million.json --plot $(OUT)/prefill_million.png
	@set -e; for file in $$(grep -l __main__ benchmarks/*.py); do \
		name=$$(basename $$file .py); \
		echo "$(PY) $$file --out $(OUT)/$$name.json"; \
		$(PY) $$file --out $(OUT)/$$name.json; \
	done

needle-model: $(READY)
	$(PY) -m mmcompile.needle.training --out examples/needle_model
	$(PY) -m mmcompile.needle.training.curve examples/needle_model/training.json

figures: $(READY)
	$(PY) docs/make_figures.py --figures $(OUT) README.md docs/figures.md

models: $(READY)
	$(PY) docs/make_models.py $(MODELS_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and pinned, so that no later step picks a build of its own.
$(VENV)/.ready: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'mmcompile needs Python 3.11 or later; name one with: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo 'Python has no venv here; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@echo 'Installing into $(VENV) (once; some minutes) ...'
	$(VENV)/bin/python -m pip install -q "setuptools>=77" wheel
	$(VENV)/bin/python -m pip install "$(TORCH)"
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e ".[test]"
	@touch $@
