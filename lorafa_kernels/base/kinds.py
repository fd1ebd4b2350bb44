"""The kinds of quantised base: which tensors each keeps, and how a dense weight (N, K) becomes them and back.

    kind         tensors, in this order
    nf4          weight   uint8 (N, K/2)      two codes in a byte
                 absmax   int32 (N, K/64)     a scale for each 64 elements
    nf4-nested   weight   uint8 (N, K/2)
                 absmax   uint8 (N, K/64)     codes of the scales
                 nested_absmax int32 (⌈N·K/64/256⌉,), nested_code int32 (256,), nested_offset int32 (1,)
    int8         weight   int8 (N, K), scale int32 (N,)
    fp8          weight   uint8 (N, K), the bits of e4m3, scale int32 (N,)

Every int32 holds the bits of an fp32 number: no cast of floating-point parameters, by .to(dtype) or by the
mixed precision of an engine, changes it, and none can be made to require a gradient. Where K is no multiple
of 64, weight and absmax of NF4 are flat, (⌈N·K/2⌉,) and (⌈N·K/64⌉,): a row does not begin with a block there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import channel, nf4

Tensors = Mapping[str, Tensor]
Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Kind:
    """One kind of quantised base.

    spec(N, K): dtype and shape of each tensor by name. quantise(weight): the tensors of a dense weight.
    dequantise(tensors, shape, dtype, via): the weight (N, K) in dtype, rounded to `via` first.
    chunk(N, K, on_cpu): how many elements of it dequantise computes at a time.
    """

    name: str
    spec: Callable[[int, int], Spec]
    quantise: Callable[[Tensor], dict[str, Tensor]]
    dequantise: Callable[[Tensors, tuple[int, int], torch.dtype, torch.dtype], Tensor]
    chunk: Callable[[int, int, bool], int]
    # Names of the tensors, in their order: each call of a layer asks for them.
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.spec(1, 1)))

    def nbytes(self, N: int, K: int) -> int:
        """Bytes of the tensors of a weight (N, K)."""
        total = 0
        for dtype, shape in self.spec(N, K).values():
            total += dtype.itemsize * torch.Size(shape).numel()
        return total


def bits(values: Tensor) -> Tensor:
    """fp32 values as int32."""
    return values.view(torch.int32)


def values(stored: Tensor) -> Tensor:
    """The fp32 values that an int32 tensor holds the bits of."""
    return stored.view(torch.float32)


def has_rows(K: int) -> bool:
    """Whether NF4 keeps a weight of K columns by rows."""
    return K % nf4.BLOCK == 0


def _nf4_spec(N: int, K: int) -> Spec:
    if has_rows(K):
        return {
            "weight": (torch.uint8, (N, K // 2)),
            "absmax": (torch.int32, (N, K // nf4.BLOCK)),
        }
    return {
        "weight": (torch.uint8, (nf4.blocks_of(N * K, 2),)),
        "absmax": (torch.int32, (nf4.blocks_of(N * K),)),
    }


def _nested_spec(N: int, K: int) -> Spec:
    spec = _nf4_spec(N, K)
    blocks = nf4.blocks_of(nf4.blocks_of(N * K), nf4.NESTED_BLOCK)
    return spec | {
        "absmax": (torch.uint8, spec["absmax"][1]),
        "nested_absmax": (torch.int32, (blocks,)),
        "nested_code": (torch.int32, (256,)),
        "nested_offset": (torch.int32, (1,)),
    }


def _channel_spec(dtype: torch.dtype) -> Callable[[int, int], Spec]:
    return lambda N, K: {"weight": (dtype, (N, K)), "scale": (torch.int32, (N,))}


def _quantise_nf4(weight: Tensor) -> dict[str, Tensor]:
    spec = _nf4_spec(*weight.shape)
    codes, absmax = nf4.quantise(weight)
    return {"weight": codes.view(spec["weight"][1]), "absmax": bits(absmax).view(spec["absmax"][1])}


def _quantise_nested(weight: Tensor) -> dict[str, Tensor]:
    spec = _nested_spec(*weight.shape)
    codes, absmax = nf4.quantise(weight)
    absmax, *nested = nf4.nest(absmax)
    tensors = {"weight": codes.view(spec["weight"][1]), "absmax": absmax.view(spec["absmax"][1])}
    nested_names = ("nested_absmax", "nested_code", "nested_offset")
    return tensors | dict(zip(nested_names, map(bits, nested), strict=True))


def absmax_of(tensors: Tensors) -> Tensor:
    """The fp32 absmax (⌈N·K/64⌉,) of an NF4 base, nested or not."""
    if "nested_absmax" not in tensors:
        return values(tensors["absmax"]).reshape(-1)
    return nf4.unnest(
        tensors["absmax"],
        *(values(tensors[name]) for name in ("nested_absmax", "nested_code", "nested_offset")),
    )


def _dequantise_nf4(tensors: Tensors, shape: tuple[int, int], dtype: torch.dtype, via: torch.dtype) -> Tensor:
    return nf4.dequantise(tensors["weight"], absmax_of(tensors), shape, dtype, via)


def _channel(quantise: Callable, dequantise: Callable, dtype: torch.dtype, name: str) -> Kind:
    def encode(weight: Tensor) -> dict[str, Tensor]:
        codes, scales = quantise(weight)
        return {"weight": codes, "scale": bits(scales)}

    def decode(tensors: Tensors, shape: tuple[int, int], out: torch.dtype, via: torch.dtype) -> Tensor:
        return dequantise(tensors["weight"], values(tensors["scale"]), out, via)

    return Kind(name, _channel_spec(dtype), encode, decode, channel.chunk_of)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("nf4", _nf4_spec, _quantise_nf4, _dequantise_nf4, nf4.chunk_of),
        Kind("nf4-nested", _nested_spec, _quantise_nested, _dequantise_nf4, nf4.chunk_of),
        _channel(channel.quantise_int8, channel.dequantise_int8, torch.int8, "int8"),
        _channel(channel.quantise_fp8, channel.dequantise_fp8, torch.uint8, "fp8"),
    )
}


def kind_of(name: object) -> Kind:
    """Return a kind by name. Raises ValueError, which lists them, for another."""
    if not isinstance(name, str) or name not in KINDS:
        known = ", ".join(map(repr, KINDS))
        raise ValueError(f"there is no quantiser {name!r:.80}: choose one of {known}")
    return KINDS[name]
