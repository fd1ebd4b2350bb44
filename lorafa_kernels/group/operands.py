"""What a block needs to know of one linear layer in it, the checks of that, and where a group keeps its
members' z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..correction import correct, gram_inverse
from ..operands import (
    cast,
    check_correction,
    check_frozen,
    check_shapes,
    check_tensors,
    checked_dropout,
    checked_scaling,
    fit,
)


class LinearOperands(NamedTuple):
    """weight (N, K), bias (N,) or None, and the adapter lora_A (R, K), lora_B (N, R), or None for both: a
    plain frozen linear layer. scaling is s of the low-rank term, dropout_p the dropout on its input,
    gradient_correction whether lora_B's gradient is corrected, as in lorafa_linear.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    gradient_correction: bool = False


def inverses_of(members: Sequence[LinearOperands]) -> list[Tensor | None]:
    """Return (A Aᵀ + εI)⁻¹ (R, R) of each member whose dB is to be corrected, None for the others."""
    return [
        gram_inverse(member.lora_A)
        if member.gradient_correction and member.lora_B is not None and member.lora_B.requires_grad
        else None
        for member in members
    ]


def corrected(
    dBs: Sequence[Tensor | None], inverses: Sequence[Tensor | None], scalings: Sequence[float]
) -> list[Tensor | None]:
    """Return the dB_i (N_i, R_i), corrected where there is an inverse (R_i, R_i)."""
    return [
        dB if dB is None or inverse is None else correct(dB, inverse, scaling)
        for dB, inverse, scaling in zip(dBs, inverses, scalings, strict=True)
    ]


def rank_columns(lora_Bs: Sequence[Tensor | None], share_A: bool) -> list[tuple[int, int]]:
    """Return which columns [first, last) of a group's z (M, ΣR) belong to each member.

    One after the other; with share_A all adapted members have the same; (0, 0) for one without an adapter.
    """
    found, last = [], 0
    for lora_B in lora_Bs:
        if lora_B is None:
            found.append((0, 0))
            continue
        first = 0 if share_A else last
        last = first + lora_B.shape[1]
        found.append((first, last))
    return found


def rank_makers(lora_Bs: Sequence[Tensor | None], share_A: bool) -> list[int]:
    """Return the members for which z is to be made: the adapted ones, or with share_A the first of them."""
    adapted = [index for index, lora_B in enumerate(lora_Bs) if lora_B is not None]
    return adapted[:1] if share_A else adapted


def seed_of(seeds: Tensor, index: int, share_A: bool) -> Tensor:
    """Return the seed (1,) of a member's dropout mask."""
    return seeds if share_A else seeds[index : index + 1]


def member_fits(x: Tensor, member: LinearOperands, columns: int | None = None) -> bool:
    """Whether an adapted member passes all checks as it is and x needs no cast, as nearly always. columns: as
    of operands.fit.

    What it does not vouch for goes through check_kinds and checked_member.
    """
    if type(member) is not LinearOperands:
        return False
    weight, bias, lora_A, lora_B, scaling, dropout_p, gradient_correction = member
    # A plain layer has None, which does not fit.
    return fit(x, weight, lora_A, lora_B, bias, scaling, dropout_p, gradient_correction, columns)


def check_kinds(x: Tensor, member: LinearOperands) -> None:
    """Raise TypeError or ValueError for a member that is made of anything but tensors, or of no matrix."""
    if not isinstance(member, LinearOperands):
        raise TypeError(f"expected LinearOperands, got {type(member).__name__}")
    weight, bias, lora_A, lora_B, *_ = member
    if (lora_A is None) != (lora_B is None):
        missing = "lora_A" if lora_A is None else "lora_B"
        raise ValueError(f"{missing} is None: pass both lora_A and lora_B, or neither (a plain layer)")
    check_tensors(x, weight, weight if lora_A is None else lora_A, weight if lora_B is None else lora_B, bias)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")


def checked_member(x: Tensor, member: LinearOperands) -> tuple[Tensor, LinearOperands]:
    """Return x in the dtype to compute in, and the member with its numbers as floats, after the checks of one
    layer that passed check_kinds.
    """
    weight, bias, lora_A, lora_B, scaling, dropout_p, gradient_correction = member
    s = checked_scaling(scaling)
    p = checked_dropout(dropout_p, s)
    check_correction(gradient_correction, s)
    if s is not scaling or p is not dropout_p:
        member = member._replace(scaling=s, dropout_p=p)
    check_shapes(x, weight, lora_A, lora_B, bias)
    # A plain layer has no lora_A and lora_B: weight takes their place, and passes once more.
    if lora_A is None:
        lora_A = lora_B = weight
    check_frozen(weight, lora_A, bias)
    return cast(x, weight, lora_A, lora_B, bias), member
