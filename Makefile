# `make` alone lists the targets. Each sets up .venv first, if pyproject.toml is newer than it; a second run installs nothing.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Two test processes with one thread each beat one process with two: the suite is many small operations.
WORKERS ?= 2
# The lowest versions that pyproject.toml allows. With pip's own index torch 2.11 comes with CUDA, 5 GB in all.
OLDEST ?= torch==2.11.0 transformers==5.17.0
# WikiText-2 in its raw form, for the tables of record.
TEST_TEXT ?=
TRAIN_TEXT ?=
# Source code in one file, which a basis of prose is evaluated on.
CODE ?=

VENV := .venv
OLDEST_VENV := .venv-oldest
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

# No test, demo or benchmark touches the network. OMP_WAIT_POLICY (the demo; tests set it themselves): waiting threads sleep,
# since on a busy machine spinning makes small operations sixty times slower.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oldest fuzz sanitize lint bench bench-cpu evidence test-gpu bench-gpu docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'loki-attention needs Python 3.11 or newer; $(PYTHON) is older or missing. Name another: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,plots]'
	@touch $@

demo: $(STAMP) ## calibrate the bundled model and ask it a question, dense and sparse side by side (no download)
	$(OFFLINE) OMP_WAIT_POLICY=PASSIVE $(BIN)/loki demo -o demo-output

test: $(STAMP) ## the default tests
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not fuzz" -n $(WORKERS)

test-all: $(STAMP) ## the slow tests, which `make test` leaves out, and those of test-oldest
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n $(WORKERS)
	$(MAKE) test-oldest

test-oldest: $(OLDEST_VENV)/.stamp ## the integration tests on the lowest supported versions of torch and transformers
	$(OFFLINE) OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/pytest -m "not slow" -n $(WORKERS) tests/integrations

$(OLDEST_VENV)/.stamp: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

fuzz: $(STAMP) ## thousands of random cases: cache operations, and steps of the native kernels (an hour)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest -m fuzz -n $(WORKERS)
	PYTHONPATH=tests $(BIN)/python tests/native_fuzz.py 10000

sanitize: $(STAMP) ## the native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (a few minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check cmake ninja nanobind
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DLOKI_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build build/sanitize
	$(OFFLINE) OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=tests \
		LOKI_SANITIZED=$(abspath build/sanitize) LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
		$(BIN)/python -m pytest -p sanitized tests/kernels -k native

lint: $(STAMP) ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

STUDIES ?= wikitext2,equal-bytes,tails,ablation,calibration

evidence: $(STAMP) ## the numbers of record: make evidence TEST_TEXT=wiki.test.raw TRAIN_TEXT=wiki.train.raw CODE=code.txt (hours; resumable)
	@test -f '$(TEST_TEXT)' -a -f '$(TRAIN_TEXT)' || \
		{ echo 'give WikiText-2 in raw form: make $@ TEST_TEXT=wiki.test.raw TRAIN_TEXT=wiki.train.raw' >&2; exit 1; }
	$(OFFLINE) OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/evidence.py --text '$(TEST_TEXT)' \
		--calibration-text '$(TRAIN_TEXT)' $(if $(CODE),--code '$(CODE)') --only $(STUDIES)
	$(BIN)/python benchmarks/tables.py

bench: ## of these the table by share of tokens: make bench TEST_TEXT=wiki.test.raw TRAIN_TEXT=wiki.train.raw (half an hour; resumable)
	$(MAKE) evidence STUDIES=wikitext2

bench-cpu: $(STAMP) ## the speed tables of record, on an otherwise idle machine (two hours; resumable)
	@set -e; for table in attention generate; do \
		$(OFFLINE) $(BIN)/python benchmarks/$$table.py -o benchmarks/results/cpu-$$table.json; done
	@set -e; for isa in avx2 portable; do \
		$(OFFLINE) LOKI_NATIVE_ISA=$$isa $(BIN)/loki bench attention --shapes 32/8/128 --lengths 8K,32K --batches 1 \
			--planes 32@4+64@2 -o benchmarks/results/cpu-attention-$$isa.json; done
	$(BIN)/python benchmarks/tables.py

# The Python at hand and nothing set up: a machine with a GPU may see no package index. PYTHON names another.
GPU_TESTS := tests/kernels/test_triton.py tests/kernels/test_triton_select.py tests/kernels/test_triton_dense.py \
	tests/kernels/test_triton_operators.py tests/kernels/test_triton_gpu.py tests/integrations/test_triton_backend.py tests/integrations/test_static_gpu.py

# Compiling takes most of the time: processes share it where pytest-xdist is installed. After LIMIT the run is interrupted, and
# still says what it found; REPORT=FILE.xml keeps that in a file.
GPU_WORKERS ?= 8
LIMIT ?= 0
REPORT ?=

test-gpu: ## the GPU kernels' tests on the GPU at hand: the matrix, graphs, 100 equal runs, compute-sanitizer
	$(PYTHON) benchmarks/gpu_ready.py tests
	PYTHONPATH=src:tests:examples$${PYTHONPATH:+:$$PYTHONPATH} TRITON_INTERPRET=0 $(OFFLINE) \
		timeout --foreground --signal=INT --kill-after=30 $(LIMIT) $(PYTHON) -m pytest -c /dev/null --rootdir=. \
		--import-mode=importlib -p no:cacheprovider -v -ra --durations=20 $(if $(REPORT),--junitxml='$(REPORT)') \
		$$($(PYTHON) -c 'import importlib.util as u; print(u.find_spec("xdist") and "-n $(GPU_WORKERS)" or "")') $(GPU_TESTS)

# What is measured, for how long, and where it is written: results are saved after every case.
GPU_ONLY ?= hardware,attention,generate
GPU_MINUTES ?= 7
GPU_RESULTS ?= benchmarks/results

bench-gpu: ## the GPU tables of record, on a GPU that nobody else uses (7 minutes and the last case; GPU_ONLY=generate)
	$(PYTHON) benchmarks/gpu_ready.py
	@export PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH}; status=0; \
		TRITON_INTERPRET=0 $(OFFLINE) $(PYTHON) benchmarks/gpu.py --only '$(GPU_ONLY)' --minutes $(GPU_MINUTES) \
		-o '$(GPU_RESULTS)' || status=$$?; \
		$(PYTHON) benchmarks/gpu_tables.py --results '$(GPU_RESULTS)' && exit $$status

docs: $(STAMP) ## run the examples and check the links of README.md, CONTRIBUTING.md and docs/
	$(OFFLINE) $(BIN)/pytest tests/test_docs.py

clean: ## remove .venv, caches and outputs
	rm -rf $(VENV) $(OLDEST_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist demo-output *.partial
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
