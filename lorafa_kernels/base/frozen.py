"""A frozen base as a layer holds it, and what is asked of one.

    product(x, base, bias)      y = x Wᵀ + bias                  product.py
    gradient(dy, base)          dx = dy W                        product.py
    base.dense(dtype)           W, for both and for merging
    base.nbytes                 what it takes of memory
    Dequantised(bases, dtype)   the W of several, for products one after another

A dense W is its own base: the Parameter itself, multiplied by linear/ without anything of this folder. A
QuantisedBase has the shape, dtype and device of the W that it stands for, and no values of it: W is made for
one product and freed after it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan.choice import choose
from .kinds import Kind, has_rows, kind_of, values


@dataclass(frozen=True, eq=False)
class QuantisedBase:
    """The tensors, in the order of kind.names, that stand for W (N, K) in `dtype`."""

    kind: Kind
    tensors: tuple[Tensor, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    # As of a frozen weight.
    requires_grad = False

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def dim(self) -> int:
        """2, as of W."""
        return 2

    def dense(self, dtype: torch.dtype | None = None, impl: str = "auto") -> Tensor:
        """Return W (N, K), a new tensor in `dtype` or its own: each element rounded to its own first.

        impl, as of a layer, says who computes it: the kernel where `by_kernel`, else PyTorch's operators. The
        bits are the same.
        """
        dtype = dtype or self.dtype
        named = dict(zip(self.kind.names, self.tensors, strict=True))
        with torch.no_grad():
            if self.by_kernel(dtype, impl):
                return _by_kernel(named, dtype, self.dtype)
            return self.kind.dequantise(named, self.shape, dtype, self.dtype)

    def by_kernel(self, dtype: torch.dtype, impl: str = "auto") -> bool:
        """Whether the Triton kernel makes W in `dtype`: of NF4 by rows, where `impl` is Triton's."""
        by_rows = self.kind.name in ("nf4", "nf4-nested") and has_rows(self.shape[1])
        if not by_rows or torch.float64 in (dtype, self.dtype):
            return False
        return choose(impl, self.device, dtype).impl == "triton"

    def check(self) -> None:
        """Raise TypeError or ValueError, naming it and what is expected, for a tensor that does not fit."""
        N, K = self.shape
        for (name, (dtype, shape)), tensor in zip(self.kind.spec(N, K).items(), self.tensors, strict=True):
            if tensor.dtype is not dtype:
                hint = ", the bits of fp32 values: values.view(torch.int32)" if dtype is torch.int32 else ""
                raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}{hint}")
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {shape} for a {self.kind.name} base "
                    f"of a weight ({N}, {K})"
                )
            if tensor.device != self.device:
                raise ValueError(f"{name} is on {tensor.device}, weight on {self.device}")


class Dequantised(Sequence[Tensor]):
    """The W (N_i, K) of several bases, in the place of a list of dense weights: each is made anew, in
    `dtype`, whenever it is asked for, and is nobody's but the caller's. impl: as of QuantisedBase.dense.

    Who reads weights[i] where it is multiplied, and binds it to no name, has one W at a time.
    """

    def __init__(self, bases: Sequence[QuantisedBase], dtype: torch.dtype, impl: str = "auto") -> None:
        self._bases, self._dtype, self._impl = bases, dtype, impl

    def __getitem__(self, index: int) -> Tensor:
        return self._bases[index].dense(self._dtype, self._impl)

    def __len__(self) -> int:
        return len(self._bases)


def making_bytes(kind: str, shape: Sequence[int], dtype: torch.dtype, by_kernel: bool, on_cpu: bool) -> int:
    """Bytes that dense() takes at most beside its result (N, K) in `dtype`, rounded to itself."""
    if by_kernel:
        return 0
    N, K = shape
    found = kind_of(kind)
    # The values in fp32, and rounded; of NF4 a byte, two elements, as int32.
    taken = 4 + (dtype.itemsize if dtype != torch.float32 else 0)
    if found.name.startswith("nf4"):
        taken = max(taken, 2 + 4)
    return found.chunk(N, K, on_cpu) * taken


def _by_kernel(named: dict[str, Tensor], dtype: torch.dtype, via: torch.dtype) -> Tensor:
    kernels = importlib.import_module("..kernels.dequantise", __package__)
    codes, absmax, nested = named["weight"].contiguous(), named["absmax"].contiguous(), None
    if "nested_absmax" in named:
        nested = tuple(values(named[name]) for name in ("nested_absmax", "nested_code", "nested_offset"))
    else:
        absmax = values(absmax)
    return kernels.dequantise(codes, absmax, nested, dtype, via)


def quantised(weight: Tensor, kind: str) -> QuantisedBase:
    """Return the base of a `kind` that stands for a dense weight (N, K).

    Raises ValueError for an unknown kind, and for a weight that is not finite everywhere.
    """
    found = kind_of(kind)
    with torch.no_grad():
        tensors = found.quantise(weight)
        scale = tensors.get("nested_offset", tensors.get("scale", tensors.get("absmax")))
        if not bool(torch.isfinite(scale.view(torch.float32)).all()):
            raise ValueError("a weight that holds NaN or Inf cannot be quantised")
    return QuantisedBase(found, tuple(tensors.values()), tuple(weight.shape), weight.dtype)


def base_of(kind: str, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> QuantisedBase:
    """Return the base that these tensors make, without checking them."""
    N, K = shape
    return QuantisedBase(kind_of(kind), tuple(tensors), (N, K), dtype)
