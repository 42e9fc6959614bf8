"""Onto the Hub: a directory is checked, opened in a fresh process, and committed at once."""
