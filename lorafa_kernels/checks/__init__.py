"""The error budget, and the checks that use it.

budget.py has the budget and the checks of one layer, blocks.py those of groups, MLPs and norms; doctor.py is
the command that runs them here.
"""
