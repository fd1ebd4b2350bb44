"""Forward and backward of a mixed batch, composed of the kernels. Shapes and arguments as in reference.py;
`plan`: the configurations that plan/kernels.py fills in.

The adapters' factors are put beside each other in the dtype of x, (E, ., R), for the time of a call. One
lora_A object of all adapters is not copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.mixed import mixed_expand, mixed_grad, mixed_shrink
from ..kernels.tile import dropout_arguments, keep_scale, rounded
from ..plan.kernels import MixedConfigs
from .rows import SortedRows, sorted_rows


def forward(
    x: Tensor,
    weight: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    bias: Tensor | None,
    index: Tensor,
    places: Sequence[int],
    numbers: Sequence[int],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seed: Tensor | None,
    *,
    plan: MixedConfigs,
) -> tuple[Tensor, Tensor]:
    """Compute y (M, N) and z (M, R) in two launches, and those that put the factors beside each other."""
    R = max(B.shape[1] for B in lora_Bs)
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[0])), x.new_empty((0, R))
    rows = sorted_rows(index, places, numbers, [B.shape[1] for B in lora_Bs], x.shape[0])
    of_z = rows.reals([s / (1 - p) for s, p in zip(scalings, dropout_ps, strict=True)])
    A = _stacked(lora_As, 0, R, x.dtype, rows).transpose(1, 2)
    tiles = rows.tiles(plan.shrink.BLOCK_M)
    dropout = _dropout(rows, dropout_ps, seed)
    z = mixed_shrink(x, A, of_z, rows.order, tiles, config=plan.shrink, **dropout)
    F = _stacked(lora_Bs, 1, R, x.dtype, rows).transpose(1, 2)
    tiles = rows.tiles(plan.expand.BLOCK_M)
    return mixed_expand(x, weight.t(), z, F, bias, rows.order, tiles, config=plan.expand), z


def backward(
    dy: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    index: Tensor,
    places: Sequence[int],
    numbers: Sequence[int],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seed: Tensor | None,
    need_dx: bool,
    need_dBs: Sequence[bool],
    *,
    plan: MixedConfigs,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute dx (M, K) in two launches, None unless needed, and the dB_i (N, R_i) that are needed in one
    for all.
    """
    M, R = dy.shape[0], max(B.shape[1] for B in lora_Bs)
    dBs = [
        torch.zeros_like(B, memory_format=torch.contiguous_format) if need else None
        for B, need in zip(lora_Bs, need_dBs, strict=True)
    ]
    if M == 0:
        return dy.new_empty((0, weight.shape[1])) if need_dx else None, dBs
    rows = sorted_rows(index, places, numbers, [B.shape[1] for B in lora_Bs], M)
    adapters = [place for place in rows.adapters if need_dBs[place]]
    if adapters:
        found = mixed_grad(dy, z, rows.order, rows.runs(adapters), config=plan.grad)
        for place, dB in zip(adapters, found, strict=True):
            dBs[place].copy_(dB[:, : dBs[place].shape[1]])
    if not need_dx:
        return None, dBs
    B = _stacked(lora_Bs, 1, R, dy.dtype, rows)
    tiles = rows.tiles(plan.shrink.BLOCK_M)
    dz = mixed_shrink(dy, B, rows.reals(scalings), rows.order, tiles, config=plan.shrink)
    A = _stacked(lora_As, 0, R, dy.dtype, rows)
    tiles = rows.tiles(plan.expand.BLOCK_M)
    dropout = _dropout(rows, dropout_ps, seed)
    if dropout:
        dropout["scales"] = rows.reals([keep_scale(p) or 1.0 for p in dropout_ps])
    dx = mixed_expand(dy, weight, dz, A, None, rows.order, tiles, config=plan.expand, **dropout)
    return dx, dBs


def _stacked(
    factors: Sequence[Tensor], rank_dim: int, R: int, dtype: torch.dtype, rows: SortedRows
) -> Tensor:
    """The factors of the adapters that have rows beside each other, with R as their dimension `rank_dim`:
    zero where they have less.
    """
    first = factors[0]
    if all(factor is first for factor in factors):
        return rounded(first, dtype)[None].expand(len(factors), *first.shape)
    shape = list(first.shape)
    shape[rank_dim] = R
    stack = torch.zeros((len(factors), *shape), dtype=dtype, device=first.device)
    for place in rows.adapters:
        factor = factors[place]
        stack[place].narrow(rank_dim, 0, factor.shape[rank_dim]).copy_(factor)
    return stack


def _dropout(rows: SortedRows, dropout_ps: Sequence[float], seed: Tensor | None) -> dict[str, Tensor]:
    """The seed and the threshold of each adapter, from 0 on which every element is kept."""
    if seed is None or not any(dropout_ps):
        return {}
    words = [dropout_arguments(p, seed)[1] or 0 for p in dropout_ps]
    return {"seed": seed, "thresholds": rows.integers(words)}
