# Two commands matter to a newcomer: `make demo` and `make test`. Everything runs in .venv, made on first use.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest
# processes that share the tests out by file, in the order of the folders: xdist's own order, by the number of tests,
# keeps the few long ones with Ray for the end. Each starts its own Ray and S3 server where a test asks for one.
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow bench bench-reader check format lock clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@echo "creating $(VENV) (once: about two minutes and 2 GB)"
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or set PYTHON="; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[s3,hf,encode,peers,evaluate,finetune,dev]'
	@touch $@

env: $(READY) ## create .venv with the tested versions

demo: $(READY) ## encode real clips into latents on this machine, verify them, show what came out
	$(BIN)/python jobs/make_demo_data.py --output data/demo
	$(BIN)/latents encode configs/encode/demo.yaml
	$(BIN)/latents verify data/demo/latents --source
	$(BIN)/latents preview data/demo/latents --output data/demo/preview.png
	@echo
	@echo "data/demo/preview.png shows source frames over decoded latents."
	@echo "The latents are in data/demo/latents: shards/ to train on, index/ to find windows, README.md says what they are."
	@echo "Read them: the six lines in README.md. Your own clips: copy configs/encode/demo.yaml and change source.urls."
	@echo "Run the same again to see that nothing is left to do; delete a receipt and it encodes that shard anew."

test: $(READY) ## the tests (fast ones and the end-to-end ones)
	$(PYTEST) -m "not slow" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(READY) ## the long sweeps
	$(PYTEST) -m slow

bench: $(READY) ## speed and memory on this machine, side by side (half an hour; docs/benchmarks.md)
	$(BIN)/python jobs/bench_pipeline.py
	$(BIN)/python jobs/bench_decode.py
	$(BIN)/python jobs/bench_remote_decode.py
	$(BIN)/python jobs/bench_encode.py
	$(BIN)/python jobs/bench_memory.py
	$(BIN)/python jobs/measure_precision.py

bench-reader: $(READY) ## reading latents beside other libraries, from memory, disk and a store (docs/benchmarks.md)
	$(BIN)/python jobs/bench_reader.py

check: $(READY) ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY) ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(READY) ## write the versions now in .venv to constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean: ## remove .venv and demo data
	rm -rf $(VENV) data
