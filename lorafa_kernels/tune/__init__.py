"""The command `tune`: find the fastest plans for this machine's GPU by timing them.

search.py times candidates and writes the fastest into the user's table (plan/tables.py), check.py compares
each with fp64 before, share.py measures expand's rate, command.py is the command line, models.py has the
shapes of known models.
"""
