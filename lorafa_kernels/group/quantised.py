"""Linear layers that share an input, on quantised bases: operators, autograd node, and the function that
checks.

The formula is that of reference.py with weight_i = base_i.dense(dtype of x). The implementations of a dense
group compute it, and are given in the place of its weights what makes each where it is multiplied
(base/frozen.py, Dequantised): at most one weight_i is there at a time, in forward and in backward. So dx is a
sum of one product for each member, rounded after each. Where the plan of a member by itself reads codes in
forward (few rows, base/reading.py), each member is computed as a layer by itself there. The node keeps what
that of ops.py keeps, and in the place of the weights the codes and scales of the bases, the objects
themselves.

quantised_group_forward(x, bases, …, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl)
    -> (ys, z)
quantised_group_backward(dys, z, bases, …, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dBs,
    impl) -> (dx, dBs)

bases, …: the tensors of all bases in one list, the kind of each, N and K of each in one list, and the one
dtype. The rest as in ops.py. Where dx is not needed no weight is, and the operator of ops.py computes the
dBs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from ..base.frozen import Dequantised, QuantisedBase, base_of
from ..base.kinds import kind_of
from ..base.product import is_direct, product
from ..base.reading import Decisions, decide_forward, may_read_codes, readable, reads_codes
from ..dispatch import announce, call, chosen, define, first_order
from ..linear import quantised as linear
from ..linear.quantised import check_base, into_compute_dtype, out_of_compute_dtype
from ..operands import (
    as_rows,
    check_correction,
    check_frozen,
    check_shapes,
    check_tensor,
    checked_dropout,
    checked_scaling,
    draw_seed,
    shaped_as,
)
from ..plan.choice import Decision, check_impl
from ..plan.pin import pinned
from . import ops
from .api import check_shared
from .operands import LinearOperands, corrected, inverses_of, rank_columns, seed_of

_BASES = "Tensor[] bases, str[] kinds, int[] shapes, ScalarType dtype"
_decisions = Decisions()


def quantised_linear_group(
    x: Tensor,
    members: Sequence[LinearOperands],
    *,
    share_A: bool = False,
    impl: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Compute y_i = x W_iᵀ + s_i · (x lora_A_iᵀ) lora_B_iᵀ + bias_i for the W_i that quantised bases stand
    for: the weight of each of `members` is a QuantisedBase, of any kind.

    As lorafa_linear_group, which has the arguments and errors; those about a weight are about the dtype,
    shape and device of W_i, and about the tensors of its base. compute_dtype: as of quantised_linear.
    """
    check_impl(impl)
    given, (x, members) = x, _checked(x, members, share_A, compute_dtype)
    rows = as_rows(x, members[0].weight.shape[1])

    bases, biases, lora_As, lora_Bs, scalings, dropout_ps, _ = map(list, zip(*members, strict=True))
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
        how = (scalings, dropout_ps, share_A, impl, *static_parts(bases))
        tensors = (*lora_Bs, *biases, *kept_As, *inverses, *tensors_of(bases))
        ys = QuantisedGroupFunction.apply(rows, seeds, *how, *tensors)
    else:
        ys, _ = forward(rows, bases, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl)
    return tuple(out_of_compute_dtype(shaped_as(y, x), given, compute_dtype) for y in ys)


def _first(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None][:1]


def _checked(
    x: Tensor, members: Sequence[LinearOperands], share_A: bool, compute_dtype: torch.dtype | None
) -> tuple[Tensor, list[LinearOperands]]:
    if not isinstance(share_A, bool):
        raise TypeError(f"share_A must be a bool, got {type(share_A).__name__}")
    if not isinstance(members, (list, tuple)):
        raise TypeError(f"members must be a list of LinearOperands, got {type(members).__name__}")
    if not members:
        raise ValueError("members is empty: a group has at least one linear layer")
    shared = None
    found, checked = x, []
    for index, member in enumerate(members):
        try:
            _check_alike(member, members[0])
            found, member = checked_quantised(x, member, compute_dtype)
            if member.lora_A is not None and share_A:
                shared = shared or member
                check_shared(member, shared)
        except (ValueError, TypeError) as error:
            raise type(error)(f"member {index}: {error}") from None
        checked.append(member)
    return found, checked


def _check_alike(member: LinearOperands, first: LinearOperands) -> None:
    check_is_quantised(member)
    base, expected = member.weight, first.weight
    if base.shape[1] != expected.shape[1]:
        raise ValueError(
            f"weight has {base.shape[1]} columns (in_features), that of member 0 has {expected.shape[1]}: "
            "members share one x"
        )
    check_alike(base, expected, "member 0")


