# Everything runs in a virtual environment made here; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two test processes share the machine; more threads than cores only get in each other's way.
JOBS ?= 2

.PHONY: demo test study figures lint types pytest docs constraints clean

demo: $(VENV)/installed
	$(BIN)/vitprobe demo --out demo --force

# With SLOW, as in CI, the slow tests run too, and the site is built.
test: lint types pytest $(if $(SLOW),docs)

# Train, evaluate and compare the systems of analyses/fashion; SCHEDULE is gpu, cpu or short. What is
# done is left alone, so that it can be called again after it was stopped.
SCHEDULE ?= cpu
STAGES ?= train evaluate compare
study: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m analyses.fashion.study --schedule $(SCHEDULE) --stages $(STAGES)

# Draw all figures again from the committed results, and fill the tables of analyses/.
figures: $(VENV)/installed
	$(BIN)/python -m figures
	$(BIN)/python -m analyses.fashion.findings

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

# Tests marked slow run where SLOW is set, as in CI.
pytest: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) $(if $(SLOW),,-m "not slow")

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "vitprobe needs Python 3.11, 3.12 or 3.13; set PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[test]'
	touch $@

# The site, docs/_build/html: its notebooks run, and a warning is an error.
docs: $(VENV)/docs-installed
	rm -rf docs/_build/html
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -d docs/_build/doctrees docs docs/_build/html
	@echo docs/_build/html/index.html

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[docs]'
	touch $@

# Record the versions that the tests passed with.
constraints: $(VENV)/docs-installed
	$(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | grep -v '^uv==' > constraints.txt

clean:
	rm -rf $(VENV) demo docs/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
