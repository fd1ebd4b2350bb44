"""The accuracy that is promised, measured one way by the tests, the doctor and the benchmarks.

    error   = ‖got − exact‖ / ‖exact‖     Frobenius norms; exact: the formula in fp64 from the same rounded
    inputs allowed = 2 · error of the plain PyTorch formula in the same dtype + unit roundoff of the
    output's dtype

Measured well on outputs of 256 elements or more; smaller ones are to be pooled over many draws.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear.api import lorafa_linear
from ..operands import draw_seed
from ..philox import keep_mask


@dataclass
class Operands:
    """Operands of one layer and its output's gradient, shapes as in linear/reference.py.

    lora_B, and nothing else, may be of another dtype than x. torch_seed: what torch's generator is seeded
    with before a layer with dropout of probability dropout_p draws its own seed.
    """

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float
    dropout_p: float = 0.0
    torch_seed: int = 0

    @contextlib.contextmanager
    def seeded(self) -> Iterator[None]:
        """Within it layers draw the seeds of these operands; torch's generators go on as before after it."""
        devices = [self.x.device] if self.x.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.torch_seed)
            yield

    def mask(self) -> Tensor | None:
        """Return what a layer multiplies the low-rank term's input with, keep/(1 − p) (M, K) in fp64, or None
        without dropout.
        """
        if not self.dropout_p:
            return None
        with self.seeded():
            seed = draw_seed(self.x.device)
        return keep_mask(seed, self.dropout_p, *self.x.shape).double() / (1 - self.dropout_p)


def draw_operands(
    M: int,
    K: int,
    N: int,
    R: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    bias: bool = True,
    factor_dtype: torch.dtype | None = None,
    seed: int = 0,
    scaling: float = 0.7,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Operands:
    """Draw operands in `dtype`, lora_B in `factor_dtype` (default `dtype`), the same on every device.

    They are scaled so that the base product and the low-rank term both matter in y and dx. generator: draws
    on its own device instead, which is faster for large operands on a GPU; `seed` is then not used, but as
    the torch_seed of dropout.
    """
    generator = generator or torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0, dtype=dtype):
        wide = torch.randn(*shape, generator=generator, dtype=torch.float64, device=generator.device)
        return wide.mul_(scale).to(device, dtype)

    return Operands(
        x=draw(M, K),
        weight=draw(N, K, scale=max(K, 1) ** -0.5),
        lora_A=draw(R, K, scale=max(K, 1) ** -0.5),
        lora_B=draw(N, R, scale=R**-0.5, dtype=factor_dtype or dtype),
        bias=draw(N) if bias else None,
        dy=draw(M, N),
        scaling=scaling,
        dropout_p=dropout_p,
        torch_seed=seed,
    )


def lorafa_results(operands: Operands, impl: str) -> dict[str, Tensor]:
    """Return y (M, N), dx (M, K) and dB (N, R) through lorafa_linear and autograd."""
    x, lora_B = (tensor.detach().requires_grad_() for tensor in (operands.x, operands.lora_B))
    options = {"scaling": operands.scaling, "dropout_p": operands.dropout_p, "impl": impl}
    with operands.seeded():
        y = lorafa_linear(x, operands.weight, operands.lora_A, lora_B, operands.bias, **options)
    dx, dB = torch.autograd.grad(y, (x, lora_B), operands.dy)
    return {"y": y.detach(), "dx": dx, "dB": dB}


def plain_formula(
    operands: Operands,
    dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
    train_A: bool = False,
) -> dict[str, Tensor]:
    """Return y (M, N), dx (M, K) and dB (N, R), with train_A also dA (R, K), by the formula that people
    write, with autograd, computed in `dtype` (default: x's).

    lora_B is rounded to the dtype of x first, which is what the operator promises to do with it. mask (M, K):
    what the low-rank term's input is multiplied with, 0 or 1/(1 − p), instead of the operands' own.
    """
    mask = operands.mask() if mask is None else mask
    own = operands.x.dtype
    to = dtype or own
    x, lora_A, lora_B = (
        tensor.to(own).to(to).detach() for tensor in (operands.x, operands.lora_A, operands.lora_B)
    )
    wanted = {"dx": x, "dB": lora_B} | ({"dA": lora_A} if train_A else {})
    for tensor in wanted.values():
        tensor.requires_grad_()
    bias = None if operands.bias is None else operands.bias.to(to)
    # As torch's dropout: one rounding, that of the product.
    wide = torch.promote_types(to, torch.float32)
    dropped = x if mask is None else (x.to(wide) * mask.to(wide)).to(to)
    low_rank = F.linear(F.linear(dropped, lora_A), lora_B)
    y = F.linear(x, operands.weight.to(to), bias) + operands.scaling * low_rank
    found = torch.autograd.grad(y, tuple(wanted.values()), operands.dy.to(to))
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return ‖got − exact‖ / ‖exact‖; NaN or inf if `got` is not finite everywhere."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return half the distance from 1 to the next number of `dtype`."""
    return torch.finfo(dtype).eps / 2


def allowed_error(plain_error: float, dtype: torch.dtype) -> float:
    """Return the error that an output of `dtype` may have where the plain formula has `plain_error`."""
    return 2 * plain_error + unit_roundoff(dtype)
