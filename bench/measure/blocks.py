"""Blocks of a Transformer layer timed: the q, k and v projections, the gated MLP, the whole layer.

Everybody is checked against fp64 (models.Reference), then those who passed take turns. Parts: forward with
what training keeps; forward and backward as one, to dx and every dB. There is no backward by itself: Liger's
writes over what it keeps, and could not be run twice on one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import models
from .contenders import LORAFA, Contender
from .layers import parted, recorded, settle, timed_parts, verdict_of
from .timing import SAMPLE_SECONDS, Step

PARTS = ("forward", "both")
PIECES = {"qkv": "q, k and v projections", "mlp": "MLP", "layer": "whole layer"}


@dataclass(frozen=True)
class BlockTime:
    """A piece (a key of PIECES) of one layer of a model of models.SIZES, Llama's kind, on x (batch, sequence,
    hidden), adapters of rank `rank` on all its linear layers.
    """

    model: str
    piece: str
    batch: int
    sequence: int
    rank: int = 16
    dtype: str = "bf16"

    @property
    def label(self) -> str:
        tokens = f"{self.batch}x{self.sequence} tokens"
        return f"{self.model}, {PIECES[self.piece]}, {tokens} R={self.rank} {self.dtype}"

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linear layers in the piece."""
        named = models.size_of(self.model).linears
        return {"qkv": named[:3], "mlp": named[4:], "layer": named}[self.piece]

    def as_record(self) -> dict:
        """Return the case as JSON types, with its label."""
        size = models.size_of(self.model)
        return {
            "label": self.label,
            "model": self.model,
            "piece": self.piece,
            "batch": self.batch,
            "sequence": self.sequence,
            "hidden": size.hidden,
            "intermediate": size.intermediate,
            "heads": size.heads,
            "kv_heads": size.kv_heads,
            "rank": self.rank,
            "dtype": self.dtype,
        }

    def flops(self) -> int:
        """Return the FLOPs of the linear layers, forward and dx, without the adapters."""
        size = models.size_of(self.model)
        head_dim = size.head_dim or size.hidden // size.heads
        qkv = size.hidden * (size.heads + 2 * size.kv_heads) * head_dim
        weights = {
            "qkv": qkv,
            "mlp": 3 * size.hidden * size.intermediate,
            "layer": replace(size, layers=1, vocab=0).parameters(),
        }
        return 4 * self.batch * self.sequence * weights[self.piece]


CASES = {
    "quick": (BlockTime("Llama block, MHA 256", "mlp", 1, 128, 8, "fp32"),),
    "cpu": tuple(BlockTime("Llama block, MHA 512", piece, 2, 128, 8, "fp32") for piece in PIECES),
    "cuda": tuple(
        BlockTime(model, piece, 4, 2048) for model in ("Llama-3-8B", "Llama-3.2-1B") for piece in PIECES
    ),
}


class Projections(nn.Module):
    """q, k and v of one x: three separate tensors."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def build(case: BlockTime, device: str) -> nn.Module:
    """Build the piece with random weights, the same ones in every call."""
    block = models.build_block(case.model, case.sequence, case.dtype, device, batch=case.batch)
    if case.piece == "qkv":
        return Projections(block.layer.self_attn)
    return block.layer.mlp if case.piece == "mlp" else block


def adapt_modules(module: nn.Module, linears: tuple[str, ...], rank: int) -> nn.Module:
    """Adapt with what this library has for the piece: a group, a gated MLP, or apply_lorafa."""
    from lorafa_kernels.nn.group import LoRAFALinearGroup
    from lorafa_kernels.nn.mlp import LoRAFASwiGLU

    options = {"r": rank, "lora_alpha": models.SCALING * rank}
    if isinstance(module, Projections):
        return LoRAFALinearGroup.from_linears(dict(module.named_children()), **options)
    if isinstance(module, models.Block):
        return models.adapt_lorafa(module, linears, rank)
    return LoRAFASwiGLU.from_linears(module.gate_proj, module.up_proj, module.down_proj, **options)


def obstacle_of(contender: Contender, case: BlockTime, device: str) -> str | None:
    """Say what keeps a contender from running, or None if nothing does."""
    if contender.key == "liger" and case.piece == "qkv":
        return "there is no SwiGLU in this piece"
    return contender.obstacle(device)


def joined(module: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs side by side."""
    y = module(x)
    return torch.cat(y, -1) if isinstance(y, tuple) else y


def reference_of(case: BlockTime, device: str) -> models.Reference:
    """Draw x and dy of a case and compute what its contenders are compared with."""
    return models.reference(build(case, device), case, device, joined)


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
    case: BlockTime,
    keys: Iterable[str],
    device: str,
    *,
    rounds: int = 15,
    tick: Callable[[float], object] = lambda fraction: None,
    sitting: int = 0,
) -> dict:
    """Measure the contenders `keys` of one case; return the record's payload, of kind "time", mode "block".

    tick is called with the fraction that is done. sitting: its number, so that the turns are others in each.
    A contender that raises, or whose results are outside the budget, gets status "failed" and no time; one
    that cannot run here "not run" and the reason. Raises DeviceLost.
    """
    contenders = models.select(keys, "time")
    steps: dict[str, dict[str, Step]] = {}
    verdicts: dict[str, dict] = {}
    reference = None
    for contender in contenders:
        tick(0.0)
        key = contender.key
        found = verdicts[key] = verdict_of(obstacle_of(contender, case, device))
        if found["status"] != "ok":
            continue
        with recorded(found, key=key):
            # Here, and not before the loop: without transformers there is nothing to build.
            reference = reference or reference_of(case, device)
            adapt = adapt_modules if key == LORAFA else contender.build
            module = _unwrapped(adapt(build(case, device), case.linears, case.rank))
            called = models.ready(module, contender, case.dtype)
            errors = reference.errors(contender, module, lambda _, x, called=called: joined(called, x))
            if settle(found, errors):
                x = reference.x.to(device).requires_grad_()
                wanted = (x, *(parameter for parameter in module.parameters() if parameter.requires_grad))
                steps[key] = steps_of(called, wanted, reference.dy.to(device))
    del reference
    models.free()
    rows = timed_parts(*parted(PARTS, steps, verdicts), device, "eager", rounds, tick, sitting)
    return {"case": case.as_record(), "mode": "block", "rounds": rounds, "rows": rows}


def _unwrapped(adapted: nn.Module) -> nn.Module:
    """Return the module that PEFT wrapped, whose own call does more than the module's."""
    inner = getattr(adapted, "base_model", None)
    return adapted if inner is None else inner.model


def estimate(case: BlockTime, keys: Iterable[str], device: str, rounds: int) -> float:
    """Return roughly how many seconds time_block takes, for budgets and progress bars."""
    keys = list(keys)
    flops = case.flops()
    rate, exact_rate, fixed, compiling = {"cuda": (3e14, 1e13, 0.5, 20.0), "cpu": (4e10, 1e10, 0.1, 20.0)}[
        device
    ]
    sample = flops / rate + {"cuda": 2e-3, "cpu": 1e-2}[device]
    if device == "cpu":
        sample = max(sample, SAMPLE_SECONDS)
    compiling *= "compiled-lorafa" in keys
    timed = len(keys) * (len(PARTS) * sample * rounds + 4 * flops / rate + fixed)
    return timed + 4 * flops / exact_rate + compiling
