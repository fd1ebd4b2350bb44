# `make demo` and `make test` set up everything they need in a virtual environment inside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The oldest Triton that is supported, beside the pinned one.
VENV36 := .venv-3.6
# The oldest torch with its Triton. PyPI has it as a CUDA build alone, which runs on a CPU, too.
VENV_OLDEST := .venv-oldest
# What builds and checks wheel and sdist.
VENV_DIST := .venv-dist
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A worker that is done takes tests from the other one.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help demo test test-all test-everywhere test-oldest dist test-dist gate gate-3.6 gpu lint format doctor host-time bench bench-cpu memory memory-paper quality report tables clean

help:
	@echo "make demo         fine-tune MiniLM on movie reviews: LoRA, LoRA-FA in plain PyTorch, lorafa_kernels"
	@echo "make test         the test suite (CPU; Triton kernels in the interpreter and through the compiler)"
	@echo "make test-all     all of it (make test leaves out what takes minutes; not the whole gate, which is make gate)"
	@echo "make test-everywhere  the tests of values: 1 and 2 threads, random order, other instruction sets (ARGS=--help)"
	@echo "make test-oldest  the same on the oldest torch and Triton that are supported (downloads 3 GB)"
	@echo "make dist         wheel and sdist in dist/, checked by twine"
	@echo "make test-dist    installs the wheel into fresh environments away from the checkout, and tries it there"
	@echo "make gate         compile every kernel config for seven GPU architectures, launch every plan into a stub driver"
	@echo "make gate-3.6     both on Triton 3.6.0, of most kernels for Hopper"
	@echo "make gpu          a first call on a GPU, in stages, within nine minutes, on the machine's own Python"
	@echo "make bench        a quick benchmark on the CPU against PyTorch and PEFT, and a report"
	@echo "make bench-cpu    the CPU numbers of docs/results.md, measured again (minutes; an idle machine)"
	@echo "make host-time    what a call costs the host, beside a stub driver (docs/performance.md)"
	@echo "make memory-paper the paper's models in the memory planner"
	@echo "make memory       the tables of docs/memory.md, measured again (minutes; torch.compile on a CPU)"
	@echo "make quality      the accuracy study: runs that are missing (hours; may be stopped), then docs/quality.md"
	@echo "make report       docs/performance.md and its plots from bench/results"
	@echo "make tables       fill the tables of README and docs/ from the committed result files"
	@echo "make doctor       versions, chosen implementation, self-check"
	@echo "make lint         ruff; make format applies it"

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt "torch==2.13.0" "triton==3.7.1"
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt "torch==2.13.0"
	$(PIP) install --quiet -c constraints.txt -e ".[demo]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m examples.finetune_minilm

test: $(VENV)/.dev
	$(MAKE) -C csrc_reference
	$(PYTEST) -m "not slow and not gate_all"

test-all: $(VENV)/.dev
	$(MAKE) -C csrc_reference
	$(PYTEST) -m "not gate_all"

# One of them again: make test-everywhere ARGS="--only two-threads".
test-everywhere: $(VENV)/.dev
	$(MAKE) -C csrc_reference
	$(BIN)/python tests/everywhere.py $(ARGS)

