"""The accuracy of blocks, measured as budget.py does for one layer: what a block returns, and what its
formula gives in plain PyTorch in any dtype.

A block has several outputs and several lora_B. Those are one vector here, "y", and their gradients another,
"dB": an error is that of all elements together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..group.api import lorafa_linear_group
from ..group.operands import LinearOperands
from ..mlp.api import lorafa_gated_mlp
from ..norm import rms_norm

EPS = 1e-6
SCALING = 0.7
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Block:
    """shapes(N, K): of the weights of its layers. compute(x, layers, impl) -> outputs. formula(x, linears) ->
    outputs in plain PyTorch, given the layers as functions of their input.
    """

    shapes: Callable[[int, int], tuple[tuple[int, int], ...]]
    compute: Callable[[Tensor, list[LinearOperands], str], tuple[Tensor, ...]]
    formula: Callable[[Tensor, list[Callable[[Tensor], Tensor]]], tuple[Tensor, ...]]


def _gated(x: Tensor, linears: list[Callable[[Tensor], Tensor]]) -> tuple[Tensor, ...]:
    gate, up, down = linears
    return (down(F.silu(gate(x)) * up(x)),)


BLOCKS = {
    # As q, k and v where k and v have fewer heads.
    "group": Block(
        lambda N, K: ((N, K), (N // 2, K), (N // 2, K)),
        lambda x, layers, impl: lorafa_linear_group(x, layers, impl=impl),
        lambda x, linears: tuple(linear(x) for linear in linears),
    ),
    "mlp": Block(
        lambda N, K: ((N, K), (N, K), (K, N)),
        lambda x, layers, impl: (lorafa_gated_mlp(x, *layers, impl=impl),),
        _gated,
    ),
}


@dataclass
class BlockOperands:
    """x (M, K), the layers, and the gradients dys of the outputs."""

    x: Tensor
    layers: list[LinearOperands]
    dys: list[Tensor]


def draw_block(
    name: str, M: int, N: int, K: int, R: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> BlockOperands:
    """Draw a block of BLOCKS with adapters of rank R in every layer, lora_B in fp32, the same on every
    device. As draw_operands, scaled so that all terms matter.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        wide = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return wide.mul_(scale).to(device, dtype)

    block = BLOCKS[name]
    layers = [
        LinearOperands(
            weight=draw(n, k, scale=k**-0.5),
            bias=draw(n),
            lora_A=draw(R, k, scale=k**-0.5),
            lora_B=draw(n, R, scale=R**-0.5, dtype=torch.float32),
            scaling=SCALING,
        )
        for n, k in block.shapes(N, K)
    ]
    x = draw(M, K)
    with torch.no_grad():
        shapes = [y.shape for y in block.formula(x, [_linear(layer) for layer in layers])]
    return BlockOperands(x, layers, [draw(*shape) for shape in shapes])


def block_results(name: str, operands: BlockOperands, impl: str) -> Results:
    """Return y, dx and dB of a block of BLOCKS by this library."""
    return _differentiated(
        operands.x, operands.layers, operands.dys, lambda x, layers: BLOCKS[name].compute(x, layers, impl)
    )


def plain_block(name: str, operands: BlockOperands, dtype: torch.dtype | None = None) -> Results:
    """Return y, dx and dB by the formula that people write, computed in `dtype` (default: x's). lora_B is
    rounded to the dtype of x first, which is what this library promises to do with it.
    """
    own = operands.x.dtype
    to = dtype or own
    layers = [
        LinearOperands(*(None if t is None else t.to(own).to(to) for t in layer[:4]), *layer[4:])
        for layer in operands.layers
    ]

    def compute(x: Tensor, layers: list[LinearOperands]) -> tuple[Tensor, ...]:
        return BLOCKS[name].formula(x, [_linear(layer) for layer in layers])

    return _differentiated(operands.x.to(to), layers, [dy.to(to) for dy in operands.dys], compute)


def norm_results(x: Tensor, weight: Tensor, dy: Tensor, form: str) -> Results:
    """Return y and dx of rms_norm in this form."""
    return _differentiated(x, [], [dy], lambda x, _: (rms_norm(x, weight, EPS, form),))


def plain_norm(x: Tensor, weight: Tensor, dy: Tensor, form: str, dtype: torch.dtype | None = None) -> Results:
    """Return y and dx by the formula with autograd: as the models write it, or all in `dtype`."""
    wide = dtype or torch.float32
    narrow = dtype or x.dtype

    def compute(x: Tensor, _) -> tuple[Tensor, ...]:
        hat = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + EPS)
        if form == "gemma":
            return ((hat * (1.0 + weight.to(wide))).to(narrow),)
        return (weight.to(narrow) * hat.to(narrow),)

    return _differentiated(x.to(narrow), [], [dy.to(narrow)], compute)


def _linear(layer: LinearOperands) -> Callable[[Tensor], Tensor]:
    def linear(x: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(x, layer.lora_A), layer.lora_B.to(x.dtype))
        return F.linear(x, layer.weight, layer.bias) + layer.scaling * low_rank

    return linear


def _differentiated(
    x: Tensor,
    layers: list[LinearOperands],
    dys: list[Tensor],
    compute: Callable[[Tensor, list[LinearOperands]], tuple[Tensor, ...]],
) -> Results:
    x = x.detach().requires_grad_()
    trained = [layer._replace(lora_B=layer.lora_B.detach().requires_grad_()) for layer in layers]
    ys = compute(x, trained)
    dx, *dBs = torch.autograd.grad(ys, (x, *(layer.lora_B for layer in trained)), dys)
    found = {"y": _together(ys), "dx": dx}
    return {**found, "dB": _together(dBs)} if dBs else found


def _together(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
