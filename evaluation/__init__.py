"""Asking a checkpoint what a data set asks, scoring its answers, and showing them, one model's or several side by side."""
