# A Python that starts, preferably 3.11. A version manager's shim may be on the path but not run.
PYTHON ?= $(shell for python in python3.11 python3; do $$python -c "" 2>/dev/null && echo $$python && break; done)

PY := .venv/bin/python
INSTALLED := .venv/.installed
DATA := data/mini_lpr4m
DEMO := runs/demo
RECIPE := configs/mini_lpr4m.yaml

MODEL_CODE := $(wildcard modeling_rice/*.py processing_rice/*.py)
TRAINING_CODE := train_rice.py $(wildcard training_rice/*.py data_rice/*.py)
EVALUATION_CODE := eval_rice.py $(wildcard evaluation_rice/*.py evaluation_rice/*/*.py)
BENCHMARKS := $(sort $(wildcard benchmarks/*.py))

define PRINT_TABLE
import json; from hub_rice.tables import format_table; \
results = json.load(open("$(DEMO)/results.json")); print(format_table({**results["scores"], **results["baselines"]}))
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow attacks test-lowest style lint check bench clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python found: install Python 3.11 or pass PYTHON=/path/to/python3.11." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[test,all]'
	@touch $@

demo: $(DEMO)/results.json ## render the mini LPR4M, train on it, evaluate on unseen shops (finished steps are reused)
	$(if $(EVALUATED),,@$(PY) -c '$(PRINT_TABLE)')
	@echo "Results: $(DEMO)/results.json, $(DEMO)/rankings.jsonl, $(DEMO)/matches.png"

$(DATA)/mini_lpr4m.json: | $(INSTALLED)
	$(PY) -m data_rice.mini_lpr4m --output_dir $(DATA)

$(DEMO)/model/.trained: $(RECIPE) $(MODEL_CODE) $(TRAINING_CODE) $(DATA)/mini_lpr4m.json | $(INSTALLED)
	@if [ -f $@ ]; then rm -rf $(DEMO)/model; fi  # finished with older code or data; an interrupted run resumes instead
	$(PY) train_rice.py $(RECIPE) --output_dir $(DEMO)/model
	@touch $@

# The evaluation prints its own table, so `demo` prints the table only if no evaluation ran.
$(DEMO)/results.json: $(DEMO)/model/.trained $(EVALUATION_CODE)
	$(PY) eval_rice.py --model $(DEMO)/model --dataset mini_lpr4m --split test --output_dir $(DEMO)
	$(eval EVALUATED := yes)

# Tests of one file share its fixtures, so each file runs in one of the two processes.
test: $(INSTALLED) ## run the tests, offline, on two cores
	$(PY) -m pytest -n 2 --dist loadfile

test-slow: $(INSTALLED) ## run the long tests
	$(PY) -m pytest -m "slow and not gpu" --durations=10

attacks: $(INSTALLED) ## tests with kills, damaged files and full disks; counts for docs/reliability.md
	@mkdir -p runs
	RICE_ATTACK_COUNTS=runs/attacks.json $(PY) -m pytest -m "slow and not gpu" tests/attacks

test-lowest: ## test model, processing and Hub code with the lowest versions of setup.cfg (about 6 GB, temporary)
	PYTHON=$(PYTHON) .ci/test-lowest

style: $(INSTALLED) ## format the code and fix what the linter can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lint: $(INSTALLED) ## check style and format, change nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

check: lint test ## run the checks of continuous integration

bench: $(INSTALLED) ## run every script of benchmarks/ (one JSON line per row)
	@test -n "$(BENCHMARKS)" || { echo "benchmarks/ holds no script; see CONTRIBUTING.md on speed claims." >&2; exit 1; }
	@for script in $(BENCHMARKS); do $(PY) $$script || exit 1; done

clean: ## remove caches, the rendered mini LPR4M and the demo's results (not .venv, not other runs)
	rm -rf $(DATA) $(DEMO) .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
