"""RMS norm with a frozen weight: keeps x itself and one fp32 number a row for backward.

x (..., H), weight (H,), rstd (..., 1) = (mean of x² + eps)^(-1/2) in fp32. The forms differ in where they
round, and are named after the model that has them:

    llama    y = weight · round(x · rstd)         rounded to x.dtype (Llama, Mistral, Qwen, Phi-3)
    gemma    y = round(x · rstd · (1 + weight))   in fp32, rounded to x.dtype (Gemma)
    t5       y = weight · round(x · rstd)         rounded to weight.dtype, and only if that has 16 bits (T5)

    dx = rstd · (g − x · rstd² · mean of g · x),  g = dy · weight, gemma: dy · (1 + weight)

Written with autograd, each keeps an fp32 copy of a 16-bit x, twice the size of x; so does
torch.nn.functional.rms_norm on a CPU, where it is made of small operations (two such copies). On a GPU
torch's is one kernel that keeps x and rstd, and is used where it rounds as the model does: without a weight,
which is multiplied afterwards, since with one it would round once. Liger's norm keeps the same two, and
writes its gradient into dy, which belongs to the caller: it is not used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import first_order, watched
from .operands import FLOAT_DTYPES, LARGEST_NUMBER, check_tensor, real_number

FORMS = ("llama", "gemma", "t5")
HALF = (torch.float16, torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    """Return y (..., H) from x (..., H) and the frozen weight (H,), with the values of transformers' module.

    Args:
        x: any strides; fp32, bf16, fp16 or fp64.
        weight: frozen; of x's dtype or another of these. y is in the dtype of weight · x ("gemma": of x).
        eps: added to the mean of squares.
        form: "llama", "gemma" or "t5", as in the module's docstring.

    Raises:
        ValueError: shapes that do not fit; a weight that requires grad; mixed devices; an eps that is
            negative or not finite; an unknown form.
        TypeError: dtypes that are not floating point; tensors that are not dense; an eps that is no real
            number.
    """
    eps = _check(x, weight, eps, form)
    if _torch_has_it(x, weight, form):
        # Autocast would widen x, and the copy would be kept.
        with torch.autocast(x.device.type, enabled=False):
            return weight * F.rms_norm(x, weight.shape, eps=eps)
    if torch.is_grad_enabled() and x.requires_grad:
        return RMSNormFunction.apply(x, weight, eps, form)
    return _forward(x, weight, eps, form)[0]


def _check(x: Tensor, weight: Tensor, eps: float, form: str) -> float:
    """Return eps as a float, after all checks."""
    check_tensor("x", x, frozen=False)
    check_tensor("weight", weight)
    if not isinstance(form, str) or form not in FORMS:
        raise ValueError(f"unknown form {form!r} of RMS norm, expected one of {', '.join(FORMS)}")
    if weight.dim() != 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (H,)")
    if x.dim() == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {weight.shape[0]})")
    if weight.requires_grad:
        raise ValueError(
            "weight requires grad, but this norm keeps it frozen and would give it no gradient: call "
            "weight.requires_grad_(False)"
        )
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}: both must be on one device")
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, FLOAT_DTYPES))}"
            )
    if type(eps) is not float:
        eps = real_number("eps", eps)
    if not 0.0 <= eps <= LARGEST_NUMBER:
        raise ValueError(f"eps must be finite, at most {LARGEST_NUMBER:.4g}, and not negative, got {eps}")
    return eps


def _torch_has_it(x: Tensor, weight: Tensor, form: str) -> bool:
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    return form == "llama" or (form == "t5" and x.dtype == weight.dtype)


class RMSNormFunction(torch.autograd.Function):
    """y from x (..., H) and weight (H,); a gradient for x only. Kept: x, rstd (..., 1) and weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
        y, rstd = _forward(x, weight, eps, form)
        ctx.save_for_backward(x, rstd, weight)
        ctx.form = form
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        (dx,) = first_order(_gradients, ctx, dy)
        return dx, None, None, None


def _gradients(ctx, dy: Tensor) -> tuple[Tensor]:
    return (_backward(dy, *ctx.saved_tensors, ctx.form),)


def _forward(x: Tensor, weight: Tensor, eps: float, form: str) -> tuple[Tensor, Tensor]:
    """Return y and rstd (..., 1). Operation by operation as transformers, for the same bits."""
    # Written in place what is this function's own, unless a mode may have saved it (selective checkpointing).
    multiply = torch.mul if watched() else Tensor.mul_
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form == "t5":
        del wide
        hat = x * rstd
        return weight * (hat.to(weight.dtype) if weight.dtype in HALF else hat), rstd
    hat = wide * rstd if wide is x else multiply(wide, rstd)
    if form == "gemma":
        return multiply(hat, 1.0 + weight.float()).to(x.dtype), rstd
    return weight * hat.to(x.dtype), rstd


def _backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, form: str) -> Tensor:
    """Return dx (..., H) in the dtype of x, computed in fp32 (fp64 for an x of fp64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    scale = weight.to(dtype)
    g = dy * (1.0 + scale if form == "gemma" else scale)
    mean = (g * x).mean(-1, keepdim=True)
    return g.addcmul_(x, mean.mul_(rstd.square()), value=-1).mul_(rstd).to(x.dtype)
