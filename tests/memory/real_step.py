"""A training step that runs, with tensors that have values: what the planner is compared with. It shares no
code with it.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Taken(NamedTuple):
    """kept: bytes that forward leaves allocated. saved: those that autograd keeps, by saved_tensors_hooks,
    without parameters, buffers and inputs. peak: the most above what was there before.
    """

    kept: int
    saved: int
    peak: int


class PlainLoRAFA(nn.Module):
    """LoRA-FA as people write it."""

    def __init__(self, base: nn.Linear, r: int, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(r, base.in_features, dtype=base.weight.dtype), requires_grad=False)
        self.B = nn.Parameter(torch.randn(base.out_features, r, dtype=dtype))
        self.dropout = nn.Dropout(dropout)

    @property
    def weight(self) -> nn.Parameter:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * ((self.dropout(x) @ self.A.T) @ self.B.to(x.dtype).T)


def adapt(model: nn.Module, method: str, names: tuple[str, ...], r: int, dropout: float) -> nn.Module:
    """Adapt the layers `names` of a model with values, by PEFT, this library or the formula."""
    if method == "full":
        return model.requires_grad_(True)
    if method in ("lorafa", "lorafa-nf4"):
        from lorafa_kernels import LoRAFAConfig, apply_lorafa, quantize_base

        if method == "lorafa-nf4":
            quantize_base(model, "nf4")
        config = LoRAFAConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=list(names))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return apply_lorafa(model, config)
    if method == "lorafa-plain":
        model.requires_grad_(False)
        for name in names:
            parent, _, last = name.rpartition(".")
            base = model.get_submodule(name)
            setattr(model.get_submodule(parent), last, PlainLoRAFA(base, r, dropout, torch.float32))
        return model
    if method not in ("peft", "lora"):
        raise ValueError(f"no step is known for the method {method!r}")
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=list(names))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, config, autocast_adapter_dtype=method == "peft")
    return model


def take(model: nn.Module, loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer, inputs) -> Taken:
    """Run two steps, and a third and a fourth that are measured."""

    def step() -> None:
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    saved = _saved(loss_of, [*model.parameters(), *model.buffers(), *inputs])
    optimizer.zero_grad()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    with profiler, torch.profiler.record_function("a step"):
        with torch.profiler.record_function("its forward"):
            loss = loss_of()
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        ((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda change: change[0]
    )
    spans = {e.name(): e for e in events if e.name() in ("a step", "its forward")}
    first = spans["a step"].start_ns()
    levels = list(itertools.accumulate((size for at, size in changes if at >= first), initial=0))
    end = spans["its forward"].start_ns() + spans["its forward"].duration_ns()
    kept = sum(size for at, size in changes if first <= at <= end)
    return Taken(kept, saved, max(levels))


def _saved(loss_of: Callable[[], Tensor], own: list[Tensor]) -> int:
    elsewhere = {tensor.untyped_storage().data_ptr() for tensor in own}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in elsewhere and not isinstance(tensor, nn.Parameter):
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of()
    return sum(storage.nbytes() for storage in held.values())
