"""Modules that stand where torch.nn's stood."""

from .group import LoRAFALinearGroup
from .linear import LoRAFALinear
from .mlp import LoRAFAGeGLU, LoRAFASwiGLU

__all__ = ["LoRAFAGeGLU", "LoRAFALinear", "LoRAFALinearGroup", "LoRAFASwiGLU"]
