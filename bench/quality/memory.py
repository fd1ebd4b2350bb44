"""What a step of the study's LLaMA keeps, with and without dropout, checkpointing and adapters on the MLP."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from examples.memory import alive_after, peak_bytes
from lorafa_kernels import LoRAFAConfig, apply_lorafa

from .methods import TARGETS
from .models import ByteLlama
from .settings import ATTENTION_ONLY, DROPOUT, RANK, SCALING, SIZES
from .settings import TARGETS as ALL

WAYS = {
    "lora": "LoRA, PEFT",
    "plain": "LoRA-FA, plain: PEFT with A frozen",
    "library": "LoRA-FA, lorafa_kernels",
}


def cases() -> list[dict]:
    """Return the kept and peak bytes of every way, targets, dropout and checkpointing; fp32, on the CPU."""
    found = []
    for targets, dropout, checkpointing in itertools.product(
        (ALL, ATTENTION_ONLY), (0.0, DROPOUT), (False, True)
    ):
        for way in WAYS:
            kept, peak = measured(way, targets, dropout, checkpointing)
            row = {"way": way, "targets": targets, "dropout": dropout, "checkpointing": checkpointing}
            found.append({**row, "kept_bytes": kept, "peak_bytes": peak})
    return found


def measured(way: str, targets: str, dropout: float, checkpointing: bool) -> tuple[int, int]:
    """Return the bytes alive between forward and backward, and the peak of a step, above the model."""
    kind = ByteLlama()
    model = adapted(kind.fresh(0), way, targets, dropout)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    model.train()
    items = [bytes(range(SIZES["llama"].length))] * SIZES["llama"].batch
    device = torch.device("cpu")

    def forward() -> torch.Tensor:
        return kind.losses(model, items)[0].mean()

    # What is made once, such as the cache of positions, is not kept for backward.
    forward().backward()
    model.zero_grad()
    kept = alive_after(forward)
    model.zero_grad()
    return kept, peak_bytes(lambda: forward().backward(), device)


def adapted(model: nn.Module, way: str, targets: str, dropout: float) -> nn.Module:
    """Put adapters into a model by one of WAYS, and return it."""
    names = TARGETS["llama", targets]
    if way == "library":
        config = LoRAFAConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=names, lora_dropout=dropout)
        return apply_lorafa(model, config)
    model.requires_grad_(False)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=names, lora_dropout=dropout)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if way == "plain" and "lora_A" in name:
            parameter.requires_grad_(False)
    return model
