"""The accuracy that the contract promises, measured one way everywhere.

error = ‖got − exact‖ / ‖exact‖ (Frobenius), exact in fp64 from the same rounded inputs. Allowed: twice the
error of the plain PyTorch formula in the same dtype, plus the unit roundoff of the output's dtype. Outputs
of fewer than 256 elements are pooled over 64 seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_OUTPUT = 256
POOLED_SEEDS = 64


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@dataclass
class Inputs:
    """Operands of one layer. lora_B is in factor_dtype; everything else in dtype."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float


def make_inputs(
    M: int,
    K: int,
    N: int,
    R: int,
    dtype: torch.dtype,
    device: str,
    *,
    bias: bool = True,
    factor_dtype: torch.dtype | None = None,
    seed: int = 0,
    scaling: float = 0.7,
) -> Inputs:
    """Draw operands so that the base product and the low-rank term both matter in y and dx."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    factor = factor_dtype or dtype
    return Inputs(
        x=draw(M, K),
        weight=draw(N, K, scale=max(K, 1) ** -0.5),
        lora_A=draw(R, K, scale=max(K, 1) ** -0.5),
        lora_B=draw(N, R, scale=R**-0.5, dtype=factor),
        bias=draw(N) if bias else None,
        dy=draw(M, N),
        scaling=scaling,
    )


def plain_formula(inputs: Inputs, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y, dx and dB by the formula that people write, with autograd, in `dtype` (default: as the inputs are).

    lora_B is rounded to the dtype of x first, which is what the operator promises to do with it.
    """
    to = dtype or inputs.x.dtype
    x = inputs.x.to(to).detach().requires_grad_()
    lora_B = inputs.lora_B.to(inputs.x.dtype).to(to).detach().requires_grad_()
    bias = None if inputs.bias is None else inputs.bias.to(to)
    low_rank = F.linear(F.linear(x, inputs.lora_A.to(inputs.x.dtype).to(to)), lora_B)
    y = F.linear(x, inputs.weight.to(to), bias) + inputs.scaling * low_rank
    dx, dB = torch.autograd.grad(y, (x, lora_B), inputs.dy.to(to))
    return {"y": y.detach(), "dx": dx, "dB": dB}


class Budget:
    """Collects squared errors, over seeds if need be, and compares them with what is allowed."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, inputs: Inputs, got: dict[str, Tensor]) -> None:
        exact = plain_formula(inputs, torch.float64)
        plain = plain_formula(inputs)
        for name, tensor in got.items():
            assert tensor.shape == exact[name].shape, f"{name}: {tuple(tensor.shape)}"
            assert torch.isfinite(tensor).all(), f"{name} is not finite everywhere"
            sums = self._sums.setdefault(name, [0.0, 0.0, 0.0])
            sums[0] += (tensor.double() - exact[name]).square().sum().item()
            sums[1] += (plain[name].double() - exact[name]).square().sum().item()
            sums[2] += exact[name].square().sum().item()
            self._dtypes[name] = tensor.dtype

    def check(self) -> None:
        assert self._sums, "nothing was measured"
        for name, (got, plain, exact) in self._sums.items():
            if exact == 0.0:
                assert got == 0.0, f"{name} must be zero"
                continue
            error, allowed = (
                (got / exact) ** 0.5,
                2 * (plain / exact) ** 0.5 + unit_roundoff(self._dtypes[name]),
            )
            assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def check_accuracy(compute: Callable[[Inputs], dict[str, Tensor]], **shape) -> None:
    """Assert that `compute` stays within the budget at this shape (arguments of make_inputs but for the
    seed).
    """
    smallest = min(shape["M"] * shape["N"], shape["M"] * shape["K"], shape["N"] * shape["R"])
    budget = Budget()
    for seed in range(POOLED_SEEDS if smallest < SMALL_OUTPUT else 1):
        inputs = make_inputs(**shape, seed=seed)
        budget.add(inputs, compute(inputs))
    budget.check()
