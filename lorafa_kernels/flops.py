"""What torch.utils.flop_counter.FlopCounterMode counts for the operators of this library: the products of the
formulas, 2·M·N·K for one of (M, K) and (K, N). What an implementation computes twice to save a launch counts
once.

The mode looks an operator up in a registry that it copied when it was made, and its module imports Triton:
formulas are handed to modes that watch an operator about to be called, and nothing is imported for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Shape = Sequence[int]


def tell_flop_counters() -> None:
    """Give the formulas to every FlopCounterMode that is active now; do nothing where none can be."""
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    packets = {getattr(torch.ops.lorafa_kernels, name): formula for name, formula in FORMULAS.items()}
    for packet, formula in packets.items():
        if packet not in counting.flop_registry:
            counting.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(registry, dict):
            for packet in packets:
                # A formula of the caller's own stays.
                registry.setdefault(packet, counting.flop_registry[packet])


def forward_flops(x: Shape, weight: Shape, lora_A: Shape, *_, **__) -> int:
    (M, K), N, R = x, weight[0], lora_A[0]
    return 2 * M * (N * K + K * R + N * R)


def backward_flops(dy: Shape, z: Shape, weight: Shape, lora_A: Shape, lora_B: Shape, *_, **__) -> int:
    return backward_input_flops(dy, weight, lora_A) + backward_lora_B_flops(dy, z)


def backward_input_flops(dy: Shape, weight: Shape, lora_A: Shape, *_, **__) -> int:
    (M, N), K, R = dy, weight[1], lora_A[0]
    return 2 * M * (N * K + N * R + K * R)


def backward_lora_B_flops(dy: Shape, z: Shape, *_, **__) -> int:
    (M, N), R = dy, z[1]
    return 2 * M * N * R


def group_forward_flops(
    x: Shape,
    weights: Sequence[Shape],
    lora_As: Sequence[Shape | None],
    lora_Bs: Sequence[Shape | None],
    biases: Sequence[Shape | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Shape | None,
    share_A: bool,
    *_,
    **__,
) -> int:
    M, K = x
    adapted = [B for B in lora_Bs if B is not None]
    ranks = [R for _, R in adapted][: 1 if share_A else None]
    base = sum(N * K for N, _ in weights)
    return 2 * M * (base + K * sum(ranks) + sum(N * R for N, R in adapted))


def group_backward_flops(
    dys: Sequence[Shape | None],
    z: Shape | None,
    weights: Sequence[Shape | None],
    lora_As: Sequence[Shape | None],
    lora_Bs: Sequence[Shape | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Shape | None,
    share_A: bool,
    need_dx: bool,
    need_dBs: Sequence[bool],
    *_,
    **__,
) -> int:
    used = [i for i, dy in enumerate(dys) if dy is not None]
    adapted = [lora_Bs[i] for i in used if lora_Bs[i] is not None]
    total = sum(N * R for N, R in (lora_Bs[i] for i in used if need_dBs[i]))
    if need_dx:
        K = weights[used[0]][1]
        ranks = [R for _, R in adapted][: 1 if share_A else None]
        total += sum(dys[i][1] * K for i in used) + sum(N * R for N, R in adapted) + K * sum(ranks)
    return 2 * dys[used[0]][0] * total


def mixed_forward_flops(
    x: Shape,
    weight: Shape,
    lora_As: Sequence[Shape],
    lora_Bs: Sequence[Shape],
    bias: Shape | None,
    index: Shape,
    places: Sequence[int],
    numbers: Sequence[int],
    *_,
    **__,
) -> int:
    (M, K), N = x, weight[0]
    return 2 * (M * N * K + (K + N) * sum(_ranks_of_rows(M, lora_Bs, places, numbers)))


def mixed_backward_flops(
    dy: Shape,
    z: Shape | None,
    weight: Shape | None,
    lora_As: Sequence[Shape],
    lora_Bs: Sequence[Shape],
    index: Shape,
    places: Sequence[int],
    numbers: Sequence[int],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seed: Shape | None,
    need_dx: bool,
    need_dBs: Sequence[bool],
    *_,
    **__,
) -> int:
    M, N = dy
    ranks = _ranks_of_rows(M, lora_Bs, places, numbers)
    total = N * sum(rank for rank, need in zip(ranks, need_dBs, strict=True) if need)
    if need_dx:
        K = weight[1]
        total += M * N * K + (N + K) * sum(ranks)
    return 2 * total


def _ranks_of_rows(
    M: int, lora_Bs: Sequence[Shape], places: Sequence[int], numbers: Sequence[int]
) -> list[int]:
    """For each adapter its rank times the rows that it has."""
    size = M // len(places) if places else 0
    return [R * size * list(places).count(number) for (_, R), number in zip(lora_Bs, numbers, strict=True)]


def gram_inverse_flops(lora_A: Shape, *_, **__) -> int:
    """Nothing: it is made once, and looked up in each step."""
    return 0


def correct_flops(dB: Shape, inverse: Shape, *_, **__) -> int:
    N, R = dB
    return 2 * N * R * R


def quantised_forward_flops(
    x: Shape, base: object, kind: str, shape: Shape, dtype: object, lora_A: Shape, *_, **__
) -> int:
    return forward_flops(x, shape, lora_A)


def quantised_backward_flops(
    dy: Shape, z: Shape, base: object, kind: str, shape: Shape, dtype: object, lora_A: Shape, *_, **__
) -> int:
    return backward_input_flops(dy, shape, lora_A) + backward_lora_B_flops(dy, z)


def quantised_backward_input_flops(
    dy: Shape, base: object, kind: str, shape: Shape, dtype: object, lora_A: Shape, *_, **__
) -> int:
    return backward_input_flops(dy, shape, lora_A)


def quantised_group_forward_flops(
    x: Shape, bases: object, kinds: object, shapes: Shape, dtype: object, *operands: object, **named: object
) -> int:
    return group_forward_flops(x, _pairs(shapes), *operands, **named)


def quantised_group_backward_flops(
    dys: Sequence[Shape | None],
    z: Shape | None,
    bases: object,
    kinds: object,
    shapes: Shape,
    dtype: object,
    *operands: object,
    **named: object,
) -> int:
    *factors, need_dBs, _ = operands
    return group_backward_flops(dys, z, _pairs(shapes), *factors, True, need_dBs, **named)


def _pairs(sizes: Shape) -> list[Shape]:
    return [sizes[i : i + 2] for i in range(0, len(sizes), 2)]


def frozen_flops(rows: Shape, base: object, kind: str, shape: Shape, *_, **__) -> int:
    """Of x W.T and of dy W; making W takes no product."""
    return 2 * rows[0] * shape[0] * shape[1]


FORMULAS: dict[str, Callable[..., int]] = {
    "forward": forward_flops,
    "backward": backward_flops,
    "backward_input": backward_input_flops,
    "backward_lora_B": backward_lora_B_flops,
    "group_forward": group_forward_flops,
    "group_backward": group_backward_flops,
    "mixed_forward": mixed_forward_flops,
    "mixed_backward": mixed_backward_flops,
    "gram_inverse": gram_inverse_flops,
    "correct": correct_flops,
    "quantised_forward": quantised_forward_flops,
    "quantised_backward": quantised_backward_flops,
    "quantised_backward_input": quantised_backward_input_flops,
    "quantised_group_forward": quantised_group_forward_flops,
    "quantised_group_backward": quantised_group_backward_flops,
    "frozen_product": frozen_flops,
    "frozen_gradient": frozen_flops,
}
