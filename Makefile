# `make series` and `make test` are all that a fresh machine needs; `make help` lists the rest.

PYTHON = python3
VENV_PYTHON = .venv/bin/python
INSTALLED = .venv/.installed
SERVE = build/service --replicas 2
SITE_INSTALLED = .venv/.site-installed

# The notebooks run in notebooks/: a checkpoint's directory that is named from here is found from there as well.
override BLIP_MODEL := $(or $(realpath $(BLIP_MODEL)),$(BLIP_MODEL))
override RESNET_MODEL := $(or $(realpath $(RESNET_MODEL)),$(RESNET_MODEL))
export BLIP_MODEL RESNET_MODEL

.PHONY: help series test serve lab notebooks bench lint site neuron clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

series: $(INSTALLED) ## run the notebooks in order, check every answer, leave them as HTML in build/
	@$(VENV_PYTHON) run_series.py

test: $(INSTALLED) ## run every test, the notebooks' stored outputs included
	@$(VENV_PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

serve: $(INSTALLED) ## answer over HTTP, with a page to try it on, until Ctrl-C (SERVE="build/service --replicas 2")
	@$(VENV_PYTHON) blip.py serve $(SERVE)

lab: $(INSTALLED) ## open the notebooks in JupyterLab
	@$(VENV_PYTHON) -m jupyterlab notebooks

notebooks: $(INSTALLED) ## run the notebooks and, if all pass, store their outputs in them
	@$(VENV_PYTHON) run_series.py --store

bench: $(INSTALLED) ## time the compiled models beside eager, at full size (BENCH="--model tiny" for less)
	@$(VENV_PYTHON) benchmarks/compare.py $(BENCH)

lint: $(INSTALLED) ## check the style of all code, the notebooks' included
	@$(VENV_PYTHON) -m ruff check
	@$(VENV_PYTHON) -m ruff format --check

site: $(SITE_INSTALLED) ## build the notebooks, the documents and the API as a site in build/site
	@$(VENV_PYTHON) -m sphinx -q -W --keep-going -c docs -d build/site-doctrees . build/site
	@echo "the site is in build/site: open build/site/index.html in a browser"

# PyPI's torch, as in AWS's instructions; requirements-neuron.txt replaces a CPU build that is there already.
neuron: export TORCH_CPU_INDEX =
neuron: $(INSTALLED) ## add AWS's packages, to run on Inf2
	@$(VENV_PYTHON) -m pip install -r requirements-neuron.txt

clean: ## delete the environment and everything in build/
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis

# With requirements.txt beside it, so that no version of the environment moves.
$(SITE_INSTALLED): requirements-site.txt $(INSTALLED)
	@$(VENV_PYTHON) -m pip install -q -r requirements.txt -r requirements-site.txt
	@touch $@

$(INSTALLED): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: install Python 3.11, 3.12 or 3.13"; exit 1; }
	@$(PYTHON) setup_env.py
	@touch $@