def check_is_quantised(member: LinearOperands) -> None:
    """Raise TypeError unless `member` is what a block needs of a layer on a quantised base."""
    if not isinstance(member, LinearOperands):
        raise TypeError(f"expected LinearOperands, got {type(member).__name__}")
    if not isinstance(member.weight, QuantisedBase):
        raise TypeError(f"weight is a {type(member.weight).__name__}, expected a QuantisedBase")


def check_alike(base: QuantisedBase, expected: QuantisedBase, of: str) -> None:
    """Raise ValueError where W has another dtype or device than that of the layer called `of`."""
    for what in ("dtype", "device"):
        got, wanted = getattr(base, what), getattr(expected, what)
        if got != wanted:
            raise ValueError(f"weight has {what} {got}, that of {of} has {wanted}: both must be the same")


def checked_quantised(
    x: Tensor, member: LinearOperands, compute_dtype: torch.dtype | None
) -> tuple[Tensor, LinearOperands]:
    """Return x in the dtype to compute in, and a member on a quantised base with its numbers as floats, after
    the checks of one layer.
    """
    base, bias, lora_A, lora_B, scaling, dropout_p, gradient_correction = member
    if (lora_A is None) != (lora_B is None):
        missing = "lora_A" if lora_A is None else "lora_B"
        raise ValueError(f"{missing} is None: pass both lora_A and lora_B, or neither (a plain layer)")
    check_base(x, base, bias)
    if lora_A is not None:
        check_tensor("lora_A", lora_A)
        check_tensor("lora_B", lora_B, frozen=False)
    s = checked_scaling(scaling)
    p = checked_dropout(dropout_p, s)
    check_correction(gradient_correction, s)
    check_shapes(x, base, lora_A, lora_B, bias)
    check_frozen(base, base if lora_A is None else lora_A, bias)
    factors = (base, base) if lora_A is None else (lora_A, lora_B)
    x = into_compute_dtype(x, base, *factors, bias, compute_dtype)
    return x, member._replace(scaling=s, dropout_p=p)


def static_parts(
    bases: Sequence[QuantisedBase],
) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...], torch.dtype]:
    """What bases are beside their tensors, as the nodes take it: the kinds, the shapes and the one dtype."""
    return tuple(base.kind.name for base in bases), tuple(base.shape for base in bases), bases[0].dtype


def tensors_of(bases: Sequence[QuantisedBase]) -> list[Tensor]:
    """The tensors of all bases, one after another."""
    return [tensor for base in bases for tensor in base.tensors]


def bases_of(
    tensors: Sequence[Tensor],
    kinds: Sequence[str],
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
) -> list[QuantisedBase]:
    """The bases that these are the tensors and static parts of."""
    found, last = [], 0
    for kind, shape in zip(kinds, shapes, strict=True):
        first, last = last, last + len(kind_of(kind).names)
        found.append(base_of(kind, tensors[first:last], shape, dtype))
    return found


def _parts_of(bases: Sequence[QuantisedBase]) -> tuple[list[Tensor], list[str], list[int], torch.dtype]:
    """Bases as the operators take them, in four arguments."""
    kinds, shapes, dtype = static_parts(bases)
    return tensors_of(bases), list(kinds), list(chain.from_iterable(shapes)), dtype


def _from_parts(tensors, kinds, shapes, dtype) -> list[QuantisedBase]:
    return bases_of(tensors, kinds, list(zip(shapes[::2], shapes[1::2], strict=True)), dtype)


def forward(
    x: Tensor,
    bases: Sequence[QuantisedBase],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    share_A: bool,
    impl: str,
) -> tuple[list[Tensor], Tensor]:
    """Compute the y_i (M, N_i) and z (M, ΣR), with share_A (M, R), in the dtype of x."""
    how = lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl
    if is_direct(x):
        return _forward_of(x, bases, *how)
    announce()
    *ys, z = _forward_op(x, *_parts_of(bases), *how)
    return ys, z


