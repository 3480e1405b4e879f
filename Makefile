# Each target sets up its own .venv when missing, and not again while pyproject.toml and constraints.txt are unchanged.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The suite starts many processes, each of which would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo docs test test-slow test-distributed test-ui test-llama test-mlx planted fuzz faults wheel-test audit check format peers compat clean

setup: $(STAMP)

# torch first and pinned: anything installed before it could pull another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

# The main job on the embedded default: train, then judge base and adapter on the held-out rows.
demo: $(STAMP)
	$(BIN)/training-lens train +experiment=default
	$(BIN)/training-lens compare --run latest
	@echo "to see the run in a browser: $(BIN)/training-lens ui"

# The guides and the API reference as a site in site/. A warning fails; the build itself downloads nothing.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "to read and search it: $(BIN)/python -m http.server --directory site, then http://localhost:8000"

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# A worker takes a run of neighbouring tests, so that what a file shares is mostly made once. Three for two cores: one
# often waits for a run that another makes.
test: check
	$(BIN)/pytest -n 3 --dist worksteal -m "not slow and not distributed"

# The proofs that take long, each of a kind of which another is in `make test`.
test-slow: $(STAMP)
	$(BIN)/pytest -n 2 --dist worksteal -m "slow and not distributed"

# Many processes, and machines that share a database: a PostgreSQL server that the tests start and delete. Where there is
# none, apt installs it.
test-distributed: $(STAMP)
	command -v initdb || ls -d /usr/lib/postgresql/*/bin/initdb || { apt-get update && apt-get install --yes postgresql; }
	$(BIN)/pytest -m distributed

# The dashboard's pages in a browser. What is missing is installed: Chromium by apt, Playwright and axe-core by pip.
test-ui: $(VENV)/.ui
	$(BIN)/pytest tests/ui/browser

$(VENV)/.ui: $(STAMP)
	command -v chromium || { apt-get update && apt-get install --yes chromium; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ui-test]'
	touch $@

# Exports in a real llama.cpp, which is compiled once: half an hour on one core. CPUs without AVX2 need other LLAMA_FLAGS.
LLAMA_FLAGS := -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON
LLAMA_LEAN := -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF \
	-DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1

test-llama: $(STAMP) .venv-llama/.installed
	PYTHONPATH=.venv-llama $(BIN)/pytest -n 0 tests/adapter_export/test_llama_cpp.py

.venv-llama/.installed: constraints.txt
	mkdir -p $(@D)
	CMAKE_ARGS="$(LLAMA_FLAGS) $(LLAMA_LEAN)" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--constraint constraints.txt --upgrade --target $(@D) llama-cpp-python diskcache
	touch $@

# Exports in a real mlx-lm, on the CPU.
test-mlx: $(STAMP) .venv-mlx/.installed
	PYTHONPATH=.venv-mlx $(BIN)/pytest -n 0 tests/adapter_export/test_mlx_lm.py

.venv-mlx/.installed: constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt --upgrade \
		--target $(@D) mlx mlx-cpu mlx-lm
	touch $@

# Runs with a known fault and healthy ones, and what the package says of each; writes the tables of docs/lens/findings.md.
# About an hour on one core; what stopped goes on where it was.
planted: $(STAMP)
	$(BIN)/python benchmarks/planted/run_planted.py
	$(BIN)/python benchmarks/planted/summarize_planted.py; status=$$?; $(BIN)/python tools/planted_table.py; exit $$status

# Changed inputs of every kind, and what became of them, as a table in docs/reliability.md.
FUZZ_CASES := 10000

fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/run_fuzz.py $(FUZZ_CASES)

# The wheel as a user gets it: built, installed into an empty environment outside of the tree, and used there.
WHEEL_TEST := $(or $(TMPDIR),/tmp)/training-lens-wheel-test

wheel-test: $(STAMP)
	rm -rf $(WHEEL_TEST)
	$(BIN)/python -m hatchling build --target wheel --directory $(WHEEL_TEST)/dist
	$(PYTHON) -m venv $(WHEEL_TEST)/venv
	$(WHEEL_TEST)/venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(WHEEL_TEST)/venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		$(WHEEL_TEST)/dist/*.whl
	cd $(WHEEL_TEST) && venv/bin/training-lens --version && venv/bin/training-lens --help > help.txt
	cd $(WHEEL_TEST) && venv/bin/training-lens train +experiment=quick_test && venv/bin/training-lens infer "What is 3 plus 4?"
	rm -rf $(WHEEL_TEST)

# Known vulnerabilities of what is installed; asks the advisory database of PyPI, and fails where it is not reached.
audit: $(STAMP)
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet \
		--disable-pip-version-check pip-audit; }
	.venv-audit/bin/pip-audit --strict --skip-editable --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# Kills, full disks and damaged files for every command; writes the tables of docs/reliability.md. About half an hour.
faults: $(STAMP)
	$(BIN)/python tests/faults/run.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What benchmarks/train_speed.py compares with, each in a virtual environment of its own. All but the first are optional:
# one that does not install here is named, and the others go on. A torchvision of another build than torch cannot be
# imported, and transformers then neither; texts need none.
OPTIONAL_PEERS := llamafactory litgpt unsloth

peers: .venv-peers-hf/.installed
	@for peer in $(OPTIONAL_PEERS); do \
		$(MAKE) --no-print-directory .venv-peers-$$peer/.installed || echo "$$peer: does not install here; left out"; \
	done

.venv-peers-%/.installed: benchmarks/peers/requirements-%.txt constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep '^torch==' constraints.txt > $(@D)/torch.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(@D)/torch.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(@D)/torch.txt --requirement $<
	$(@D)/bin/python -c 'import torchvision' 2> /dev/null || $(@D)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

# Merged folders under transformers 4.57, adapters under older versions of PEFT: each of these in a folder of its own.
OLDER_PEFT := 0.13.2 0.15.2 0.18.1 0.21.2

compat: $(STAMP) .venv-compat/.installed
	$(BIN)/python benchmarks/compat/check.py

.venv-compat/.installed: benchmarks/compat/requirements.txt constraints.txt Makefile
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep '^torch==' constraints.txt > $(@D)/torch.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(@D)/torch.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(@D)/torch.txt --requirement $<
	for version in $(OLDER_PEFT); do \
		$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
			--target $(@D)/peft-$$version peft==$$version || exit 1; \
	done
	touch $@

clean:
	rm -rf $(VENV) .venv-peers-* .venv-compat .venv-llama .venv-mlx .venv-audit outputs site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
