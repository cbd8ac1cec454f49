# make generate PROMPT="a red apple"   pictures from the bundled model, in out/
# make test                            the quick tests
# make app                             a page in the browser that draws, edits and judges pictures
# make test-serve                      all tests of the service, with the clients, the browser and Ray that they need
# make docs                            the documentation, in build/docs/index.html
# Both make .venv when it is missing; a second call installs nothing. Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
PROMPT ?= a red apple
ARGS ?=
VENV := .venv
STAMP := $(VENV)/.installed
APP_STAMP := $(VENV)/.installed-app
SERVE_TESTS_STAMP := $(VENV)/.installed-serve-tests
RESULTS := $(addprefix results-,universality transformers scaling deep-shallow guidance fashion-mnist decoder inpainting cleaning student sbi latents condition depth noise)
LOCK_DATE := 2026-11-24T00:00:00Z

export PROMPT

.PHONY: generate app test test-all test-serve docs lint format lock clean $(RESULTS)
.DELETE_ON_ERROR:

generate: $(STAMP)
	@$(VENV)/bin/starflow generate "$$PROMPT" --num-images 4 --grid --output out $(ARGS)

app: $(APP_STAMP)
	@$(VENV)/bin/starflow app $(ARGS)

test: $(STAMP)
	@$(VENV)/bin/python -m pytest $(ARGS)

test-all: $(STAMP)
	@$(VENV)/bin/python -m pytest -m "not gpu" $(ARGS)

# Slow tests too. The page's tests need chromium (apt install chromium) and skip without it.
test-serve: $(SERVE_TESTS_STAMP)
	@$(VENV)/bin/python -m pytest -m "not gpu" tests/serve tests/deploy tests/cli/test_serve.py tests/benchmarks/test_serve_load.py $(ARGS)

# Offline. A warning is an error, and so is a name of ours that is not found (-n).
docs: $(STAMP)
	@$(VENV)/bin/python -m sphinx -W --keep-going -n -q -j auto -b html docs build/docs $(ARGS)
	@echo "open build/docs/index.html"

# The paper's claims on small models, from nothing; each resumes, and writes its section of docs/results.md.
# deep-shallow, guidance and fashion-mnist need Fashion-MNIST: apt install dataset-fashion-mnist, or ARGS="--data FOLDER".
# sbi needs sbi: .venv/bin/python -m pip install 'sbi>=0.27'.
# inpainting needs the glyphs (starflow prepare-data); decoder and cleaning need them and an autoencoder: TAESD from the hub, or ARGS="--autoencoder FOLDER".
# student needs the glyphs and a model that holds one (starflow train-student): ARGS="--model runs/glyphs-64-student/pipeline".
$(RESULTS): results-%: $(STAMP)
	@$(VENV)/bin/python -m experiments $* --document docs/results.md $(ARGS)

lint: $(STAMP)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(STAMP)
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

# The exit code says too old or too new (3), or that there is no such interpreter (127).
version_check = $(shell $(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else 3)' 2>/dev/null; echo $$?)
version_found = $(shell $(PYTHON) --version 2>&1 | head -n 1)

$(STAMP): requirements/lock.txt requirements/lock-data.txt pyproject.toml
	$(if $(filter 0,$(version_check)),,$(error '$(PYTHON)' is "$(version_found)", expected Python 3.11 to 3.13: name one, e.g. make PYTHON=python3.12))
	@echo "Installing into $(VENV), once (some minutes)."
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -r requirements/lock.txt
	@$(VENV)/bin/python -m pip install --no-deps -r requirements/lock-data.txt
	@$(VENV)/bin/python -m pip install --no-deps --no-build-isolation -e .
	@$(VENV)/bin/python -m starflow.sampling.cpu.build
	@touch $@

# The versions are exact, and gradio's bound on Pillow is older than the lock's Pillow: hence --no-deps.
$(APP_STAMP): $(STAMP) requirements/lock-app.txt
	@$(VENV)/bin/python -m pip install --no-deps -r requirements/lock-app.txt
	@touch $@

$(SERVE_TESTS_STAMP): $(APP_STAMP) requirements/lock-serve-tests.txt
	@$(VENV)/bin/python -m pip install --no-deps -r requirements/lock-serve-tests.txt
	@touch $@

# Needs uv (pip install uv). Pins already in the lock are kept: delete a line to renew it, after moving LOCK_DATE.
# What a CUDA build of torch adds (nvidia-*, cuda-*, triton) is left out: torch pins it itself, and a CPU build has none of it.
lock:
	@uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --fork-strategy fewest \
	    --exclude-newer $(LOCK_DATE) --constraint requirements/lock.txt --quiet --no-header --no-annotate \
	    --no-emit-package torch --output-file requirements/.lock.new
	@{ grep -E '^(#|torch==)' requirements/lock.txt; grep -vE '^(nvidia-|cuda-|triton)' requirements/.lock.new; } > requirements/.lock.whole
	@mv requirements/.lock.whole requirements/lock.txt; rm requirements/.lock.new

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache
