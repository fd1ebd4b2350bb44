"""What lora_A and lora_B start as.

    "kaiming"       uniform in ±1/√columns, as torch.nn.Linear has it: variance 1/(3 columns)
    "gaussian"      N(0, 1/rows²)
    "orthogonal"    orthogonal rows as long as Kaiming's in the mean: A Aᵀ = I/3 for lora_A (R, K) with R ≤ K,
                    else orthogonal columns. With such rows the gradient correction is the constant 3/s²

Values of a seed are drawn on the CPU in fp64, so that they are the same on every device and rank and, but for
rounding, in every dtype.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..engines import is_dtensor


def draw_into(tensor: Tensor, kind: str, generator: torch.Generator | None) -> None:
    """Draw a matrix (rows, columns) of one of the kinds above in place, from a CPU generator or, without one,
    from the default generator of its device. Without gradients.

    Raises RuntimeError for a sharded matrix that is to be orthogonal without a generator.
    """
    draw = _DRAW[kind]
    if generator is not None:
        drawn = torch.empty(tensor.shape, dtype=torch.float64, device="cpu")
    elif kind != "orthogonal":
        draw(tensor, None)
        return
    elif is_dtensor(tensor):
        raise RuntimeError(
            "an orthogonal lora_A cannot be drawn in shards: give the layer an init_seed, from which every "
            "rank draws the same matrix"
        )
    else:
        # A QR decomposition takes fp32 and fp64 only.
        wide = torch.promote_types(tensor.dtype, torch.float32)
        drawn = torch.empty(tensor.shape, dtype=wide, device=tensor.device)
    if tensor.is_meta:
        return
    draw(drawn, generator)
    drawn = drawn.to(tensor.device, tensor.dtype)
    if is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has the whole matrix, and takes its part.
        drawn = distribute_tensor(drawn, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(drawn)


def _kaiming(tensor: Tensor, generator: torch.Generator | None) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def _gaussian(tensor: Tensor, generator: torch.Generator | None) -> None:
    nn.init.normal_(tensor, std=1 / len(tensor), generator=generator)


def _orthogonal(tensor: Tensor, generator: torch.Generator | None) -> None:
    nn.init.orthogonal_(tensor, gain=math.sqrt(1 / 3), generator=generator)


_DRAW: dict[str, Callable[[Tensor, torch.Generator | None], None]] = {
    "kaiming": _kaiming,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
}


def seed_for(init_seed: int | None, name: str) -> int | None:
    """Return the seed of the layer `name`: made of init_seed and the name alone, whatever other layers there
    are. None of None.
    """
    if init_seed is None:
        return None
    digest = hashlib.sha256(f"{int(init_seed)}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
