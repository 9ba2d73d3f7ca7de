# make demo, make test, make check: each from a fresh clone with nothing but Python 3.11+, make and pip.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test check clean

demo: .venv/.runtime
	$(BIN)/python -m orchestrator.search digits --train-fraction 0.25 --num-trials 30 --name $(DEMO)
	$(BIN)/python -m orchestrator.ensemble --experiment $(DEMO) --top-k 5

# Searches and trainings under Ray use the whole machine, one after the other; all other tests a core each.
test: check
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m 'not ray' -n auto --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest -m 'ray and not cluster'

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
