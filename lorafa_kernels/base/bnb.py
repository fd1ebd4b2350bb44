"""bitsandbytes' Linear4bit as a base of this library, and back: the same codes and scales, bit for bit, in
the same memory.

    Params4bit.data (⌈N·K/2⌉, 1) uint8       weight, by rows where K is a multiple of 64
    quant_state.absmax fp32 or uint8          absmax
    quant_state.state2.absmax, .code          nested_absmax, nested_code
    quant_state.offset                        nested_offset

bitsandbytes is imported by to_params4bit alone. Source of the names: bitsandbytes 0.50.2, functional.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import nf4
from .frozen import QuantisedBase, base_of
from .kinds import KINDS, bits, values


def is_linear4bit(module: nn.Module) -> bool:
    """Whether `module` is bitsandbytes' Linear4bit."""
    return any(
        kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")
        for kind in type(module).__mro__
    )


def state_of(module: nn.Module) -> Any:
    """bitsandbytes' QuantState of a Linear4bit, None before it is quantised."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def is_packed(module: nn.Module) -> bool:
    """Whether bitsandbytes has packed a Linear4bit for CPU inference."""
    state = state_of(module)
    return hasattr(state, "original_qshape") or getattr(state, "packing_format_for_cpu", False)


def from_linear4bit(module: nn.Module, *, known: bool = False) -> QuantisedBase:
    """Return the base of a Linear4bit, whose tensors share their memory with it. known: its state was taken
    over before; its table of values, which the device must be waited for, is not read again.

    Raises ValueError for one that has not been quantised yet, has been packed for CPU inference, or is not of
    NF4 with blocks of 64.
    """
    parameter, state = module.weight, state_of(module)
    if state is None:
        raise ValueError(
            "this Linear4bit has not been quantised yet: move it to its device first (module.to(device))"
        )
    if is_packed(module):
        raise ValueError(
            "bitsandbytes has packed this Linear4bit for CPU inference (a forward in eval mode does), which "
            "rounds its scales: load the model again and adapt it before the first forward"
        )
    if state.quant_type != "nf4":
        raise ValueError(f"this Linear4bit holds {state.quant_type}, and only nf4 is supported")
    if state.blocksize != nf4.BLOCK or (state.nested and state.state2.blocksize != nf4.NESTED_BLOCK):
        raise ValueError(
            f"this Linear4bit has blocks of {state.blocksize}, and only blocks of {nf4.BLOCK} are supported "
            f"(with nested scales, {nf4.NESTED_BLOCK} of them)"
        )
    if not known and not torch.equal(state.code.cpu(), torch.tensor(nf4.CODE)):
        raise ValueError("this Linear4bit has another table of values than NF4's")
    shape = (module.out_features, module.in_features)
    if tuple(state.shape) != shape:
        raise ValueError(f"this Linear4bit holds a weight {tuple(state.shape)}, expected {shape}")
    stored = {"weight": parameter.data.view(torch.uint8), "absmax": _stored(state.absmax)}
    if state.nested:
        stored["nested_absmax"] = _stored(state.state2.absmax)
        stored["nested_code"] = _stored(state.state2.code)
        stored["nested_offset"] = _stored(state.offset)
    kind = KINDS["nf4-nested" if state.nested else "nf4"]
    tensors = [stored[name].reshape(size) for name, (_, size) in kind.spec(*shape).items()]
    return base_of(kind.name, tensors, shape, state.dtype)


def _stored(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.uint8 else bits(tensor.float())


def to_params4bit(base: QuantisedBase, module: nn.Module) -> nn.Parameter:
    """Return a Params4bit for the Linear4bit `module` that shares its memory with `base`.

    Raises ImportError where bitsandbytes is missing, ValueError for a base that is not NF4.
    """
    try:
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit
    except ImportError as error:
        raise ImportError(
            "bitsandbytes is needed to make its Linear4bit: pip install bitsandbytes (0.50 or newer)"
        ) from error
    if base.kind.name not in ("nf4", "nf4-nested"):
        raise ValueError(f"a Linear4bit holds NF4, and this base is {base.kind.name}")
    named = dict(zip(base.kind.names, base.tensors, strict=True))
    nested = base.kind.name == "nf4-nested"
    absmax = named["absmax"].reshape(-1)
    state2 = offset = None
    if nested:
        offset = values(named["nested_offset"]).view(())
        state2 = QuantState(
            absmax=values(named["nested_absmax"]),
            code=values(named["nested_code"]),
            blocksize=nf4.NESTED_BLOCK,
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=absmax if nested else values(absmax),
        shape=torch.Size(base.shape),
        code=torch.tensor(nf4.CODE, device=base.device),
        blocksize=nf4.BLOCK,
        quant_type="nf4",
        dtype=base.dtype,
        offset=offset,
        state2=state2,
    )
    storage = getattr(module, "quant_storage", torch.uint8)
    return Params4bit(
        named["weight"].detach().reshape(-1).view(storage).unsqueeze(1),
        requires_grad=False,
        quant_state=state,
        blocksize=nf4.BLOCK,
        compress_statistics=nested,
        quant_type="nf4",
        quant_storage=storage,
        module=module,
        bnb_quantized=True,
    )
