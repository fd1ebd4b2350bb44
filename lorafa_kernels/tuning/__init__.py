"""Kernel configurations: data and pure functions. The public pieces are in config.py."""
