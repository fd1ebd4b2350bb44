"""What a block needs to know of one linear layer in it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearOperands(NamedTuple):
    """weight (N, K), bias (N,) or None, and the adapter lora_A (R, K), lora_B (N, R), or None for both: a
    plain frozen linear layer. scaling is s of the low-rank term, dropout_p the dropout on its input.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
