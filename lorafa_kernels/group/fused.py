"""Forward and backward of linear layers that share an input, composed of the kernels. Shapes, dtypes and
Nones as in group/reference.py.

A group of one is a layer, and left to linear.py. `plan` as there; its shrink is for one layer, and z of
several members takes its own. For few rows (an expand of variant "recompute") each member makes its z beside
its y, in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.expand import expand
from ..kernels.grad import grad, grads_beside
from ..kernels.group import Dropout, expand_total, shrink_group, shrink_total
from ..kernels.shrink import shrink
from ..linear import fused as linear
from ..plan.kernels import KernelConfigs
from .operands import rank_columns, rank_makers, seed_of


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    share_A: bool,
    *,
    plan: KernelConfigs,
) -> tuple[list[Tensor], Tensor]:
    """Compute the y_i (M, N_i) and z: one launch for z, and one for each y_i; for few rows one for each
    member, and z is put together from theirs. A member without an adapter is a library product.
    """
    makers = rank_makers(lora_Bs, share_A)
    if makers and (len(weights) == 1 or (plan.recomputes and not share_A)):
        ys, zs = [], []
        for i, lora_B in enumerate(lora_Bs):
            if lora_B is None:
                ys.append(F.linear(x, weights[i], biases[i]))
                continue
            seed = None if seeds is None else seed_of(seeds, i, share_A)
            adapter = lora_As[i], lora_B, biases[i], scalings[i], dropout_ps[i], seed
            y, z = linear.forward(x, weights[i], *adapter, plan=plan)
            ys.append(y)
            zs.append(z)
        return ys, zs[0] if len(zs) == 1 else torch.cat(zs, dim=1)
    factors = [lora_As[i].t() for i in makers]
    of_rank = [scalings[i] / (1 - dropout_ps[i]) for i in makers]
    dropout = _dropout(seeds, makers, dropout_ps, share_A)
    of_group = plan.group
    columns = rank_columns(lora_Bs, share_A)
    lora_Bs, copies = zip(
        *(linear.copied(lora_B, x.dtype) if lora_B is not None else (None, None) for lora_B in lora_Bs),
        strict=True,
    )
    z = shrink_group(
        x,
        factors,
        of_rank,
        config=of_group.shrink,
        members=of_group.members,
        dropout=dropout,
        copies=[copy for copy in copies if copy is not None],
    )
    configs = linear.expand_configs(plan)
    ys = []
    for i, (lora_B, bias, (first, last)) in enumerate(zip(lora_Bs, biases, columns, strict=True)):
        if lora_B is None:
            ys.append(F.linear(x, weights[i], bias))
        else:
            ys.append(expand(x, weights[i].t(), z[:, first:last], lora_B.t(), bias, **configs))
    return ys, z


def backward(
    dys: Sequence[Tensor | None],
    z: Tensor | None,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    share_A: bool,
    need_dx: bool,
    need_dBs: Sequence[bool],
    *,
    plan: KernelConfigs,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute dx (M, K), in one launch, and the dB_i (N_i, R_i), with dz_i by the same pass over dy_i or by
    one more; with share_A by one pass over all dy_i. The kernels of the dB_i come first, or last, while that
    of dx runs.
    """
    if len(weights) == 1 and need_dx and lora_Bs[0] is not None:
        seed = None if seeds is None else seed_of(seeds, 0, share_A)
        layer = weights[0], lora_As[0], lora_Bs[0], scalings[0], dropout_ps[0], seed
        dx, dB = _layer_backward(dys[0], z, *layer, need_dBs[0], plan)
        return dx, [dB]
    columns = rank_columns(lora_Bs, share_A)
    used = [i for i, dy in enumerate(dys) if dy is not None]
    adapted = [i for i in used if lora_Bs[i] is not None]
    dBs: list[Tensor | None] = [None] * len(dys)
    # Without columns dx takes no launch, behind which they could start.
    beside = plan.beside and need_dx and weights[used[0]].shape[1] > 0
    late = [i for i in adapted if need_dBs[i]] if beside else []
    dzs = []
    for i in adapted:
        dy, lora_B, scaling = dys[i], lora_Bs[i], scalings[i]
        need_dz = need_dx and not share_A
        one_pass = plan.one_pass and need_dz and need_dBs[i]
        if need_dBs[i] and not beside:
            part = z[:, slice(*columns[i])]
            factor = lora_B if one_pass else None
            dz, dBs[i] = grad(dy, part, factor, scaling, lora_B.dtype, config=plan.grad)
        if need_dz:
            dzs.append(dz if one_pass else shrink(dy, lora_B, scaling, config=plan.shrink))
    if not need_dx:
        return None, dBs
    if share_A and adapted:
        # Theirs is the scaling of the last one as well as of any other.
        operands = [dys[i] for i in adapted], [lora_Bs[i] for i in adapted]
        dzs = [shrink_total(*operands, scaling, config=plan.group.shrink_total)]
        adapted = adapted[:1]
    dropout = _dropout(seeds, adapted, dropout_ps, share_A)
    dx = expand_total(
        [dys[i] for i in used],
        [weights[i] for i in used],
        dzs,
        [lora_As[i] for i in adapted],
        config=plan.group.expand_total,
        unaligned=plan.group.expand_unaligned,
        dropout=dropout,
        trigger=bool(late),
    )
    if late:
        zs = [z[:, slice(*columns[i])] for i in late]
        found = grads_beside([dys[i] for i in late], zs, [lora_Bs[i].dtype for i in late], config=plan.grad)
        for i, dB in zip(late, found, strict=True):
            dBs[i] = dB
    return dx, dBs


