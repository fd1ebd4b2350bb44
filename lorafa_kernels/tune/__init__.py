"""Timing of plans on this machine's GPU, and the command `tune`.

search.py times candidates, command.py is the command line and writes the best into the user's table
(plan/tables.py), models.py has the shapes of known models.
"""
