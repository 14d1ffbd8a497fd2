# make quickstart [CONFIG=configs/other.yaml]   train, sample and evaluate; results in runs/<name of the config>/
# make quickstart CONFIG=configs/my_images.yaml data.path=FOLDER   the same on your own images, in runs/<name of FOLDER>/
# make lm                                       the same for a small language model; results in runs/lm_tiny/
# make setup                                    install dit-moe and what it needs into .venv, and nothing else
# make test                                     lint, types and tests, as .ci/run does
# make test-newest                              the same on the newest of every package, in a folder of its own
# make docs                                     the guides and a reference as a site: site/index.html
# make lock                                     resolve all packages anew and write requirements/
# make help                                     this list, as make alone
# quickstart, lm, test and docs set up .venv on first use. Another Python: make PYTHON=python3.12 …
# Another folder: VENV=.venv-3.12. A torch that this machine has already: INSTALL=--system-site-packages.

# A name for the shell, in quotes if there are spaces in it
named = $(if $(word 2,$1),'$(subst ','\'',$1)',$1)
empty :=
space := $(empty) $(empty)

VENV ?= .venv
PYTHON ?= $(if $(wildcard $(subst $(space),\ ,$(VENV))/bin/python),$(call named,$(VENV)/bin/python),python3)
CONFIG ?= configs/digits.yaml
INSTALL ?=
bin = $(call named,$(VENV)/bin/$1)
SETUP := requirements/install.py --venv $(call named,$(VENV)) $(INSTALL)
# Variables of the command line with a dot in their name, as changes to the config: data.path='my images'
given = $(and $(findstring .,$1),$(filter command,$(origin $1)))
GIVEN = $(strip $(foreach name,$(.VARIABLES),$(if $(call given,$(name)),$(name))))
CHANGES = $(foreach name,$(GIVEN),'$(subst ','\'',$(name)=$(value $(name)))')

.PHONY: help setup quickstart lm test check test-newest docs lock

help:
	@sed -n '/^#/!q; s/^# //p' $(firstword $(MAKEFILE_LIST))

setup:
	@$(PYTHON) $(SETUP) base
	@echo "source $(call bin,activate)"

quickstart:
	@$(PYTHON) $(SETUP) base
	$(call bin,dit-moe) quickstart $(call named,$(CONFIG)) $(CHANGES)

lm: CONFIG = configs/lm_tiny.yaml
lm:
	@$(PYTHON) $(SETUP) lm
	$(call bin,dit-moe) quickstart $(call named,$(CONFIG)) $(CHANGES)

test:
	@$(PYTHON) $(SETUP) dev
	@$(MAKE) --no-print-directory check

# One thread per worker: two OpenMP programs on the same cores slow each other down tenfold.
check:
	$(call bin,ruff) check .
	$(call bin,ruff) format --check .
	$(call bin,mypy) --num-workers=2 dit_moe
	OMP_NUM_THREADS=1 $(call bin,pytest) -n 2 --dist loadfile --no-loadscope-reorder

test-newest:
	@$(PYTHON) requirements/install.py dev --venv .venv-newest --newest
	@$(MAKE) --no-print-directory check VENV=.venv-newest

docs:
	@$(PYTHON) $(SETUP) docs
	NO_MKDOCS_2_WARNING=1 $(call bin,mkdocs) build --quiet
	@echo "site/index.html"

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --upgrade uv
	.venv-lock/bin/python requirements/update.py
