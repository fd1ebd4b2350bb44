"""How tests compare numbers: there is no third way, and no tolerance of a test's own.

Where the same code computes both, with the same shapes and strides: `assert_same`, bit for bit. Elsewhere the
error budget of lorafa_kernels/checks/budget.py against fp64: `check_budget` for one draw, and `Budget`, which
pools small outputs over many draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafa_kernels.checks.budget import Operands, allowed_error, draw_operands, plain_formula

SMALL_OUTPUT = 256
POOLED_SEEDS = 64


def assert_same(got: Any, want: Any, *, equal_nan: bool = False, name: str = "result") -> None:
    """Assert that tensors have the same dtype, shape and bits, but that 0 equals −0; None where None is
    wanted. Of mappings and sequences, each item. equal_nan: one NaN is as good as another, and NaN may be
    wanted.
    """
    if isinstance(want, Mapping):
        assert isinstance(got, Mapping) and list(got) == list(want), f"{name}: {list(got)}, not {list(want)}"
        for key in want:
            assert_same(got[key], want[key], equal_nan=equal_nan, name=f"{name}[{key!r}]")
        return
    if isinstance(want, (tuple, list)):
        assert isinstance(got, (tuple, list)) and len(got) == len(want), f"{name}: not {len(want)} items"
        for index, (one, other) in enumerate(zip(got, want, strict=True)):
            assert_same(one, other, equal_nan=equal_nan, name=f"{name}[{index}]")
        return
    if want is None:
        assert got is None, f"{name}: a tensor, where None is wanted"
        return
    assert isinstance(got, Tensor) and isinstance(want, Tensor), f"{name}: {type(got)} and {type(want)}"
    kinds = [(tensor.dtype, tuple(tensor.shape), tensor.device.type) for tensor in (got, want)]
    assert kinds[0] == kinds[1], f"{name}: {kinds[0]}, wanted {kinds[1]}"
    if torch.equal(got, want):
        return
    got, want = got.detach(), want.detach()
    apart = got != want
    if equal_nan:
        apart &= ~(got.isnan() & want.isnan())
    if not apart.any():
        return
    first = tuple(apart.nonzero()[0].tolist())
    finite = got.isfinite() & want.isfinite()
    difference = (got.double() - want.double())[finite].abs()
    largest = difference.max().item() if difference.numel() else float("nan")
    raise AssertionError(
        f"{name}: {apart.sum().item()} of {apart.numel()} elements differ, by at most {largest:.3e} where "
        f"both are finite; at {first}: {got[first].item()!r}, wanted {want[first].item()!r}"
    )


class Budget:
    """Collects squared errors, over seeds if need be, and compares them with what is allowed."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._counts: dict[str, list[int]] = {}

    def add(self, inputs: Operands, got: dict[str, Tensor]) -> None:
        self.compare(got, plain_formula(inputs, torch.float64), plain_formula(inputs))

    def compare(
        self,
        got: Mapping[str, Tensor],
        exact: Mapping[str, Tensor | np.ndarray],
        plain: Mapping[str, Tensor],
    ) -> None:
        """Add results of any formula, beside the same in fp64 and by the plain formula in their dtype."""
        assert set(got) == set(exact) == set(plain), f"{set(got)}, {set(exact)} and {set(plain)}"
        for name, tensor in got.items():
            wide, own, want = (_wide(t) for t in (tensor, plain[name], exact[name]))
            assert wide.shape == want.shape == own.shape, f"{name}: {tuple(wide.shape)}"
            assert torch.isfinite(wide).all(), f"{name} is not finite everywhere"
            assert tensor.dtype != torch.float64, f"{name}: fp64 cannot be judged by fp64"
            sums = self._sums.setdefault(name, [0.0, 0.0, 0.0])
            sums[0] += (wide - want).square().sum().item()
            sums[1] += (own - want).square().sum().item()
            sums[2] += want.square().sum().item()
            assert self._dtypes.setdefault(name, tensor.dtype) == tensor.dtype, f"{name}: {tensor.dtype}"
            counts = self._counts.setdefault(name, [0, 0])
            counts[0] += tensor.numel()
            counts[1] += 1

    def check(self) -> None:
        assert self._sums, "nothing was measured"
        for name, (got, plain, exact) in self._sums.items():
            elements, draws = self._counts[name]
            assert elements >= SMALL_OUTPUT or draws >= POOLED_SEEDS or not elements, (
                f"{name}: {elements} elements of {draws} draws are too few for an error to mean something"
            )
            if exact == 0.0:
                assert got == 0.0, f"{name} must be zero"
                continue
            error, allowed = (
                (got / exact) ** 0.5,
                allowed_error((plain / exact) ** 0.5, self._dtypes[name]),
            )
            assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def whole(*tensors: Tensor) -> None:
    """Make these tensors small whole numbers, in place: sums of their products are exact in every order. MKL
    may give a product other last bits while several threads ask for one.
    """
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(8).round_().clamp_(-3, 3)


def check_budget(
    got: Mapping[str, Tensor], exact: Mapping[str, Tensor | np.ndarray], plain: Mapping[str, Tensor]
) -> None:
    """Assert that results of one draw, each of SMALL_OUTPUT elements or more, are within the budget; exact
    and plain as in Budget.compare.
    """
    budget = Budget()
    budget.compare(got, exact, plain)
    budget.check()


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


def _wide(values: Tensor | np.ndarray) -> Tensor:
    if not isinstance(values, Tensor):
        values = torch.from_numpy(values)
    return values.detach().double().cpu()
