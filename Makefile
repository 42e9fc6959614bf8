# Two commands are all that a fresh machine needs: `make demo` and `make test`. Each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Environments of other transformers releases, the oldest that is admitted first; `make test` compares the pinned one with them.
RELEASES ?= .venv-releases
OTHER_RELEASES := 5.20.2 5.23.0
# Tests run in files side by side.
WORKERS ?= 2
NEWEST ?= .venv-newest
# Where the benchmarks write their figures and plots.
RESULTS ?= bench_output
# Threads that wait busily slow small models down beside anything else.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-deepspeed test test-slow test-newest bench bench-gpu clean

demo: $(VENV)/ready
	$(BIN)/python -m dsvl.demo --overwrite

# The same model, trained by `dsvl train` under `deepspeed` in two processes.
demo-deepspeed: $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m dsvl.demo --deepspeed --overwrite

test: $(VENV)/ready $(OTHER_RELEASES:%=$(RELEASES)/%/ready)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	BIN=$(abspath $(BIN)) sh tests/typecheck.sh
	DSVL_RELEASES=$(abspath $(RELEASES)) $(BIN)/python -m pytest tests -m "not slow" -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest tests -m slow

# The newest release of everything, without pins; for a scheduled run, which is to tell what the next release breaks.
# torch alone is pinned, as its newest may come as a CUDA build of gigabytes.
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
	$(BIN)/python benchmarks/plots.py $(RESULTS)

# On a machine with an NVIDIA GPU, in an environment of its own: `pip install -e '.[bench,gpu,train]'` and then this, with BIN
# naming its bin.
bench-gpu:
	$(BIN)/python benchmarks/attention.py --out $(RESULTS)/attention.json
	$(BIN)/python benchmarks/growth.py --out $(RESULTS)/growth.json
	$(BIN)/python benchmarks/training_step.py --out $(RESULTS)/training_step.json
	$(BIN)/python benchmarks/fine_tuning.py --out $(RESULTS)/fine_tuning.json
	$(BIN)/python benchmarks/chat.py --size 7b --out $(RESULTS)/chat.json
	$(BIN)/python benchmarks/reuse.py --size 7b --compile --out $(RESULTS)/reuse.json
	$(BIN)/python benchmarks/decoding.py --size 7b --out $(RESULTS)/decoding.json
	$(BIN)/python benchmarks/plots.py $(RESULTS)

$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Another transformers, with what it requires and nothing of ours; the test lends it torch and Pillow.
$(RELEASES)/%/ready: $(VENV)/ready
	$(BIN)/python -m venv --clear --without-pip $(RELEASES)/$*
	$(BIN)/pip --python $(RELEASES)/$*/bin/python install --quiet "transformers==$*"
	touch $@

clean:
	rm -rf $(VENV) $(RELEASES) $(NEWEST) demo_output bench_output build *.egg-info
