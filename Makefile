# make quickstart [CONFIG=configs/other.yaml]   train, sample and evaluate; results in runs/<name of the config>/
# make lm                                       the same for a small language model; results in runs/lm_tiny/
# make test                                     lint, types and tests
# All set up .venv on first use. Another Python: make PYTHON=python3.12 …

PYTHON ?= python3
CONFIG ?= configs/digits.yaml
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart lm test

quickstart: $(READY)
	$(BIN)/dit-moe quickstart $(CONFIG)

lm: $(READY)
	$(BIN)/dit-moe quickstart configs/lm_tiny.yaml

# One thread per worker: two OpenMP programs on the same cores slow each other down tenfold.
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dit_moe
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@
