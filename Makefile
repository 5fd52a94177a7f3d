# Every target sets up .venv by itself. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
# Tests at once.
JOBS ?= 2
# Slow files stand first; sorted by their number of tests they would come last, and one worker would idle.
SPREAD := -n $(JOBS) --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
VLLM_STAMP := $(VENV)/.vllm-ready
DEEPSPEED_STAMP := $(VENV)/.deepspeed-ready

BENCHMARKS := labeling_engine labeling_server labeling_scale labeling_budget labeling_attacks ppo preference_model dpo optimum ppo_defaults

.PHONY: setup setup-vllm demo smoke test test-fast bench lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml scripts/constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) sh scripts/setup.sh

setup-vllm: $(VLLM_STAMP)

$(VLLM_STAMP): $(STAMP) scripts/setup-vllm.sh
	VENV=$(VENV) sh scripts/setup-vllm.sh

$(DEEPSPEED_STAMP): $(STAMP) scripts/setup-deepspeed.sh
	VENV=$(VENV) sh scripts/setup-deepspeed.sh

demo: $(STAMP)
	$(BIN)/python -m rlaif.run experiment=demo

smoke: $(STAMP)
	$(BIN)/python -m rlaif.run experiment=smoke

test: $(VLLM_STAMP) $(DEEPSPEED_STAMP)
	$(BIN)/python -m pytest $(SPREAD)

test-fast: $(STAMP)
	$(BIN)/python -m pytest $(SPREAD) -m "not slow"

bench: $(VLLM_STAMP)
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
