# One word per chore. Every target installs what it needs first: `make demo` and `make test` work on a bare machine.
.PHONY: install demo test test-all check docs bench clean
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SHARED := -n 3 --dist loadfile --no-loadscope-reorder  # two of them wait for servers; which, tests/conftest.py says

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else "cacheloom needs Python 3.11 or 3.12, this is %d.%d: make PYTHON=python3.11" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/extras bitsandbytes
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/vocabularies mistral-common dashscope tiktoken pycountry
	touch $@

demo: install
	$(BIN)/cacheloom run examples/demo.toml

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED) -m 'not gpu and not all_cases'

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED) -m 'not gpu'

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/cog --check README.md docs/*.md

docs: install
	$(BIN)/cog -r README.md docs/*.md

bench: install
	$(BIN)/python -m bench

clean:
	rm -rf runs cache
