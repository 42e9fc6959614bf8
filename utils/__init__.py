"""Helpers that several parts of the package share. Importing them imports neither torch nor transformers."""
