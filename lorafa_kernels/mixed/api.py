"""lorafa_linear_mixed: check the arguments, apply autocast's casts, flatten, draw the seed of dropout, and
call the autograd node.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..group.operands import LinearOperands, check_kinds, checked_member, inverses_of
from ..operands import as_rows, draw_seed, shaped_as
from ..plan.choice import check_impl
from . import ops
from .rows import Rows


def lorafa_linear_mixed(
    x: Tensor, adapters: Mapping[int, LinearOperands], rows: Rows, *, impl: str = "auto"
) -> Tensor:
    """Apply a linear layer of which each sample of a batch takes one adapter: row m of sample b is
    y_m = x_m weightᵀ + s_i · (x_m lora_A_iᵀ) lora_B_iᵀ + bias with i = rows.places[b], without the second
    term where i is −1 or not in adapters.

    As lorafa_linear for each adapter and its rows, in one autograd node with one product for the base of all
    rows. Gradients flow to x and to each lora_B only; that of an adapter without rows is zero. An adapter's
    values, were they not finite, reach no row of another.

    Args:
        x: (B, ..., K), fp32, bf16, fp16 or fp64. Any strides.
        adapters: {number: operands}, at least one, with the same weight (N, K) and bias in all. Those that
            have the same lora_A object, scaling and dropout_p take one product for z.
        rows: which sample has which adapter, B entries.
        impl: "auto" (that is "torch", unless a plan "fused" is pinned), "triton", "torch" or "reference".

    Returns:
        y (B, ..., N) in the dtype of x, or autocast's under autocast.

    With dropout, one seed makes the mask of all rows, by row and column as in lorafa_linear.

    Raises:
        ValueError: x that does not fit the index; and what lorafa_linear raises it for.
        TypeError: as lorafa_linear.
        RuntimeError: impl="triton" without what it needs.
    """
    check_impl(impl)
    given = x
    members = []
    for number, member in adapters.items():
        try:
            check_kinds(given, member)
            x, member = checked_member(given, member)
        except (ValueError, TypeError) as error:
            raise type(error)(f"adapter {number}: {error}") from None
        members.append(member)
    rows.check(given)
    numbers = tuple(adapters)
    weight, bias = members[0].weight, members[0].bias
    lora_As, lora_Bs, scalings, dropout_ps = (
        [getattr(member, name) for member in members] for name in ("lora_A", "lora_B", "scaling", "dropout_p")
    )
    matrix, index = as_rows(x, weight.shape[1]), rows.on(x.device)
    seed = draw_seed(x.device) if any(dropout_ps) else None
    if torch.is_grad_enabled() and (x.requires_grad or any(B.requires_grad for B in lora_Bs)):
        how = rows.places, numbers, tuple(scalings), tuple(dropout_ps), impl
        y = ops.LoRAFAMixedFunction.apply(
            matrix, weight, bias, index, seed, how, *lora_Bs, *lora_As, *inverses_of(members)
        )
    else:
        arguments = (index, rows.places, numbers, scalings, dropout_ps, seed, impl)
        y, _ = ops.mixed_forward(matrix, weight, lora_As, lora_Bs, bias, *arguments)
    return shaped_as(y, x)
