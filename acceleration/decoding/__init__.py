"""What `generate` runs: the preparation of a call, the loops of sampling and speculative decoding, and their steps."""
