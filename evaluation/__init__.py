"""Generating a checkpoint's answers to a data set, scoring them, and comparing runs."""
