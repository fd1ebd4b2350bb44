"""Which implementation, plan and blocks an operation runs with: data and functions of shapes and limits.

config.py says what a kernel's configuration is, defaults.py which one each kernel takes, recipe.py the words
that the others share, cost.py the model of the cost, tables.py the tables of measured plans, pin.py the
pinned ones, make.py the choice among them; choice.py decides for one call.
"""

from .config import KernelConfig, KernelPlan
from .pin import pin_plan
from .recipe import Recipe

__all__ = ["KernelConfig", "KernelPlan", "Recipe", "pin_plan"]
