# make demo, make test, make soak, make check: each from a fresh clone with nothing but Python 3.11+, make and pip.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test soak check clean

demo: .venv/.runtime
	$(BIN)/python -m orchestrator.search digits --train-fraction 0.25 --num-trials 30 --name $(DEMO)
	$(BIN)/python -m orchestrator.ensemble --experiment $(DEMO) --top-k 5

# One thread a test process; what Ray starts sets its own number. Files with Ray tests are the longest and go first.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest
test: check
	$(PYTEST) -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What takes minutes: kills at random moments, and the least that `ray up` has to do.
soak: .venv/.development
	$(PYTEST) -m soak

check: .venv/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv

.venv/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.development: .venv/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
