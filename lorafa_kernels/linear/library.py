"""The formula by PyTorch's matrix products: the fast path without Triton, and the plan "library" with it.

    forward    z  = s · (x lora_Aᵀ)                 one product, s applied to its accumulator
               y  = z lora_Bᵀ + bias, then y += x weightᵀ in place
    backward   dz = s · (dy lora_B)
               dB = dyᵀ z
               dx = dz lora_A, then dx += dy weight in place

Shapes as in reference.py. The rank-R product comes first and the large product accumulates into its result;
the other order would read the output once more. For fp32 and fp64 on a CPU the large product comes first
(sums_in_place): CPU BLAS adds the terms of the second product to the output one by one and rounds each time,
and K such roundings would exceed the error budget. No temporary of M·N or M·K elements is made. One of the
two products is rounded once more than in the formula; dB is rounded to the dtype of x where the backend has
no product with an fp32 result (product_dtype).

With dropout, z is made of x ⊙ keep; the rank-R term of dx is multiplied with keep/(1 − p) in fp32 and added
to dy weight. Both work on a chunk of rows at a time (philox.CHUNK), which bounds the temporaries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..philox import keep_chunks

# The dtypes that sums_in_place holds for on a CPU.
SUMMED_IN_PLACE = (torch.float32, torch.float64)
_NARROW = (torch.bfloat16, torch.float16)
# What Tensor.to does, without its search for what the arguments mean, which takes as long as a small cast.
_CAST = {
    torch.float32: Tensor.float,
    torch.float64: Tensor.double,
    torch.bfloat16: Tensor.bfloat16,
    torch.float16: Tensor.half,
}
# The package may be imported under a mode that makes other tensors than these.
with _disable_current_modes():
    _ADDED_TIMES_0 = {d: torch.zeros((), dtype=d, device="cpu") for d in (*SUMMED_IN_PLACE, *_NARROW)}


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y (M, N) and z (M, R); arguments and dtypes as in reference.forward."""
    dtype, on_cpu = x.dtype, x.is_cpu
    A = lora_A if lora_A.dtype is dtype else _CAST[dtype](lora_A)
    B = lora_B if lora_B.dtype is dtype else _CAST[dtype](lora_B)
    if dropout_p:
        z = dropped_product(x, A.mT, scaling / (1 - dropout_p), dropout_p, seed)
    elif on_cpu and scaling != 1.0 and type(x) is Tensor:
        # As scaled_product: of a small layer every call counts.
        z = torch.addmm(_ADDED_TIMES_0[dtype], x, A.mT, beta=0, alpha=scaling)
    else:
        z = scaled_product(x, A.mT, scaling)
    if on_cpu and dtype in SUMMED_IN_PLACE and z.numel() <= x.numel():
        return F.linear(x, weight, bias).addmm_(z, B.mT), z
    return F.linear(z, B, bias).addmm_(x, weight.mT), z


def backward(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute dx (M, K) and dB (N, R); arguments and dtypes as in reference.backward."""
    dtype, on_cpu = dy.dtype, dy.is_cpu
    A = lora_A if lora_A.dtype is dtype else _CAST[dtype](lora_A)
    B = lora_B if lora_B.dtype is dtype else _CAST[dtype](lora_B)
    if on_cpu and scaling != 1.0 and type(dy) is Tensor:
        # As scaled_product. Of z no value is read: it has the shape of dz.
        dz = torch.addmm(z, dy, B, beta=0, alpha=scaling)
    else:
        dz = scaled_product(dy, B, scaling)
    if dropout_p or not on_cpu:
        dx = input_gradient(dy, dz, weight, A, dropout_p, seed)
    elif dtype in SUMMED_IN_PLACE and dz.numel() <= dy.numel():
        dx = dy.mm(weight).addmm_(dz, A)
    else:
        dx = dz.mm(A).addmm_(dy, weight)
    return dx, dy.mT.mm(z) if B is lora_B else backward_lora_B(dy, z, lora_B.dtype)


def backward_input(
    dy: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute dx (M, K) alone."""
    dz = scaled_product(dy, in_dtype(lora_B, dy.dtype), scaling)
    return input_gradient(dy, dz, weight, lora_A, dropout_p, seed)


def input_gradient(
    dy: Tensor,
    dz: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute dx (M, K) where dz (M, R) is known, s included and 1/(1 − p) not."""
    A = in_dtype(lora_A, dy.dtype)
    if dropout_p:
        dx = dy.mm(weight)
        add_dropped(dx, dz, A, dropout_p, seed)
        return dx
    if sums_in_place(dy) and A.shape[0] <= dy.shape[1]:
        return dy.mm(weight).addmm_(dz, A)
    return dz.mm(A).addmm_(dy, weight)


def add_dropped(dx: Tensor, dz: Tensor, A: Tensor, dropout_p: float, seed: Tensor) -> None:
    """dx += keep/(1 − p) ⊙ (dz A) in place, some rows at a time."""
    for rows, keep in keep_chunks(seed, dropout_p, *dx.shape):
        # `value` multiplies in fp32, where 1/(1 − p) cannot overflow. A product with keep, not a selection:
        # NaN and Inf propagate, as in the plain formula.
        dx[rows].addcmul_(dz[rows].mm(A), in_dtype(keep, dx.dtype), value=1 / (1 - dropout_p))


def sums_in_place(rows: Tensor) -> bool:
    """Whether adding a product of these rows to a tensor rounds after every term, as CPU BLAS does for fp32
    and fp64. On other devices, and for 16 bits, the product is summed in registers and added once.

    If so, of the products that share an output the one with the longest contraction comes first: no later one
    rounds more often than that.
    """
    return rows.is_cpu and rows.dtype in SUMMED_IN_PLACE


def backward_lora_B(dy: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute dB = dyᵀ z (N, R) in `dtype`."""
    if dtype != dy.dtype:
        out = product_dtype(dy.dtype, dtype, dy.is_cuda and torch.version.hip is None)
        if out != dy.dtype:
            return in_dtype(torch.mm(dy.mT, z, out_dtype=out), dtype)
    return in_dtype(dy.mT.mm(z), dtype)


def product_dtype(operands: torch.dtype, wanted: torch.dtype, cuda: bool) -> torch.dtype:
    """Return the dtype of the result of a product of `operands`, for a value that is stored in `wanted`: fp32
    from 16-bit operands with CUDA, by torch.mm(out_dtype=), else the operands' own.
    """
    if cuda and operands in _NARROW and wanted not in _NARROW:
        return torch.float32
    return operands


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    if scaling == 1.0:
        # The same bits, without the calls that another factor takes.
        return left.mm(right)
    # beta=0 ignores what is added; alpha multiplies the accumulator before the only rounding. Scaling
    # afterwards would round 16-bit results twice, and in fp16 overflow where the scaled product fits.
    if type(left) is Tensor and left.is_cpu:
        return torch.addmm(_ADDED_TIMES_0[left.dtype], left, right, beta=0, alpha=scaling)
    product = left.new_empty((left.shape[0], right.shape[1]))
    return product.addmm_(left, right, beta=0, alpha=scaling)


def dropped_product(left: Tensor, right: Tensor, scaling: float, dropout_p: float, seed: Tensor) -> Tensor:
    """scaling · ((left ⊙ keep) right), some rows at a time."""
    product = left.new_empty((left.shape[0], right.shape[1]))
    for rows, keep in keep_chunks(seed, dropout_p, *left.shape):
        # A product and no selection: what is not finite propagates, as in the plain formula.
        product[rows].addmm_(left[rows] * keep, right, beta=0, alpha=scaling)
    return product


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else _CAST[dtype](tensor)
