"""The four operations of a LoRA-FA linear layer, composed of the kernels. Shapes and dtypes as in
reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .expand import expand
from .grad import grad
from .shrink import shrink


def forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute y (M, N) and z (M, R) in two launches."""
    z = shrink(x, lora_A.t(), scaling)
    return expand(x, weight.t(), z, lora_B.t(), bias), z


def backward(
    dy: Tensor, z: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute dx (M, K) and dB (N, R) in three launches, with one pass over dy beside the large product's."""
    dz, dB = grad(dy, z, lora_B, scaling, lora_B.dtype)
    return expand(dy, weight, dz, lora_A), dB


def backward_input(dy: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Compute dx (M, K) alone in two launches."""
    return expand(dy, weight, shrink(dy, lora_B, scaling), lora_A)


def backward_lora_B(dy: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute dB (N, R) in `dtype` alone in two launches."""
    return grad(dy, z, None, 1.0, dtype)[1]
