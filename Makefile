# `make demo` and `make test` set up what they need; `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# A 3.11 is taken first, since the locked requirements are resolved for it. One that does not run is passed over, as a
# shim of pyenv for a version that is not in force, and so is one without venv, which Debian has in a package apart.
SERVES := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for each in python3.11 python3.12 python3; do \
	if $$each -c 'import ensurepip; $(SERVES)' 2> /dev/null; then echo $$each; break; fi; done)
BIN := .venv/bin
JARS := .cache/kafka/libs
MOTO := .cache/moto
PACKAGES := schemas model streams trainer starcast
COMPILE := pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make requirements"

# torch and what it needs are gigabytes: a slow line must not end the set-up.
export UV_HTTP_TIMEOUT ?= 300

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 16

.PHONY: setup
setup: .venv/.installed ## Make .venv with the locked requirements and this project

.venv/.installed: requirements.txt pyproject.toml
	@if ! $(BIN)/python -c 'import pip; $(SERVES)' 2> /dev/null; then \
		if ! $(PYTHON) -c 'import ensurepip; $(SERVES)' 2> /dev/null; then \
			echo "Starcast needs Python 3.11 or 3.12 with venv (on Debian and Ubuntu the package python3-venv):" \
				"install it, or name it, as make setup PYTHON=/opt/python3.12/bin/python3." >&2; exit 1; fi; \
		$(PYTHON) -m venv --clear .venv; fi
	sed -n '/^uv==/,/^[^ ]/{/^uv==/p;/^ /p}' requirements.txt > .venv/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

.PHONY: requirements
requirements: ## Lock the requirements again, newest versions with hashes (UPGRADE=1), else as few changes as can be
	$(BIN)/uv $(COMPILE) pyproject.toml $(if $(UPGRADE),--upgrade) --extra demo --extra peers --group dev -o requirements.txt
	$(BIN)/uv $(COMPILE) pyproject.toml --extra demo --constraints requirements.txt -o deploy/requirements.txt
	$(BIN)/uv $(COMPILE) tests/moto/requirements.in $(if $(UPGRADE),--upgrade) -o tests/moto/requirements.txt
	for peer in quix faststream flink kafka_streams; do \
		$(BIN)/uv $(COMPILE) bench/peers/$$peer.in $(if $(UPGRADE),--upgrade) -o bench/peers/$$peer.txt; done

