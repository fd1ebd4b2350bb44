"""Modules that stand where torch.nn's stood."""

from .linear import LoRAFALinear

__all__ = ["LoRAFALinear"]
