"""Blocks of a Transformer layer timed: the q, k and v projections, the gated MLP, the whole layer.

Everybody is checked against fp64 (models.Reference), then those who passed take turns. Parts: forward with
what training keeps; forward and backward as one, to dx and every dB. There is no backward by itself: Liger's
writes over what it keeps, and could not be run twice on one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from . import models
from .contenders import LORAFA, Contender
from .layers import checked, parted, timed_parts
from .models import PIECES, BlockCase
from .timing import Step

PARTS = ("forward", "both")
CASES = {
    "quick": (BlockCase("Llama block, MHA 256", 1, 128, 8, "fp32", piece="mlp", scope="time"),),
    "cpu": tuple(
        BlockCase("Llama block, MHA 512", 2, 128, 8, "fp32", piece=piece, scope="time") for piece in PIECES
    ),
    "cuda": tuple(
        BlockCase(model, 4, 2048, piece=piece, scope="time")
        for model in ("Llama-3-8B", "Llama-3.2-1B")
        for piece in PIECES
    ),
}


def adapt_modules(module: nn.Module, linears: tuple[str, ...], rank: int) -> nn.Module:
    """Adapt with what this library has for the piece: a group, a gated MLP, or apply_lorafa."""
    from lorafa_kernels.nn.group import LoRAFALinearGroup
    from lorafa_kernels.nn.mlp import LoRAFASwiGLU

    options = {"r": rank, "lora_alpha": models.SCALING * rank}
    if isinstance(module, models.Projections):
        return LoRAFALinearGroup.from_linears(dict(module.named_children()), **options)
    if isinstance(module, models.Block):
        return models.adapt_lorafa(module, linears, rank)
    return LoRAFASwiGLU.from_linears(module.gate_proj, module.up_proj, module.down_proj, **options)


def steps_of(module: Callable, wanted: tuple[Tensor, ...], dy: Tensor) -> dict[str, Step]:
    """Return what is timed for each part; wanted: x and what is trained."""
    x = wanted[0]
    y = module(x)
    outputs = y if isinstance(y, tuple) else (y,)
    # Of the outputs as they are, and not of one made of them.
    dys = tuple(part.contiguous() for part in dy.split([part.shape[-1] for part in outputs], -1))
    del y, outputs

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x), wanted, dys if len(dys) > 1 else dys[0])

    return {"forward": lambda: module(x), "both": both}


def time_block(
    case: BlockCase,
    keys: Iterable[str],
    device: str,
    *,
    rounds: int = 15,
    tick: Callable[[float], object] = lambda fraction: None,
    sitting: int = 0,
) -> dict:
    """Measure the contenders `keys` of one case, kind "time", mode "block"."""
    reference = None

    def check(contender: Contender) -> tuple[dict, Callable]:
        nonlocal reference
        # Here, and not before: without transformers there is nothing to build.
        reference = reference or models.reference(case, device)
        adapt = adapt_modules if contender.key == LORAFA else contender.build
        module = adapt(models.build(case, device), case.linears, case.rank)
        if wrapper := getattr(module, "base_model", None):
            # PEFT's, whose own call does more than the module's.
            module = wrapper.model
        called = models.ready(module, contender, case.dtype)
        errors = reference.errors(contender, module, lambda _, x: models.joined(called, x))
        x, dy = reference.x.to(device).requires_grad_(), reference.dy.to(device)
        wanted = (x, *(parameter for parameter in module.parameters() if parameter.requires_grad))
        return errors, partial(steps_of, called, wanted, dy)

    def obstacle(contender: Contender) -> str | None:
        if contender.key == "liger" and case.piece == "qkv":
            return "there is no SwiGLU in this piece"
        return contender.obstacle(device)

    steps, verdicts = checked(models.select(keys, "time"), obstacle, check, tick)
    reference = None
    models.free()
    rows = timed_parts(*parted(PARTS, steps, verdicts), device, "eager", rounds, tick, sitting)
    return {"case": case.as_record(), "mode": "block", "rounds": rounds, "rows": rows}
