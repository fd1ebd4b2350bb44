"""Memory around operands and results, for kernels that may read or write beside them: a wrong address must
show as a wrong value, not as a crash of the process.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

# Elements on each side: more than a block of rows of any matrix in these tests has.
ROOM = 1 << 16
# Linux; Python has no name for it in all versions. Memory is not counted before it is touched.
MAP_NORESERVE = 0x4000


# Bits of a NaN that no product makes, around and in what is to be written.
UNWRITTEN = {torch.float32: 0x7FE5A5A5, torch.bfloat16: 0x7FDA, torch.float16: 0x7E5A}


class Beds:
    """Tensors within NaN: operands by `lay`, what torch.empty gives by `make`."""

    def __init__(self) -> None:
        self.operands: list[tuple[Tensor, Tensor]] = []
        self.results: list[tuple[Tensor, Tensor]] = []
        self._empty = torch.empty

    def lay(self, values: Tensor | None) -> Tensor | None:
        """Return a contiguous copy in a bed."""
        if values is None:
            return None
        bed, inside = self._bed(values.shape, values.dtype, values.device)
        bed.fill_(float("nan"))
        inside.copy_(values)
        self.operands.append((bed, bed.clone()))
        return inside

    def make(self, *shape, dtype=None, device=None, **_) -> Tensor:
        """In place of torch.empty."""
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        bed, inside = self._bed(shape, dtype or torch.get_default_dtype(), device)
        self.results.append((bed, inside))
        return inside

    def check(self) -> None:
        """Assert that operands and what lies around them are as they were, that all results are written, and
        nothing around them.
        """
        for bed, before in self.operands:
            assert torch.equal(bits(bed), bits(before)), "an operand, or what lies around it, was written"
        for bed, inside in self.results:
            what = f"{tuple(inside.shape)} of {inside.dtype}"
            assert torch.isfinite(inside).all(), f"{what}: not written, or made of what is no operand"
            around = bits(bed) == UNWRITTEN[bed.dtype]
            assert around[:ROOM].all(), f"{what}: written before its start"
            assert around[ROOM + inside.numel() :].all(), f"{what}: written past its end"

    def _bed(self, shape, dtype, device) -> tuple[Tensor, Tensor]:
        count = torch.Size(shape).numel()
        bed = self._empty(count + 2 * ROOM, dtype=dtype, device=device)
        bits(bed).fill_(UNWRITTEN[dtype])
        return bed, bed[ROOM : ROOM + count].view(shape)


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def far_rows(values: Tensor) -> Tensor:
    """Return a copy (rows, columns) of a 16-bit matrix of at least 4 rows, whose last row starts more than
    2³² elements behind the first; the stride itself fits 32 bits.

    Before the first row lie as many zeros as an offset of 32 bits can go astray. Only what is touched takes
    memory.
    """
    rows, columns = values.shape
    stride, room = (1 << 32) // (rows - 1) + 1, 1 << 31
    assert values.element_size() == 2 and stride < 1 << 31
    count = room + (rows - 1) * stride + columns
    if values.device.type == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        storage = torch.frombuffer(mmap.mmap(-1, 2 * count, flags=flags), dtype=values.dtype)
    else:
        storage = torch.zeros(count, dtype=values.dtype, device=values.device)
    far = storage.as_strided((rows, columns), (stride, 1), room)
    far.copy_(values)
    return far
