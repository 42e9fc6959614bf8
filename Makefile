# Two commands are all that a fresh machine needs: `make demo` and `make test`. Each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST ?= .venv-oldest
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

# Small measurements on a CPU.
bench: $(VENV)/ready
	$(BIN)/python benchmarks/attention_cpu.py
	$(BIN)/python benchmarks/reuse.py

# On a machine with an NVIDIA GPU, in an environment of its own: `pip install -e .` and then this, with BIN naming its bin.
bench-gpu:
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/fine_tuning.py
	$(BIN)/python benchmarks/chat.py --size 7b
	$(BIN)/python benchmarks/reuse.py --size 7b
	$(BIN)/python benchmarks/decoding.py --size 7b

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
	rm -rf $(VENV) $(OLDEST) demo_output build *.egg-info
