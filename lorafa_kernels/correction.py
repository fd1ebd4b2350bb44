"""The gradient correction of LoRA-FA's second version (arXiv 2308.03303v2): of all updates of lora_B, the one
whose effect on the weight is nearest to that of full fine-tuning.

    dB ← (1/s²) · dB · (A Aᵀ + εI)⁻¹              ε = 1e-8, as in PEFT's create_lorafa_optimizer

Shapes: dB (N, R); A = lora_A (R, K); the inverse (R, R), symmetric; s is the scaling. The weight changes by
s · ΔB A: along s² · dW Aᵀ A with dB as it is, along dW Aᵀ (A Aᵀ)⁻¹ A with the corrected dB, which is dW
projected onto the rows of A.

A is frozen, so the inverse is made once and kept as long as lora_A lives, in fp32 (fp64 for an fp64 A). It is
made anew when lora_A holds other values: after an in-place operation, load_state_dict, `.to()`, another
tensor in its place, another shard under fully_shard. Values written through `.data` change no version: they
are seen before the first step, and not after it. A CUDA graph that was recorded by hand reads the inverse
that was made last. What FSDP1 and ZeRO-3 gather cannot be told from another tensor, and its inverse is made
in every forward.

gram_inverse(lora_A) -> inverse
gram_inverse_of_part(part, lora_A, total) -> inverse of the whole lora_A, a DTensor
correct(dB, inverse, scaling) -> corrected dB
as_corrected(lora_B, lora_A, scaling) -> lora_B whose gradient autograd corrects
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from .dispatch import announce, call, define, open_to_direct_calls, tracing_state, watching_modes
from .engines import GatheredFrom, gathered_from, is_managed
from .operands import check_tensor

EPSILON = 1e-8
set_tracing_state = torch._C._set_tracing_state


class _Made(NamedTuple):
    """An inverse, and what tells whether lora_A is still what it was made of."""

    inverse: Tensor
    version: tuple[int, ...]
    # Another tensor's storage can have the same address, but not while this refers to it.
    storage: StorageWeakRef
    place: tuple
    source: GatheredFrom | None

    def is_of(self, lora_A: Tensor, version: tuple[int, ...]) -> bool:
        return (
            self.version == version
            and self.storage.cdata == lora_A.untyped_storage()._cdata
            and self.place == _place(lora_A)
            and (self.source is None or self.source.is_unchanged())
        )


# The inverse of each lora_A, which goes when that goes.
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def gram_inverse(lora_A: Tensor) -> Tensor:
    """Return (A Aᵀ + εI)⁻¹ (R, R) on lora_A's device, in fp32, for an fp64 lora_A (R, K) in fp64.

    Directions in which A Aᵀ + εI is zero but for rounding (R > K, rows that depend on each other) are left
    out, as by torch.linalg.pinv. All NaN if A is not finite. Raises TypeError for a sharded or quantised
    lora_A. The result is kept and shared: it must not be written into.
    """
    if not torch.compiler.is_compiling():
        if type(lora_A) not in (Tensor, torch.nn.Parameter):
            check_tensor("lora_A", lora_A)
        elif not watching_modes():
            return _kept(lora_A)
    announce()
    return _gram_inverse_op(lora_A)


def gram_inverse_of_part(
    part: Tensor, lora_A: Tensor, total: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return gram_inverse of the whole lora_A, a DTensor of which this process has `part`, the same object at
    each call.

    total: given A Aᵀ of the part, returns the sum over all parts; None where each process has the whole
    matrix. All processes call this alike.
    """
    return _kept(part, lora_A, total)


def correct(dB: Tensor, inverse: Tensor, scaling: float) -> Tensor:
    """Return (1/s²) · dB inverse (N, R) in the dtype of dB, from dB (N, R) and inverse (R, R); multiplied in
    the wider dtype of both. scaling (s) must not be 0.
    """
    if open_to_direct_calls():
        return call(_correct, dB.device, dB, inverse, scaling)
    announce()
    return _correct_op(dB, inverse, scaling)