def backward_in_turn(
    dys: Sequence[Tensor | None],
    z: Tensor | None,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    share_A: bool,
    need_dx: bool,
    need_dBs: Sequence[bool],
    *,
    plan: KernelConfigs,
) -> tuple[Tensor, list[Tensor | None]]:
    """backward where dx is needed, of weights of which one at a time can be there: each member is a layer by
    itself, and dx is rounded once for each. With share_A the member that comes first takes the term of dz.
    """
    columns = rank_columns(lora_Bs, share_A)
    dBs: list[Tensor | None] = [None] * len(dys)
    used = [i for i, dy in enumerate(dys) if dy is not None]
    adapted = [i for i in used if lora_Bs[i] is not None]
    if share_A and len(adapted) > 1:
        for i in adapted:
            if need_dBs[i]:
                part = z[:, slice(*columns[i])]
                dBs[i] = grad(dys[i], part, None, scalings[i], lora_Bs[i].dtype, config=plan.grad)[1]
        first = adapted[0]
        operands = [dys[i] for i in adapted], [lora_Bs[i] for i in adapted]
        dz = shrink_total(*operands, scalings[first], config=plan.group.shrink_total)
        drops = {} if seeds is None else {"dropout_p": dropout_ps[first], "seed": seeds}
        configs = linear.expand_configs(plan)
        dx = expand(dys[first], weights[first], dz, lora_As[first], **configs, **drops)
        for i in used:
            if i != first:
                dx.addmm_(dys[i], weights[i])
        return dx, dBs
    dx = None
    for i in used:
        if lora_Bs[i] is None:
            dx = dys[i].mm(weights[i]) if dx is None else dx.addmm_(dys[i], weights[i])
            continue
        part = z[:, slice(*columns[i])] if need_dBs[i] else None
        adapter = lora_As[i], lora_Bs[i], scalings[i], dropout_ps[i]
        seed = None if seeds is None else seed_of(seeds, i, share_A)
        own, dBs[i] = _layer_backward(dys[i], part, weights[i], *adapter, seed, need_dBs[i], plan)
        dx = own if dx is None else dx.add_(own)
    return dx, dBs


def _layer_backward(
    dy: Tensor,
    z: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dB: bool,
    plan: KernelConfigs,
) -> tuple[Tensor, Tensor | None]:
    """dx and dB of one layer, None for a dB that is not needed."""
    layer = weight, lora_A, lora_B, scaling, dropout_p, seed
    if need_dB:
        return linear.backward(dy, z, *layer, plan=plan)
    return linear.backward_input(dy, *layer, plan=plan), None


def _dropout(
    seeds: Tensor | None, members: Sequence[int], dropout_ps: Sequence[float], share_A: bool
) -> Dropout | None:
    if seeds is None or not members:
        return None
    return Dropout(seeds, [0] if share_A else members, [dropout_ps[i] for i in members])
