"""The gate before the clock: a contender's results against fp64 on the same operands.

What is allowed is twice the plain formula's error in the same dtype plus the unit roundoff of the output's
dtype (lorafa_kernels/checks/budget.py). A contender outside of it, or with NaN, gets no time.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafa_kernels.base.frozen import quantised
from lorafa_kernels.checks.budget import Operands, allowed_error, draw_operands, plain_formula, relative_error
from lorafa_kernels.operands import draw_seed
from lorafa_kernels.philox import keep_mask

from .cases import DTYPES, Case
from .contenders import SEEDED, Contender, Layer, compute

SEED = 0


def draw(case: Case, device: str) -> Operands:
    """Draw the operands of a case, x needing its gradient.

    lora_B's values fit the base's dtype, so that contenders with a wider one compute with the same values.
    """
    operands = draw_operands(
        case.M,
        case.K,
        case.N,
        case.R,
        DTYPES[case.dtype],
        device,
        bias=case.bias,
        scaling=2.0,
        generator=torch.Generator(device).manual_seed(SEED),
    )
    operands.x.requires_grad_()
    return operands


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors start as NaN, so that what nobody writes cannot hold an earlier contender's answer."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def verdict(got: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, float]) -> dict[str, dict]:
    """Return for every result its error, what is allowed, and whether that is kept.

    plain: the plain formula's error for each. Raises ValueError for a wrong shape.
    """
    found = {}
    for name, tensor in got.items():
        if tensor.shape != exact[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(exact[name].shape)}")
        error = relative_error(tensor, exact[name])
        allowed = allowed_error(plain[name], tensor.dtype)
        # JSON has no NaN.
        finite = math.isfinite(error)
        found[name] = {
            "error": float(f"{error:.4g}") if finite else None,
            "allowed": float(f"{allowed:.4g}"),
            "kept": finite and error <= allowed,
        }
    return found


def broken(errors: dict[str, dict]) -> str | None:
    """Return what to say of results outside the budget, or None if all are within."""
    wrong = [name for name, error in errors.items() if not error["kept"]]
    return f"outside the error budget: {', '.join(wrong)}" if wrong else None


class Judge:
    """Compares contenders of one case with fp64 on the same operands."""

    def __init__(self, case: Case, operands: Operands):
        self.case = case
        self.operands = operands
        self._known: dict[tuple, tuple[dict[str, Tensor], dict[str, float]]] = {}

    def errors(self, contender: Contender, layer: Layer) -> dict[str, dict]:
        """Return the verdict on y, dx, and the gradients of what the layer trains."""
        mask = self._mask(contender)
        torch.manual_seed(SEED)
        # A compiler would compile for poisoned memory, and once more for what is timed.
        with contextlib.nullcontext() if contender.compiled else poisoned_memory():
            got = compute(layer, self.operands)
        return verdict(got, *self._right(contender, mask))

    def errors_of(self, contender: Contender, got: dict[str, Tensor]) -> dict[str, dict]:
        """Return the verdict on results that were computed without dropout."""
        return verdict(got, *self._right(contender, None))

    def _right(self, contender: Contender, mask: Tensor | None) -> tuple[dict[str, Tensor], dict[str, float]]:
        key = (contender.adapted, contender.base, contender.mask_dtype if self.case.dropout else None)
        if key not in self._known:
            inputs = self.operands
            if not contender.adapted:
                inputs = replace(inputs, lora_B=torch.zeros_like(inputs.lora_B))
            if contender.base:
                inputs = replace(inputs, weight=quantised(inputs.weight, contender.base).dense())
            exact = plain_formula(inputs, torch.float64, mask, train_A=True)
            plain = plain_formula(inputs, None, mask, train_A=True)
            names = exact if contender.adapted else ("y", "dx")
            self._known[key] = exact, {name: relative_error(plain[name], exact[name]) for name in names}
        return self._known[key]

    def _mask(self, contender: Contender) -> Tensor | None:
        p = self.case.dropout
        if not p or not contender.adapted:
            return None
        torch.manual_seed(SEED)
        if contender.mask_dtype == SEEDED:
            x = self.operands.x
            return keep_mask(draw_seed(x.device), p, *x.shape).double() / (1 - p)
        like = torch.ones_like(self.operands.x, dtype=DTYPES[getattr(self.case, contender.mask_dtype)])
        # 1/(1 − p) itself, and not rounded to the dtype in which the mask was drawn.
        return (F.dropout(like, p) != 0).double() / (1 - p)
