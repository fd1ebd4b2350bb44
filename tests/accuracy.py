"""The accuracy budget as an assertion: pools small outputs over many draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorafa_kernels.accuracy import Operands, allowed_error, draw_operands, plain_formula

SMALL_OUTPUT = 256
POOLED_SEEDS = 64


class Budget:
    """Collects squared errors, over seeds if need be, and compares them with what is allowed."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, inputs: Operands, got: dict[str, Tensor]) -> None:
        self.compare(got, plain_formula(inputs, torch.float64), plain_formula(inputs))

    def compare(self, got: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
        """Add results of any formula, beside the same in fp64 and by the plain formula in their dtype."""
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
                allowed_error((plain / exact) ** 0.5, self._dtypes[name]),
            )
            assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def check_accuracy(compute: Callable[[Operands], dict[str, Tensor]], **shape) -> None:
    """Assert that `compute` stays within the budget at this shape (arguments of draw_operands but for the
    seed).
    """
    smallest = min(shape["M"] * shape["N"], shape["M"] * shape["K"], shape["N"] * shape["R"])
    budget = Budget()
    for seed in range(POOLED_SEEDS if smallest < SMALL_OUTPUT else 1):
        inputs = draw_operands(**shape, seed=seed)
        budget.add(inputs, compute(inputs))
    budget.check()
