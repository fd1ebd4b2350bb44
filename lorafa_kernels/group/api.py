"""lorafa_linear_group: check the arguments, apply autocast's casts, flatten, draw the seeds of dropout, and
call the autograd node.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..operands import as_rows, draw_seed, shaped_as
from ..plan.choice import check_impl
from . import ops
from .operands import LinearOperands, check_kinds, checked_member, inverses_of, member_fits


def lorafa_linear_group(
    x: Tensor, members: Sequence[LinearOperands], *, share_A: bool = False, impl: str = "auto"
) -> tuple[Tensor, ...]:
    """Apply linear layers to one x: y_i = x weight_iᵀ + s_i · (x lora_A_iᵀ) lora_B_iᵀ + bias_i.

    As lorafa_linear for each member, in one autograd node: one pass over x for all z, and one dx, written
    once, where autograd would add up one from each layer. Gradients flow to x and to each lora_B only.

    Args:
        x: (..., K), fp32, bf16, fp16 or fp64. Any strides.
        members: at least one; weights (N_i, K) of one K, dtype and device. A member without lora_A and
            lora_B is a plain frozen linear layer. Dropout masks are drawn for each member on its own.
        share_A: the adapted members have the same lora_A object, scaling, dropout and gradient_correction: z
            is computed, and kept, once; they share one dropout mask.
        impl: "auto", "triton", "torch" or "reference"; plan/choice.py has the rule of "auto".

    Returns:
        y_i (..., N_i) for each member, separate tensors in the dtype of x, or autocast's under autocast.

    Raises:
        ValueError: no members; members that disagree in K, dtype or device; with share_A in lora_A, scaling,
            dropout or gradient_correction; one of lora_A and lora_B without the other; and what lorafa_linear
            raises it for.
        TypeError: a share_A that is no bool; members that are no sequence of LinearOperands; and what
            lorafa_linear raises it for.
        RuntimeError: as lorafa_linear.
    """
    check_impl(impl)
    x, members = _checked(x, members, share_A)
    rows = as_rows(x, members[0].weight.shape[1])

    weights, biases, lora_As, lora_Bs, scalings, dropout_ps, _ = map(list, zip(*members, strict=True))
    seeds = None
    if any(p and lora_B is not None for p, lora_B in zip(dropout_ps, lora_Bs, strict=True)):
        seeds = draw_seed(x.device, 1 if share_A else len(members))
    if torch.is_grad_enabled() and (
        x.requires_grad or any(B is not None and B.requires_grad for B in lora_Bs)
    ):
        inverses = inverses_of(members)
        # Each object once: torch.compile takes no tensor twice.
        kept_As = _first(lora_As) if share_A else lora_As
        if share_A:
            inverses = _first(inverses) or [None] * len(kept_As)
        ys = ops.LoRAFALinearGroupFunction.apply(
            rows, seeds, scalings, dropout_ps, share_A, impl, *weights, *lora_Bs, *biases, *kept_As, *inverses
        )
    else:
        ys, _ = ops.group_forward(
            rows, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl
        )
    return tuple(shaped_as(y, x) for y in ys)


def _first(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None][:1]


def _checked(
    x: Tensor, members: Sequence[LinearOperands], share_A: bool
) -> tuple[Tensor, list[LinearOperands]]:
    """Return x in the dtype to compute in, and the members with their numbers as floats, after all checks."""
    if not isinstance(share_A, bool):
        raise TypeError(f"share_A must be a bool, got {type(share_A).__name__}")
    if not isinstance(members, (list, tuple)):
        raise TypeError(f"members must be a list of LinearOperands, got {type(members).__name__}")
    if not members:
        raise ValueError("members is empty: a group has at least one linear layer")
    shared = None
    checked = []
    for index, member in enumerate(members):
        try:
            # Weights that fit one x are alike.
            if not member_fits(x, member):
                check_kinds(x, member)
                _check_alike(member.weight, members[0].weight)
                x, member = checked_member(x, member)
            checked.append(member)
            if member.lora_A is not None and share_A:
                shared = shared or member
                check_shared(member, shared)
        except (ValueError, TypeError) as error:
            raise type(error)(f"member {index}: {error}") from None
    return x, checked


def _check_alike(weight: Tensor, first: Tensor) -> None:
    if weight.shape[1] != first.shape[1]:
        raise ValueError(
            f"weight has {weight.shape[1]} columns (in_features), that of member 0 has {first.shape[1]}: "
            "members share one x"
        )
    if weight.dtype != first.dtype:
        raise ValueError(
            f"weight has dtype {weight.dtype}, that of member 0 has {first.dtype}: both must be the same"
        )
    if weight.device != first.device:
        raise ValueError(
            f"weight is on {weight.device}, that of member 0 is on {first.device}: both must be the same"
        )


def check_shared(member: LinearOperands, first: LinearOperands) -> None:
    """Raise ValueError unless two members of a group with share_A have all in common that they must."""
    if member.lora_A is not first.lora_A:
        raise ValueError(
            "share_A=True needs the same lora_A tensor object in all members, this one has another"
        )
    for name in ("scaling", "dropout_p", "gradient_correction"):
        value, expected = getattr(member, name), getattr(first, name)
        if value != expected:
            raise ValueError(
                f"share_A=True needs the same {name} in all members: {name} is {value}, that of another "
                f"member is {expected}"
            )
