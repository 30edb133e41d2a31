# Every target makes its own environment in .venv; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A GPU machine takes torch's newest CUDA build, any other a tested version.
TORCH := $(if $(shell command -v nvidia-smi),torch,-r constraints-cpu.txt)

.PHONY: demo test test-all test-matrix lint docs clean

# PIPELINE=hunyuan_video_tiny, cogvideox_tiny or wan_tiny_lora: another of the small ones.
demo: .venv/installed
	$(BIN)/dit-sparse compare --method auto $(if $(findstring lora,$(PIPELINE)),,--steps 10) \
		--out demo $(if $(PIPELINE),--pipeline $(PIPELINE))

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2

test-all: .venv/installed-test
	$(BIN)/python -m pytest -n 2 -m "slow or not slow"

# Lowest and newest versions that pyproject.toml admits, each in an environment of its own.
test-matrix:
	$(PYTHON) tests/matrix.py

# Type checkers fail on the layout of the checkout, so mypy reads an installed copy.
lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build .venv/tree
	$(PIP) install --quiet --no-deps --target .venv/tree .
	cd .venv/tree && ../bin/mypy --config-file ../../pyproject.toml -p dit_sparse

# The documentation, into site/; a broken link or an option that no docstring explains is an error.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

clean:
	rm -rf site .venv .venv-matrix build demo *.egg-info

.venv/torch: constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) install $(TORCH)
	touch $@

.venv/installed: .venv/torch pyproject.toml
	$(PIP) install --editable ".[lora]"
	touch $@

.venv/installed-test: .venv/torch pyproject.toml
	$(PIP) install --editable ".[test,quantised]"
	touch $@ .venv/installed

.venv/installed-dev: .venv/torch pyproject.toml
	$(PIP) install --editable ".[dev]"
	touch $@ .venv/installed .venv/installed-test

.venv/installed-docs: .venv/torch pyproject.toml
	$(PIP) install --editable ".[docs]"
	touch $@ .venv/installed
