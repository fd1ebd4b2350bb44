"""The gated MLP on quantised bases: the function that checks, and the autograd node.

The node of ops.py, with quantised groups for its linear layers: it keeps g, u, the z, lora_A and lora_B
objects and seeds that that one keeps, and in the place of the weights the codes and scales of the bases, the
objects themselves. One dense weight is there at a time (group/quantised.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import first_order
from ..group import quantised as group
from ..group.operands import LinearOperands, inverses_of
from ..linear.quantised import out_of_compute_dtype
from ..operands import as_rows, draw_seed, shaped_as
from ..plan.choice import check_impl
from . import ops
from .activation import check_activation
from .api import check_down, check_up

_QUANTISED = ops.Linears(group.forward, group.backward)


def quantised_gated_mlp(
    x: Tensor,
    gate: LinearOperands,
    up: LinearOperands,
    down: LinearOperands,
    *,
    activation: str = "silu",
    impl: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute y = down(act(gate(x)) · up(x)) of three layers on quantised bases: the weight of each is a
    QuantisedBase, of any kind.

    As lorafa_gated_mlp, which has the arguments and errors; those about a weight are about the dtype, shape
    and device of the W that a base stands for, and about the tensors of the base. compute_dtype: what x, and
    all that is computed, is cast to outside of autocast, y coming back in the dtype of x.
    """
    check_impl(impl)
    check_activation(activation)
    given, (x, layers) = x, _checked(x, gate, up, down, compute_dtype)
    rows = as_rows(x, gate.weight.shape[1])

    bases, biases, lora_As, lora_Bs, scalings, dropout_ps, _ = map(list, zip(*layers, strict=True))
    dropout_ps = [0.0 if B is None else p for p, B in zip(dropout_ps, lora_Bs, strict=True)]
    seeds = draw_seed(x.device, 3) if any(dropout_ps) else None
    if torch.is_grad_enabled() and (
        x.requires_grad or any(B is not None and B.requires_grad for B in lora_Bs)
    ):
        tensors = (*lora_Bs, *biases, *lora_As, *inverses_of(layers), *group.tensors_of(bases))
        how = (scalings, dropout_ps, activation, impl, *group.static_parts(bases))
        y = QuantisedGatedMLPFunction.apply(rows, seeds, *how, *tensors)
    else:
        operands = lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, activation, impl
        y = ops.gated_mlp(rows, bases, *operands, _QUANTISED)
    return out_of_compute_dtype(shaped_as(y, x), given, compute_dtype)


def _checked(
    x: Tensor,
    gate: LinearOperands,
    up: LinearOperands,
    down: LinearOperands,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor, list[LinearOperands]]:
    """Return x in the dtype to compute in, and the layers with their numbers as floats, after all checks."""
    checked, found = [], x
    for name, member in (("gate", gate), ("up", up), ("down", down)):
        try:
            group.check_is_quantised(member)
            base = member.weight
            if name == "down":
                check_down(base, gate.weight)
                group.check_alike(base, gate.weight, "gate")
                # Stands for h: no rows, and the columns, dtype and device that the checks look at.
                h = x.new_empty((0, base.shape[1]))
                member = group.checked_quantised(h, member, compute_dtype)[1]
            else:
                check_up(base, gate.weight)
                found, member = group.checked_quantised(x, member, compute_dtype)
            checked.append(member)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None
    return found, checked


class QuantisedGatedMLPFunction(torch.autograd.Function):
    """y (M, N) from x (M, K), the static parts of the bases of gate, up and down (kinds, shapes, dtype), the
    lora_Bs, biases, lora_As and inverses, three of each in this order, None for what a layer lacks, and the
    tensors of the bases; gradients for x and the lora_Bs only.
    """

    @staticmethod
    def forward(
        ctx, x, seeds, scalings, dropout_ps, activation, impl, kinds, shapes, dtype, *operands
    ) -> Tensor:
        bases = group.bases_of(operands[12:], kinds, shapes, dtype)
        by_role = (operands[i : i + 3] for i in range(0, 12, 3))
        how = scalings, dropout_ps, activation, impl
        y, kept = ops.keeping_forward(ctx, _QUANTISED, x, seeds, *how, [bases, *by_role])
        used = [place for place, base in enumerate(kept.weights) if base is not None]
        tensors = group.tensors_of([bases[place] for place in used])
        ctx.save_for_backward(*kept.values, *kept.lora_Bs, *kept.lora_As, *kept.inverses, *tensors)
        ctx.used = used
        ctx.bases = [kinds[place] for place in used], [shapes[place] for place in used], dtype
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        dx, *dBs = first_order(_gradients, ctx, dy)
        return dx, *[None] * 8, *dBs, *[None] * (len(ctx.needs_input_grad) - 12)


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    lora_Bs, lora_As, inverses = (saved[i : i + 3] for i in range(5, 14, 3))
    bases: list = [None] * 3
    for place, base in zip(ctx.used, group.bases_of(saved[14:], *ctx.bases), strict=True):
        bases[place] = base
    return ops.gradients(ctx, _QUANTISED, dy, ops.Kept(saved[:5], lora_Bs, bases, lora_As, inverses))
