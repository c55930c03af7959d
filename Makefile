.PHONY: setup demo test test-all test-cluster test-faults test-fuzz check bench bench-peers clean
BIN := .venv/bin
# Two processes, each with its own Ray and servers; a file stays in one, for what its tests share.
TWO := $(BIN)/python -m pytest -n 2 --dist loadfile

setup: .venv/installed  ## virtual environment with every pinned dependency
.venv/installed: pyproject.toml constraints.txt
	python3 -m venv .venv && $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' && touch $@
demo: setup  ## draw raw archives, build shards, train, promote, predict
	PATH="$(CURDIR)/$(BIN):$$PATH" bash infra/demo.sh
test: setup  ## every unit, the road with real parts (MLflow goes away on it), attacks that come first: kills, odd stores
	$(TWO) tests/unit
	$(TWO) tests/system -m "not late"
	$(TWO) tests/faults -m first
test-all: test  ## and the notebook, every other attack, garbage for the parsers, a cluster
	$(BIN)/python -m pytest tests/system -m late
	$(TWO) tests/faults tests/fuzz -m "not first"
	$(BIN)/python -m pytest tests/cluster
test-cluster: setup  ## the whole road on several Ray nodes, S3 and MLflow on PostgreSQL; see infra/local
	$(BIN)/python -m pytest tests/cluster
test-faults: setup  ## kills, full disks, broken stores and networks; RUNS=N of each attack, SEED=N to have them again
	$(BIN)/python -m pytest tests/faults --fault-runs $(or $(RUNS),10) $(if $(SEED),--fault-seed $(SEED))
test-fuzz: setup  ## garbage for every parser, 4,000 inputs each; INPUTS=N for others
	$(BIN)/python -m pytest tests/fuzz --fuzz-inputs $(or $(INPUTS),4000)
check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python -m pytest tests/unit/test_layout.py
bench: setup  ## two rounds of every measurement: what moved; 35 minutes of a quiet machine, by its parts
	$(BIN)/python -m benchmarks --rounds 2
bench-peers: setup  ## what the benchmarks compare with, each in an environment of its own: 5 GB
	$(BIN)/python -m benchmarks.environments
clean:
	rm -rf .venv .bench-peers .demo .pytest_cache .mypy_cache .ruff_cache ./*.egg-info
