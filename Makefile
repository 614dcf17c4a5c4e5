# Everything runs in .venv, which `make setup` fills; every other target asks for it first.
# All paths are relative to this folder, so the path to it may contain spaces.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
UNFINISHED := $(VENV)/.unfinished

# Names to look for, the user's default first. `make setup PYTHON=/path/to/python` overrides them.
PYTHON ?=
CANDIDATES := python3 python3.13 python3.12 python3.11 python
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# Only what the demo, the study and the benchmark write: data/ and runs/ also hold the user's own work.
MADE_HERE := data/mini data/autolora_demo runs/mini_demo* results/mini_demo* results/mini_study results/autolora_demo

# Another environment's settings would leak its packages in here, or send ours elsewhere; and without bytecode
# every process would compile torch anew, in seven seconds.
unexport VIRTUAL_ENV CONDA_PREFIX PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX
unexport PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test torture wheel-test demo autolora-demo results bench docs learn2learn clean distclean always

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## install everything into .venv (PYTHON=/path/to/python chooses the interpreter)
	@echo "setup: .venv is ready ($$($(PY) --version))"

test: $(STAMP) ## ruff, pyright, then the test suite
	@$(PY) -m ruff check .
	@$(PY) -m pyright
	@$(PY) -m tools.install_learn2learn || echo "learn2learn could not be built here: its tests are skipped"
	@$(PY) -m pytest tests -q -n 2 --dist loadfile

# Kills of each program, and damages of each kind of file.
KILLS := 50
FUZZ := 1000

torture: $(STAMP) ## kill the programs and damage files at random (KILLS=5 FUZZ=50 for a short try)
	$(PY) tests/torture.py --kills $(KILLS) --fuzz $(FUZZ)

wheel-test: $(STAMP) ## build the wheel and use it in an environment of its own (PYTHON: which interpreter)
	$(PY) -m tools.try_wheel $(if $(PYTHON),--python "$(PYTHON)")

demo: $(STAMP) ## make small data sets, meta-train on them, evaluate
	@echo "demo: data sets, training, evaluation; about eight minutes on one core"
	$(PY) -m meta_dataset_readers.mini --out data/mini
	$(PY) main.py @recipes/mini_demo.args
	@rm -rf results/mini_demo*  # of another pool they would not be continued
	$(PY) test_meta_dataset.py @recipes/mini_demo_test.args
	$(PY) test_meta_dataset.py @recipes/mini_demo_pool.args
	$(PY) -m amt report results/mini_demo results/mini_demo_pretrained --out results/mini_demo.html

autolora-demo: $(STAMP) ## fine-tune a small ResNet by AutoLoRa and what it is compared with
	@echo "autolora-demo: data, pre-training, twelve fine-tunings; under five minutes on two idle cores"
	$(PY) -m studies.autolora_demo

# Numbers of shots; "1 5" takes two hours more.
SHOTS := 5

results: $(STAMP) ## run the small study: in four hours on two cores, or what is left of it
	$(PY) -m studies.mini_study --shots $(SHOTS)
	$(PY) -m studies.mini_results

bench: $(STAMP) ## time meta-tuning, evaluation and AutoLoRa
	$(PY) benchmarks/meta_tuning.py
	$(PY) benchmarks/evaluation.py
	$(PY) benchmarks/autolora.py

docs: $(STAMP) ## build the documentation as a site in site/
	@$(PY) -c 'import mkdocs, mkdocstrings' 2>/dev/null || \
	    $(PY) -m uv pip install --quiet --python $(PY) --editable '.[docs]' || \
	    $(PY) -m pip install --quiet --editable '.[docs]'
	$(PY) -m mkdocs build --strict --quiet

learn2learn: $(STAMP) ## build learn2learn 0.2.0 from its Cython sources and install it
	$(PY) -m tools.install_learn2learn

clean: ## remove what demo, results and test wrote; keeps .venv and your own data and runs
	rm -rf $(MADE_HERE) .pytest_cache .hypothesis .ruff_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV) build *.egg-info

# An environment whose filling was cut short may hold half a package that looks installed, and one whose
# interpreter was uninstalled does not run: start over. Times cannot tell make so, .venv/bin/python being a
# link to an old file.
AFRESH := $(shell test -x $(PY) && test ! -e $(UNFINISHED) || echo always)

$(PY): $(AFRESH)
	@python=; for candidate in $(if $(PYTHON),"$(PYTHON)",$(CANDIDATES)); do \
	    "$$candidate" -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && python="$$candidate" && break; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "error: Python 3.11 or newer is needed, and" \
	        "$(if $(PYTHON),PYTHON=$(PYTHON) is not,none of $(CANDIDATES) is): give make PYTHON=/path/to/python" >&2; \
	    exit 1; \
	fi; \
	version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	echo "setup: creating .venv with Python $$version ($$(command -v "$$python"))"; \
	rm -rf $(VENV) && mkdir $(VENV) && touch $(UNFINISHED) || exit 1; \
	if "$$python" -c 'import ensurepip' 2>/dev/null; then \
	    "$$python" -m venv $(VENV); \
	elif command -v uv >/dev/null; then \
	    uv venv --quiet --allow-existing --python "$$python" $(VENV); \
	else \
	    rm -rf $(VENV); \
	    echo "error: $$python lacks ensurepip, so it cannot make .venv: install uv, or Python's venv package" \
	        "(Debian, Ubuntu: apt install python$$version-venv)" >&2; \
	    exit 1; \
	fi

# uv is several times faster, but does not read pip's settings (a company's index, say): pip is the fallback.
$(STAMP): $(PY) requirements.txt pyproject.toml $(AFRESH)
	@touch $(UNFINISHED)
	@if command -v uv >/dev/null; then uv=uv; else \
	    uv="$(PY) -m uv"; \
	    $$uv --version >/dev/null 2>&1 || { \
	        $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null; \
	        $(PY) -m pip install --quiet uv || uv=; \
	    }; \
	fi; \
	if [ -n "$$uv" ]; then \
	    echo "setup: installing with uv (the first time, minutes and several GB: PyTorch)"; \
	    $$uv pip install --quiet --python $(PY) --editable '.[test]' && exit; \
	fi; \
	echo "setup: installing with pip (the first time, minutes and several GB: PyTorch)"; \
	$(PY) -m pip install --quiet --editable '.[test]' || { \
	    rm -f $(UNFINISHED); \
	    echo "error: the packages could not be installed, see above; make setup tries again" >&2; \
	    exit 1; \
	}
	@rm -f $(UNFINISHED) && touch $@
