"""Prepare a model for a way of fine-tuning: adapters put in, the rest frozen, A drawn by the seed alike."""

from __future__ import annotations

import math
import zlib

import torch
from torch import nn

from lorafa_kernels import LoRAFAConfig, apply_lorafa

from .settings import ATTENTION_ONLY, DROPOUT

HEAD = "classifier"
TARGETS = {
    ("minilm", "all-linear"): ["query", "key", "value", "dense"],
    ("llama", "all-linear"): ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ("t5", "all-linear"): ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    ("llama", ATTENTION_ONLY): ["q_proj", "v_proj"],
}


def prepare(
    model: nn.Module, method: str, family: str, *, rank: int, scaling: float, targets: str, seed: int
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Adapt `model` in place; return what is trained of the encoder or language model, and of a new head."""
    if method == "full":
        model.requires_grad_(True)
    else:
        names = TARGETS[family, targets]
        if method == "lora":
            _put_lora(model, names, rank, scaling)
        else:
            options = {"gradient_correction": True} if method == "lorafa-corrected" else {}
            dropout = DROPOUT if method == "lorafa-dropout" else 0.0
            config = LoRAFAConfig(
                r=rank, lora_alpha=scaling * rank, target_modules=names, lora_dropout=dropout, **options
            )
            apply_lorafa(model, config)
        draw_A(model, seed)
    for name, parameter in model.named_parameters():
        if name.startswith(HEAD):
            parameter.requires_grad_(True)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if name.startswith(HEAD)]
    return [p for name, p in trained if not name.startswith(HEAD)], head


def _put_lora(model: nn.Module, names: list[str], rank: int, scaling: float) -> None:
    """PEFT's LoRA, A and B trained."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=names, lora_dropout=0.0)
    inject_adapter_in_model(config, model)


def draw_A(model: nn.Module, seed: int) -> None:
    """Draw every lora_A again by PEFT's rule (Kaiming, a = √5), by the seed and the layer's name alone."""
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            layer = name.partition(".lora_A")[0]
            generator = torch.Generator().manual_seed(hash_of(f"{seed}/{layer}"))
            with torch.no_grad():
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)


def hash_of(text: str) -> int:
    """Return a number that is the same in every process."""
    return zlib.crc32(text.encode())