.PHONY: system
system: ## Install Java, Maven and Chromium by apt where they are missing
	@missing=(); \
	command -v java > /dev/null || missing+=(openjdk-17-jre-headless); \
	command -v mvn > /dev/null || missing+=(maven); \
	test -x /usr/bin/chromium || missing+=(chromium); \
	test $${#missing[@]} -gt 0 || exit 0; \
	as_root=(); test "$$(id -u)" = 0 || as_root=(sudo -n); \
	apt=("$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get); \
	if command -v apt-get > /dev/null; then "$${apt[@]}" update -qq || true; fi; \
	for package in "$${missing[@]}"; do \
		"$${apt[@]}" install -y -qq --no-install-recommends "$$package" > /dev/null || \
			echo "Could not install $$package: install it by hand. Tests that need it are skipped, or fail in CI." >&2; \
	done

.PHONY: kafka-jars
kafka-jars: $(JARS)/.copied ## Fetch Apache Kafka's jars for tests and benchmarks

$(JARS)/.copied: tests/kafka/pom.xml
	@if ! command -v mvn > /dev/null; then \
		echo "No Maven, so no Apache Kafka: install maven (make system)." >&2; exit 0; fi; \
	rm -rf $(JARS); \
	mvn --batch-mode --quiet -f tests/kafka/pom.xml dependency:copy-dependencies \
		-DoutputDirectory="$(CURDIR)/$(JARS)"; \
	touch $@

.PHONY: object-store
object-store: $(MOTO)/.installed ## Install an S3 server for tests, in an environment of its own

$(MOTO)/.installed: tests/moto/requirements.txt .venv/.installed
	rm -rf $(MOTO)
	$(BIN)/uv venv --quiet --python $(BIN)/python $(MOTO)
	$(BIN)/uv pip install --quiet --python $(MOTO)/bin/python --require-hashes -r $<
	touch $@

.PHONY: format
format: setup ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: lint
lint: setup ## Check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.PHONY: types
types: setup ## Check types
	$(BIN)/pyright

.PHONY: imports
imports: setup ## Check who imports whom
	$(BIN)/lint-imports

.PHONY: test
# On two cores two more processes work while the others wait for servers.
test: setup system kafka-jars object-store ## Run all tests, on real servers
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=4 --dist=loadfile --no-loadscope-reorder \
		--durations=15 $(ARGS)

.PHONY: peers
peers: setup system kafka-jars ## Prove that peers of the benchmarks that have code of their own compute what we do
	OMP_NUM_THREADS=1 $(BIN)/pytest -m peer tests/unit/bench tests/integration $(ARGS)

.PHONY: coverage
coverage: ## Run all tests, a quarter slower, and print line coverage
	$(MAKE) test ARGS="--cov --cov-report=term:skip-covered $(ARGS)"

.PHONY: docs
docs: setup ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

.PHONY: demo
demo: setup ## Run the demo: everything on this machine, dashboard and all, until Ctrl-C
	$(BIN)/starcast demo $(ARGS)

.PHONY: servers
servers: setup system kafka-jars ## Run Apache Kafka and Valkey until Ctrl-C
	@$(BIN)/python -m tests.servers

.PHONY: bench-loop
bench-loop: setup system kafka-jars ## Measure the scoring loop beside the bare Kafka loop and its peers
	$(BIN)/python -m bench.loop $(ARGS)

.PHONY: bench-scale
bench-scale: setup system kafka-jars ## Measure how cost grows with users, items, partitions, workers (ARGS="--parts users --users 10000 5000000")
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.scale $(ARGS)

.PHONY: bench-text
bench-text: setup ## Measure the text encoder beside sentence-transformers and the machine's matrix products
	$(BIN)/python -m bench.text $(ARGS)

.PHONY: bench-train
bench-train: setup ## Measure fine-tuning beside transformers.Trainer and a plain loop, and replays
	$(BIN)/python -m bench.train $(ARGS)

.PHONY: bench-check
bench-check: setup system kafka-jars ## Fail when a benchmark's ratio has fallen by more than its noise (ARGS="--as-is" compares the last runs)
	$(BIN)/python -m bench.check $(ARGS)

.PHONY: bench-latency
bench-latency: setup system kafka-jars ## Measure latency at rates that stay beside the bare Kafka loop (ARGS="--rates 1000 5000")
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.latency $(ARGS)

.PHONY: quality
quality: setup ## Measure predictions beside peers, fine-tuning, ablations; goes on where it was (ARGS="--parts sets")
	test -d .cache/movielens || $(BIN)/python -m bench.movielens .cache/movielens
	$(BIN)/python -m bench.quality $(ARGS)

.PHONY: soak
soak: setup system kafka-jars ## Play at half the peak and see whether anything grows (MINUTES=60)
	$(BIN)/python -m bench.soak --minutes $(or $(MINUTES),60) $(ARGS)

.PHONY: faults
faults: setup system kafka-jars ## Prove that faults lose, double and spoil nothing; 40 minutes (ARGS="--seed N")
	$(BIN)/python -m tests.faults --json bench/results/faults.json $(ARGS)

.PHONY: faults-smoke
faults-smoke: setup system kafka-jars ## A few minutes of the same; a part of `make test`
	$(BIN)/pytest tests/faults/test_smoke.py $(ARGS)

.PHONY: protections
protections: setup system kafka-jars ## Switch off each protection in turn, and see that the harness finds the damage
	$(BIN)/pytest tests/faults/proofs.py $(ARGS)

.PHONY: bad-records
bad-records: setup system kafka-jars ## Mix 100,000 bad records, a tenth of all, into a shop, and see that the good ones do not notice
	$(BIN)/python -m tests.faults.bad_records --records 100000 --share 0.1 --json bench/results/bad_records.json $(ARGS)

.PHONY: wheel
wheel: setup ## Build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

.PHONY: clean
clean: ## Remove what builds and tests leave; .venv and .cache stay
	rm -rf build dist site htmlcov .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find $(PACKAGES) tests bench -name __pycache__ -prune -exec rm -rf {} + 2> /dev/null || true
