"""Modules that stand where torch.nn's stood."""

from .group import LoRAFALinearGroup
from .linear import LoRAFALinear
from .mlp import LoRAFAGeGLU, LoRAFASwiGLU
from .quantised import LoRAFAQuantisedLinear, QuantisedLinear

__all__ = [
    "LoRAFAGeGLU",
    "LoRAFALinear",
    "LoRAFALinearGroup",
    "LoRAFAQuantisedLinear",
    "LoRAFASwiGLU",
    "QuantisedLinear",
]