def backward(
    dys: Sequence[Tensor | None],
    z: Tensor | None,
    bases: Sequence[QuantisedBase],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    share_A: bool,
    need_dx: bool,
    need_dBs: Sequence[bool],
    impl: str,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute dx and the dB_i as ops.group_backward, which has the arguments, with bases for weights."""
    if not need_dx:
        nothing = [None] * len(dys)
        how = scalings, dropout_ps, seeds, share_A, need_dx, need_dBs, impl
        return ops.group_backward(dys, z, nothing, nothing, lora_Bs, *how)
    need_dBs = [need and dy is not None for need, dy in zip(need_dBs, dys, strict=True)]
    how = lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dBs, impl
    if is_direct(next(dy for dy in dys if dy is not None)):
        return _backward_of(dys, z, bases, *how)
    announce()
    dx, *dBs = _backward_op(dys, z, *_parts_of(bases), *how)
    found = iter(dBs)
    return dx, [next(found) if need else None for need in need_dBs]


def _forward(
    x, bases, kinds, shapes, dtype, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl
):
    bases = _from_parts(bases, kinds, shapes, dtype)
    operands = lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl
    ys, z = _forward_of(x, bases, *operands)
    return [*ys, z]


def _forward_of(x, bases, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl):
    biases = ops.cast_all(biases, x.dtype)
    decided = _decide(x, bases, lora_As, lora_Bs, biases, dropout_ps, seeds is not None, share_A, impl)
    arguments = (lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A)
    if isinstance(decided, tuple):
        return _by_members(decided, x, bases, *arguments, impl)
    run = ops.IMPLEMENTATIONS.find("forward", decided)
    return call(run, x.device, x, Dequantised(bases, x.dtype, impl), *arguments)


def _decide(
    x, bases, lora_As, lora_Bs, biases, dropout_ps, dropout, share_A, impl
) -> Decision | tuple[Decision | None, ...]:
    """Decide on forward: for all members together, or, where the plan of one by itself reads codes, for each
    by itself, with None for one without an adapter. biases: in the dtype of x; dropout: whether there is one.
    """
    of_group = ("forward", impl, x, bases, lora_Bs, share_A, biases, dropout)
    M, device, dtype = x.shape[0], x.device, x.dtype
    if type(M) is not int or not may_read_codes(M, pinned()):
        return ops.decide_group(*of_group)
    choice, pin = chosen("forward", impl, x)
    if choice.impl != "triton":
        return choice.without_plan
    members = tuple(
        (readable(base, dtype), base.shape, None if lora_A is None else lora_A.shape[0], bias is None, p > 0)
        for base, lora_A, bias, p in zip(bases, lora_As, biases, dropout_ps, strict=True)
    )
    key = impl, device, dtype, M, pin, members, dropout, share_A
    if (found := _decisions.find(device, key)) is not None:
        return found
    alone = tuple(
        None if R is None else decide_forward(x, base, R, not no_bias, drops, impl)
        for base, (_, _, R, no_bias, drops) in zip(bases, members, strict=True)
    )
    if any(one is not None and reads_codes(one) for one in alone):
        return _decisions.keep(device, key, alone)
    return _decisions.keep(device, key, ops.decide_group(*of_group))


def _by_members(
    decisions, x, bases, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl
) -> tuple[list[Tensor], Tensor]:
    """The y_i and z, of each member as a layer by itself."""
    ys, zs = [], []
    for i, (decision, base, p) in enumerate(zip(decisions, bases, dropout_ps, strict=True)):
        if decision is None:
            ys.append(product(x, base, biases[i]))
            continue
        seed = seed_of(seeds, i, share_A) if p else None
        adapter = lora_As[i], lora_Bs[i], biases[i], scalings[i], impl, p, seed
        y, z = linear.forward_decided(decision, x, base, *adapter)
        ys.append(y)
        zs.append(z)
    return ys, zs[0] if share_A or len(zs) == 1 else torch.cat(zs, dim=1)


def _backward(
    dys, z, bases, kinds, shapes, dtype, lora_As, lora_Bs, scalings, ps, seeds, share_A, need_dBs, impl
):
    bases = _from_parts(bases, kinds, shapes, dtype)
    how = lora_As, lora_Bs, scalings, ps, seeds, share_A, need_dBs, impl
    dx, dBs = _backward_of(dys, z, bases, *how)
    return [dx, *(dB for dB in dBs if dB is not None)]


def _backward_of(dys, z, bases, lora_As, lora_Bs, scalings, ps, seeds, share_A, need_dBs, impl):
    dy = next(dy for dy in dys if dy is not None)
    op = "backward" if any(need_dBs) else "backward_input"
    decision = ops.decide_group(op, impl, dy, bases, lora_Bs, share_A, dropout=seeds is not None)
    arguments = (lora_As, lora_Bs, scalings, ps, seeds, share_A, True, need_dBs)
    run = ops.IMPLEMENTATIONS.find("backward_in_turn", decision)
    return call(run, dy.device, dys, z, Dequantised(bases, dy.dtype, impl), *arguments)


def _forward_fake(
    x, bases, kinds, shapes, dtype, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl
):
    M = x.shape[0]
    width = max(last for _, last in rank_columns(lora_Bs, share_A))
    return [*(x.new_empty((M, N)) for N in shapes[::2]), x.new_empty((M, width))]


def _backward_fake(
    dys, z, bases, kinds, shapes, dtype, lora_As, lora_Bs, scalings, ps, seeds, share_A, need_dBs, impl
):
    dy = next(dy for dy in dys if dy is not None)
    dBs = [
        dy.new_empty(lora_B.shape, dtype=lora_B.dtype)
        for lora_B, need in zip(lora_Bs, need_dBs, strict=True)
        if need
    ]
    return [dy.new_empty((dy.shape[0], shapes[1])), *dBs]


_FACTORS = "Tensor?[] lora_As, Tensor?[] lora_Bs"
_HOW = "float[] scalings, float[] dropout_ps, Tensor? seeds, bool share_A"
_forward_op = define(
    "quantised_group_forward",
    f"(Tensor x, {_BASES}, {_FACTORS}, Tensor?[] biases, {_HOW}, str impl) -> Tensor[]",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "quantised_group_backward",
    f"(Tensor?[] dys, Tensor? z, {_BASES}, {_FACTORS}, {_HOW}, bool[] need_dBs, str impl) -> Tensor[]",
    _backward,
    _backward_fake,
)


class QuantisedGroupFunction(torch.autograd.Function):
    """The y_i (M, N_i) from x (M, K), the static parts of n bases, and n lora_Bs, n biases, lora_As and
    inverses as ops.py has them, and the tensors of the bases; gradients for x and the lora_Bs only.
    """

    @staticmethod
    def forward(ctx, x, seeds, scalings, dropout_ps, share_A, impl, kinds, shapes, dtype, *operands):
        n, count = len(scalings), _count(kinds)
        lora_Bs, biases, kept = ops.cut_off(operands[:-count], n, 2)
        kept_As, inverses = ops.halves(kept)
        lora_As = ops.each_lora_A(kept_As, lora_Bs, share_A)
        tensors = operands[-count:]
        bases = bases_of(tensors, kinds, shapes, dtype)
        ys, z = forward(x, bases, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl)
        need_dx, need_dBs = _needs(ctx, n)
        ctx.set_materialize_grads(False)
        z = z if any(need_dBs) else None
        if need_dx:
            ctx.save_for_backward(z, seeds, *lora_Bs, *inverses, *kept_As, *tensors)
        else:
            # A dB takes its dtype and shape from lora_B, z its columns from all of them, but no value.
            ctx.save_for_backward(z, None, *lora_Bs, *inverses)
        ctx.bases = kinds, shapes, dtype
        ctx.how = scalings, dropout_ps, share_A, impl
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        dx, *dBs = first_order(_gradients, ctx, dys)
        return dx, *[None] * 8, *dBs, *[None] * (len(ctx.needs_input_grad) - 9 - len(dBs))


def _count(kinds: Sequence[str]) -> int:
    """How many tensors bases of these kinds have."""
    return sum(len(kind_of(kind).names) for kind in kinds)


def _needs(ctx, n: int) -> tuple[bool, list[bool]]:
    """Whether x, and which of the n lora_B, need a gradient."""
    return ctx.needs_input_grad[0], list(ctx.needs_input_grad[9 : 9 + n])


def _gradients(ctx, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return dx and the dB_i."""
    n = len(dys)
    if all(dy is None for dy in dys):
        return (None,) * (1 + n)
    need_dx, need_dBs = _needs(ctx, n)
    scalings, dropout_ps, share_A, impl = ctx.how
    z, seeds, *rest = ctx.saved_tensors
    lora_Bs, inverses = rest[:n], rest[n:]
    bases = lora_As = [None] * n
    if need_dx:
        count = _count(ctx.bases[0])
        inverses, kept_As = ops.halves(inverses[:-count])
        bases = bases_of(rest[-count:], *ctx.bases)
        lora_As = ops.each_lora_A(kept_As, lora_Bs, share_A)
    how = scalings, dropout_ps, seeds, share_A, need_dx, need_dBs, impl
    dx, dBs = backward(dys, z, bases, lora_As, lora_Bs, *how)
    return dx, *corrected(dBs, ops.each_lora_A(inverses, lora_Bs, share_A), scalings)
