# Two environments, because the demo learns from the packages installed in its own: what tests need must
# not change its corpus. Both are made again when pyproject.toml or constraints.txt changes, and only then.

PYTHON ?= python3
DEMO_VENV := .venv
TEST_VENV := .venv-test
DEMO_EXTRAS := bm25,gguf,plots,tensorboard
TEST_EXTRAS := dev
PYTEST_ARGS ?= -n 2 --dist worksteal
DEMO_ARGS ?=
# Of transformers, besides that of constraints.txt: the first that works, and the newest that was tried.
RELEASES ?= 5.21.0 5.24.0

# Another project's modules must not be found before the installed ones.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help demo demo-pretrained test releases check format clean

help: ## show this list
	@echo "usage: make TARGET [PYTHON=python3.12]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 19

# Threads that spin while they wait would make it several times as slow on a machine that does something else too.
demo: $(DEMO_VENV)/.installed ## train with and without memory on installed source code, and compare, in ten minutes
	OMP_WAIT_POLICY=PASSIVE $(DEMO_VENV)/bin/memorizing demo $(DEMO_ARGS)

demo-pretrained: $(DEMO_VENV)/.installed ## let a small model that exists read source code, and quote it
	$(DEMO_VENV)/bin/memorizing demo --pretrained $(DEMO_ARGS)

# Two processes, each of which takes half of the files: what a file's tests share is made once.
# Threads that spin while they wait would take each other's time.
test: $(TEST_VENV)/.installed ## run the tests (PYTEST_ARGS="-k memory" runs some of them)
	OMP_WAIT_POLICY=PASSIVE $(TEST_VENV)/bin/python -m pytest $(PYTEST_ARGS)

releases: $(TEST_VENV)/.installed ## test all models with other releases of transformers
	@set -e; for release in $(RELEASES); do \
	  folder=build/transformers-$$release; echo "transformers $$release"; \
	  [ -d $$folder ] || $(TEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	    --no-deps --target $$folder transformers==$$release; \
	  PYTHONPATH=$$folder OMP_WAIT_POLICY=PASSIVE $(TEST_VENV)/bin/python -m pytest $(PYTEST_ARGS) \
	    tests/huggingface tests/serving tests/training/finetuning; \
	done

check: $(TEST_VENV)/.installed ## format, lint and types, nothing is changed
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/pyright --pythonpath $(TEST_VENV)/bin/python

format: $(TEST_VENV)/.installed ## format the code and mend what ruff can mend
	$(TEST_VENV)/bin/ruff format .
	$(TEST_VENV)/bin/ruff check --fix .

clean: ## remove environments, caches and builds; runs/ stays
	rm -rf $(DEMO_VENV) $(TEST_VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find src tests experiments examples -name __pycache__ -prune -exec rm -rf {} +

$(DEMO_VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(DEMO_VENV),$(DEMO_EXTRAS))

$(TEST_VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(TEST_VENV),$(TEST_EXTRAS))

# $(1) the environment, $(2) the extras. The stamp file is written last, so that what broke off is made again.
define install
	@found=$$($(PYTHON) --version 2>/dev/null) || found='not found'; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: PYTHON=$(PYTHON) is $$found; Python 3.11 or newer is needed:" \
	       "install it and name it, as in 'make $(MAKECMDGOALS) PYTHON=python3.12'" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: PYTHON=$(PYTHON) cannot make virtual environments;" \
	       "install its venv package (on Debian and Ubuntu: python3-venv)" >&2; exit 2; }
	@echo "Installing into $(1) (torch and transformers are large: some minutes) ..."
	@$(PYTHON) -m venv --clear $(1)
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[$(2)]'
	@touch $@
endef
