# Everything here sets itself up: the first target that needs it makes .venv with the pinned versions.
SHELL := bash
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest
OUT ?= demo-out
DEMO ?=
SOAK ?=
SEEDS ?= 10000
CUTS ?= 500
SCHEDULES ?= 1000
FAULTS ?=
FUZZ ?=
BANDWIDTH ?=
EXPORTS ?=

.PHONY: help demo test fuzz fuzz-guided simulate soak faults check doctests lint format types layers docs protos protos-fresh bench bench-train bench-rounds bench-zo bench-codecs bench-factors bench-lean power bench-coordinator bandwidth exports clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / — /'

$(VENV)/ready: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints-dev.txt "pip>=25.1"
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints-dev.txt --group dev --editable ".[demo,onnx,fast,postgres,s3,metrics,telemetry,ray]"
	touch $@

demo: $(VENV)/ready  ## a coordinator and three clients on a real model and real text (about six minutes)
	$(RUN) -m edgetune demo --out $(OUT) $(DEMO)

test: $(VENV)/ready  ## every test
	$(PYTEST)

faults: $(VENV)/ready  ## SCHEDULES=1000 random schedules of faults over both kinds of store, and the seeded bugs; goes on where it was
	$(RUN) -m tests.faults.campaign --schedules $(SCHEDULES) $(FAULTS)

simulate: $(VENV)/ready  ## federations in virtual time under seeded faults (SEEDS=10000)
	$(RUN) -m tests.faults.simulation --seeds $(SEEDS)

power: $(VENV)/ready  ## power cuts at moments of recorded federations (CUTS=500)
	$(RUN) -m tests.faults.power --cuts $(CUTS)

soak: $(VENV)/ready  ## 200 unsteady devices, two replicas on PostgreSQL and SeaweedFS, a kill -9 every 10 s (SOAK="--seconds 600")
	$(RUN) -m tests.faults.soak $(SOAK)

check: lint types layers protos-fresh doctests  ## all that a change must pass: lint, types, layers, protos, examples, tests with coverage
	$(PYTEST) --cov --cov-report=term

doctests: $(VENV)/ready  ## the examples in docstrings give what they say
	$(PYTEST) --doctest-modules coordinator edge_client edgetune experiments quantize wire

lint: $(VENV)/ready  ## ruff: rules and layout
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/ready  ## put the layout right
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(VENV)/ready  ## mypy --strict
	$(RUN) -m mypy

layers: $(VENV)/ready  ## import-linter: imports only go down
	$(VENV)/bin/lint-imports --no-cache

docs: $(VENV)/ready  ## write docs/errors.md and docs/methods.md anew from their tables
	$(RUN) -m wire.contract > docs/errors.md
	$(RUN) -m experiments.method_table > docs/methods.md

protos: $(VENV)/ready  ## generate the protobuf code anew
	$(RUN) -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protos/v1/federation.proto protos/v1/middle.proto

protos-fresh: $(VENV)/ready  ## the committed protobuf code is what its proto gives
	@made=$$(mktemp -d) && trap 'rm -r "$$made"' EXIT \
	&& $(RUN) -m grpc_tools.protoc -I . --python_out="$$made" --pyi_out="$$made" --grpc_python_out="$$made" protos/v1/federation.proto protos/v1/middle.proto \
	&& for file in {federation,middle}_pb2.py {federation,middle}_pb2.pyi {federation,middle}_pb2_grpc.py; do \
	  diff -u "protos/v1/$$file" "$$made/protos/v1/$$file" || { echo "run 'make protos' and commit"; exit 1; }; done \
	&& echo "the generated code is fresh"

bench: bench-rounds bench-coordinator bench-train bench-zo bench-factors  ## every benchmark: ratios against named baselines

bench-train: $(VENV)/ready  ## a client's training steps against a bare peft + bitsandbytes loop
	$(RUN) -m benchmarks.train_overhead

bench-zo: $(VENV)/ready  ## zeroth order: a step against two forwards, and memory against the NF4 client
	$(RUN) -m benchmarks.zeroth_order_overhead

fuzz: $(VENV)/ready  ## a million mutated payloads for every decoder, under a limit of 512 MB; goes on where it was (an hour of a core)
	$(RUN) -m tests.conformance.fuzz $(FUZZ)

fuzz-guided: $(VENV)/ready  ## payloads that reach new code of each decoder, by atheris (FUZZ="--only ecsq --seconds 600")
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints-dev.txt --group fuzz
	$(RUN) -m tests.conformance.fuzz_guided $(FUZZ)

bench-codecs: $(VENV)/ready  ## encoding, and decoding into the sum, against a float32 axpy
	$(RUN) -m benchmarks.codec_speed

bandwidth: $(VENV)/ready  ## federations behind slow links: loss against bytes and time (BANDWIDTH="--preset small"); goes on where it was
	$(RUN) -m edgetune experiment bandwidth --out bandwidth-out $(BANDWIDTH)

exports: $(VENV)/ready  ## every adapter taken home from a real model, and loaded by what knows nothing of edgetune (EXPORTS="--only norms")
	$(RUN) -m tests.e2e.exports $(EXPORTS)

bench-factors: $(VENV)/ready  ## aggregators that multiply devices' factors, against whole matrices
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.factor_aggregation

bench-lean: $(VENV)/ready  ## the onnx client's install in a fresh environment: size, what is not in it, start
	$(RUN) -m benchmarks.lean_install

bench-rounds: $(VENV)/ready  ## a round without training: time, memory of clients and of the coordinator
	$(RUN) -m benchmarks.round_overhead

bench-coordinator: $(VENV)/ready  ## a coordinator beside a bare gRPC handler: CPU, bytes a second, memory, replicas, stalled uploads
	$(RUN) -m benchmarks.coordinator_throughput

clean:  ## forget the environment and what was made
	rm -rf $(VENV) $(OUT) faults-out fuzz-out bandwidth-out .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
