"""Modules that stand where torch.nn's stood."""

from .group import LoRAFALinearGroup
from .linear import LoRAFALinear

__all__ = ["LoRAFALinear", "LoRAFALinearGroup"]
