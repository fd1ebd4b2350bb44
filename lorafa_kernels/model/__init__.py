"""Whole models.

config.py is LoRAFAConfig, names.py what it matches, adapt.py puts layers in, report.py says what was done,
saved.py has modules that are trained whole, merge.py merges, unloads and disables, ties.py keeps tied weights
told, checkpoint.py saves and loads. patterns.py matches within bounded time, exchange.py replaces files at
once, placing/ puts fused blocks in.
"""
