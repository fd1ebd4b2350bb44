"""Which plan and which blocks an operation runs with, all of it data and pure functions but for the search.

config.py has the kernels' configurations, recipe.py the words that the others share, cost.py the model of the
cost, lookup.py the tables of measured plans, pin.py the pinned ones, plan.py the choice among them; search.py
and command.py measure.
"""

from .config import KernelConfig, KernelPlan
from .pin import pin_plan
from .recipe import Recipe

__all__ = ["KernelConfig", "KernelPlan", "Recipe", "pin_plan"]
