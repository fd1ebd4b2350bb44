"""The command `tune`: find the fastest plans for this machine's GPU by timing them.

search.py times candidates and writes the fastest into the user's table (plan/tables.py), command.py is the
command line, models.py has the shapes of known models.
"""
