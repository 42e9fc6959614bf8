"""A page to talk to a checkpoint on: `dsvl demo`, and a Hugging Face Space."""