$(VENV_OLDEST)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_OLDEST)
	grep -vE '^(torch|triton|setuptools)==' constraints.txt > $(VENV_OLDEST)/constraints.txt
	$(VENV_OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet -c $(VENV_OLDEST)/constraints.txt "torch==2.11.0" "triton==3.6.0" -e ".[dev]"
	@touch $@

# Without the gate, which has a command of its own, and the demo's package.
test-oldest: $(VENV_OLDEST)/.dev
	$(MAKE) -C csrc_reference
	$(VENV_OLDEST)/bin/python -m pytest -n 2 -m "not gate and not gate_all"

$(VENV_DIST)/.created: Makefile
	$(PYTHON) -m venv $(VENV_DIST)
	$(VENV_DIST)/bin/python -m pip --disable-pip-version-check install --quiet "build==1.6.1" "twine==7.0.0"
	@touch $@

dist: $(VENV_DIST)/.created
	rm -rf dist build
	$(VENV_DIST)/bin/python -m build
	$(VENV_DIST)/bin/python -m twine check --strict dist/*

# First with what the package requires, then with Triton and its interpreter.
test-dist: dist
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && set -ex && \
	$(PYTHON) -m venv "$$folder/env" && cd "$$folder" && unset PYTHONPATH && \
	pip="env/bin/python -m pip --disable-pip-version-check install --quiet -c $(CURDIR)/constraints.txt" && \
	wheel=$$(echo $(CURDIR)/dist/*.whl) && $$pip "torch==2.13.0" && \
	for extra in "" "[interpreter]"; do \
		$$pip "lorafa-kernels$$extra @ file://$$wheel" && env/bin/python -m pip check && \
		env/bin/python -I $(CURDIR)/tests/installed.py "$$folder/env" && \
		env/bin/lorafa-kernels --version && env/bin/lorafa-kernels doctor --device cpu; \
	done

gate: $(VENV)/.dev
	$(BIN)/python -m bench.gate --kernel shrink expand grad gated --out bench/results/compile-gate.json
	$(BIN)/python -m bench.gate --kernel group --out bench/results/compile-gate-groups.json
	$(BIN)/python -m bench.gate --kernel ws --arch sm_90 --out bench/results/compile-gate-ws.json
	$(BIN)/python -m bench.gate --kernel mixed --arch sm_80 sm_90 sm_100 gfx942 --out bench/results/compile-gate-mixed.json
	$(BIN)/python -m bench.gate --kernel dequantise --out bench/results/compile-gate-quantised.json
	$(BIN)/python -m bench.gate --kernel codes --out bench/results/compile-gate-codes.json
	$(BIN)/python -m bench.launch_gate --out bench/results/launch-gate.json
	$(BIN)/python -m bench.launch_gate --ws --out bench/results/launch-gate-ws.json
	$(BIN)/python -m bench.launch_gate --mixed --out bench/results/launch-gate-mixed.json
	$(BIN)/python -m bench.launch_gate --codes --out bench/results/launch-gate-codes.json

$(VENV36)/.gate: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV36)
	$(VENV36)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt "torch==2.13.0" rich "safetensors[numpy]" transformers
	$(VENV36)/bin/python -m pip --disable-pip-version-check install --quiet "triton==3.6.0" "numpy<2.4"
	@touch $@

gate-3.6: $(VENV36)/.gate
	$(VENV36)/bin/python -m bench.gate --arch sm_90 --out bench/results/compile-gate-triton-3.6.json
	$(VENV36)/bin/python -m bench.gate --kernel ws --arch sm_90 --out bench/results/compile-gate-ws-triton-3.6.json
	$(VENV36)/bin/python -m bench.gate --kernel mixed --arch sm_80 sm_90 sm_100 gfx942 --out bench/results/compile-gate-mixed-triton-3.6.json
	$(VENV36)/bin/python -m bench.gate --kernel codes --out bench/results/compile-gate-codes-triton-3.6.json
	$(VENV36)/bin/python -m bench.launch_gate --arch sm_90 --out bench/results/launch-gate-triton-3.6.json
	$(VENV36)/bin/python -m bench.launch_gate --mixed --out bench/results/launch-gate-mixed-triton-3.6.json
	$(VENV36)/bin/python -m bench.launch_gate --codes --out bench/results/launch-gate-codes-triton-3.6.json
	$(VENV36)/bin/python -m bench.launch_gate --ws --out bench/results/launch-gate-ws-triton-3.6.json

# Not in .venv: whatever torch and Triton the machine with the GPU has. docs/benchmarks.md has the stages.
gpu:
	$(PYTHON) -m bench.gpu

host-time: $(VENV)/.dev
	$(BIN)/python -m bench.host_time --out bench/results/host-time.json --before bench/results/host-time.json

bench: $(VENV)/.dev
	$(BIN)/python -m bench quick

bench-cpu: $(VENV)/.dev
	$(BIN)/python -m bench run --grid cpu --kinds ceilings time host block-time memory block training --device cpu --fresh

memory: $(VENV)/.dev
	$(BIN)/python -m bench run --kinds family --device cpu --fresh --out bench/results/cpu/memory.jsonl
	$(BIN)/python -m bench.tables

quality: $(VENV)/.dev $(VENV)/.demo
	OMP_NUM_THREADS=1 $(BIN)/python -m bench quality
	$(BIN)/python -m bench quality --report

memory-paper: $(VENV)/.dev
	$(BIN)/python -m bench.memory_paper
	$(BIN)/python -m bench.tables

report: $(VENV)/.dev
	$(BIN)/python -m bench report

tables: $(VENV)/.dev
	$(BIN)/python -m bench.tables

doctor: $(VENV)/.dev
	$(BIN)/python -m lorafa_kernels doctor

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV36) $(VENV_OLDEST) $(VENV_DIST) build dist .demo
	$(MAKE) -C csrc_reference clean
