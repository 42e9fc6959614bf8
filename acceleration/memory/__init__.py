"""Training in less memory: layers in tiles, checkpoints on the host, frozen layers in 8 bits."""
