"""Measurements and checks that write the result files in bench/results."""
