# Two commands are all that a fresh machine needs: `make demo` and `make test`. Each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST ?= .venv-oldest
# Where the benchmarks write their figures and plots.
RESULTS ?= bench_output
# Threads that wait busily slow small models down beside anything else.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-deepspeed test test-slow bench bench-gpu clean

demo: $(VENV)/ready
	$(BIN)/python -m dsvl.demo --overwrite

# The same model, trained by `dsvl train` under `deepspeed` in two processes.
demo-deepspeed: $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m dsvl.demo --deepspeed --overwrite

test: $(VENV)/ready $(OLDEST)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	BIN=$(abspath $(BIN)) sh tests/typecheck.sh
	DSVL_OLDEST=$(abspath $(OLDEST)) $(BIN)/python -m pytest tests -m "not slow"

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest tests -m slow

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

# The oldest transformers that is admitted, with what it requires and nothing of ours; the test lends it torch and Pillow.
$(OLDEST)/ready: $(VENV)/ready
	$(BIN)/python -m venv --clear --without-pip $(OLDEST)
	$(BIN)/pip --python $(OLDEST)/bin/python install --quiet \
		"transformers==$$(sed -n 's/^ *"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) demo_output bench_output build *.egg-info
