"""Attention under `"mmca"`: masks, the fused kernels and where they are used, rotated keys, softmaxes in parts."""
