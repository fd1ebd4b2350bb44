"""The gated activation of an MLP, and its gradients, in plain PyTorch.

    forward    h  = round( act(g) · u )
    backward   dg = round( dh · u · act'(g) )
               du = round( dh · act(g) )

    g, u, h    (M, I) outputs of the gate and of the up projection, input of the down projection: one dtype
    dh, dg, du (M, I) their gradients, in that dtype
    act        "silu"       g / (1 + exp(−g))
               "gelu"       g · (1 + erf(g/√2)) / 2
               "gelu_tanh"  g · (1 + tanh(√(2/π) (g + 0.044715 g³))) / 2

Twice: `reference_*` computes in fp32 or wider and rounds once, as written above; `library_*` is made of
PyTorch's own operators, which round act(g) and dh · u on the way. dh is of no use once both gradients are
made: dg is written over it, and then nothing but du takes memory.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear.reference import accumulator_dtype

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
# torch's name of gelu's two forms.
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def check_activation(activation: str) -> None:
    """Raise ValueError unless `activation` is the name of one."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation={activation!r} is not known: expected one of {names}")


def activate(g: Tensor, activation: str) -> Tensor:
    """Return act(g) by PyTorch's operator, a new contiguous tensor."""
    g = g.contiguous()
    return F.silu(g) if activation == "silu" else F.gelu(g, approximate=_APPROXIMATE[activation])


def reference_gated(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """Compute h (M, I) in the dtype of g."""
    wide = accumulator_dtype(g.dtype)
    value, _ = _value_and_slope(g.to(wide), activation)
    return (value * u.to(wide)).to(g.dtype).contiguous()


def reference_gated_backward(
    dh: Tensor, g: Tensor, u: Tensor | None, activation: str, need_du: bool
) -> Tensor | None:
    """Write dg over dh and return du, or None if it is not wanted. u=None: dg is not wanted, and du is
    written over dh.
    """
    wide = accumulator_dtype(g.dtype)
    value, slope = _value_and_slope(g.to(wide), activation)
    du = (dh.to(wide) * value).to(dh.dtype).contiguous()
    if u is None:
        dh.copy_(du)
        return None
    dh.copy_(dh.to(wide) * u.to(wide) * slope)
    return du if need_du else None


def library_gated(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """Compute h (M, I) as reference_gated, with act(g) rounded as well."""
    return activate(g, activation).mul_(u)


def library_gated_backward(
    dh: Tensor, g: Tensor, u: Tensor | None, activation: str, need_du: bool
) -> Tensor | None:
    """Write dg over dh and return du, as reference_gated_backward."""
    if u is None:
        dh.mul_(activate(g, activation))
        return None
    du = activate(g, activation).mul_(dh) if need_du else None
    dh.mul_(u)
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(dh, g, grad_input=dh)
    else:
        approximate = _APPROXIMATE[activation]
        torch.ops.aten.gelu_backward.grad_input(dh, g, approximate=approximate, grad_input=dh)
    return du


def _value_and_slope(g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return act(g) and act'(g)."""
    if activation == "silu":
        sigmoid = torch.sigmoid(g)
        return g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
        density = torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
        return g * cdf, cdf + g * density
    scale = math.sqrt(2 / math.pi)
    tanh = torch.tanh(scale * (g + 0.044715 * g**3))
    cdf = 0.5 * (1 + tanh)
    return g * cdf, cdf + 0.5 * g * (1 - tanh * tanh) * scale * (1 + 3 * 0.044715 * g * g)