def as_corrected(lora_B: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """Return lora_B (N, R), of which autograd takes the corrected gradient, by operations that every tracer
    knows and differentiates: C = B₀ + (B − B₀) · inverse/s², where B₀ is B without its gradient. In a trace
    the inverse is a constant.
    """
    inverse = gram_inverse(lora_A.detach()).to(lora_B.dtype)
    constant = lora_B.detach()
    return constant + (lora_B - constant) @ (inverse / scaling / scaling)


def _kept(
    lora_A: Tensor, whole: Tensor | None = None, total: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """whole: the DTensor that lora_A is the part of, if it is one."""
    if lora_A.is_meta or lora_A.is_inference() or is_managed(lora_A):
        return _make(lora_A, total)
    made: _Made | None = _made.get(lora_A)
    version = (lora_A._version,) if whole is None else (lora_A._version, whole._version)
    if made is None or not made.is_of(lora_A, version):
        # Before it is read: what changes meanwhile must not pass for what was read.
        source = gathered_from(lora_A if whole is None else whole)
        storage = StorageWeakRef(lora_A.untyped_storage())
        inverse = _make(lora_A, total)
        if made is not None and _kind(made.inverse) == _kind(inverse):
            # Into the same memory, whose address a CUDA graph may have recorded.
            with torch.no_grad():
                inverse = made.inverse.copy_(inverse)
        made = _made[lora_A] = _Made(inverse, version, storage, _place(lora_A), source)
    return made.inverse


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device


def _place(lora_A: Tensor) -> tuple:
    """Where in its storage the matrix is, and of what."""
    return lora_A.shape, lora_A.stride(), lora_A.storage_offset(), lora_A.dtype, lora_A.device


def _make(lora_A: Tensor, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    if (traced := tracing_state()) is not None:
        # A trace gets the inverse as a constant, whether it was made before or not.
        set_tracing_state(None)
        try:
            return _make(lora_A, total)
        finally:
            set_tracing_state(traced)
    # An inference tensor could not be kept for backward.
    with torch.inference_mode(False), torch.no_grad():
        return _made_of(lora_A, total)


def _made_of(lora_A: Tensor, total: Callable[[Tensor], Tensor] | None) -> Tensor:
    wide = torch.float64 if lora_A.dtype == torch.float64 else torch.float32
    R = lora_A.shape[0]
    if lora_A.is_meta:
        return lora_A.new_empty((R, R), dtype=wide)
    # Made once, so that fp64 costs little; the inverse of a small matrix is quicker on the CPU.
    gram = call(_gram, lora_A.device, lora_A)
    if total is not None:
        gram = total(gram)
    gram = gram.to("cpu", torch.float64)
    if not bool(torch.isfinite(gram).all()):
        return lora_A.new_full((R, R), math.nan, dtype=wide)
    gram.diagonal().add_(EPSILON)
    rounding = R * torch.finfo(wide).eps
    inverse = torch.linalg.pinv(gram, rtol=rounding, hermitian=True)
    return inverse.to(lora_A.device, wide)


def _gram(lora_A: Tensor) -> Tensor:
    # Other devices than these may have no fp64.
    device = lora_A.device if lora_A.device.type in ("cpu", "cuda") else "cpu"
    wide = lora_A.to(device, torch.float64)
    return wide @ wide.T


def _gram_inverse(lora_A: Tensor) -> Tensor:
    # A copy: compilers write over what an operator returns.
    return _kept(lora_A).clone()


def _gram_inverse_fake(lora_A: Tensor) -> Tensor:
    R = lora_A.shape[0]
    wide = torch.float64 if lora_A.dtype == torch.float64 else torch.float32
    return lora_A.new_empty((R, R), dtype=wide)


def _correct(dB: Tensor, inverse: Tensor, scaling: float) -> Tensor:
    wide = torch.promote_types(dB.dtype, inverse.dtype)
    corrected = dB.new_empty(dB.shape, dtype=wide)
    # beta=0 ignores what the new tensor holds. Not scaling ** 2, which may underflow to 0.
    factor = (1 / scaling) * (1 / scaling)
    return corrected.addmm_(dB.to(wide), inverse.to(wide), beta=0, alpha=factor).to(dB.dtype)


def _correct_fake(dB: Tensor, inverse: Tensor, scaling: float) -> Tensor:
    return dB.new_empty(dB.shape)


# A replayed CUDA graph would not look whether lora_A has changed.
_gram_inverse_op = define(
    "gram_inverse",
    "(Tensor lora_A) -> Tensor",
    _gram_inverse,
    _gram_inverse_fake,
    tags=tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None),
)
_correct_op = define(
    "correct", "(Tensor dB, Tensor inverse, float scaling) -> Tensor", _correct, _correct_fake
)
