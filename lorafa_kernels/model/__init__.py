"""Whole models: adapt.py puts layers in and takes them out, checkpoint.py saves and loads them.

patterns.py matches names, exchange.py replaces files, placing/ puts fused blocks in.
"""
