"""What PEFT's LoRA layers that run on these kernels have in common: the adapter that acts, and lora_A frozen.

Imports peft, as peft_layers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from peft.tuners import lora
from torch import Tensor, nn

from ..model.placing.guards import is_quiet


class Acting(NamedTuple):
    """The one adapter that acts, on a base layer without hooks: lora_A (r, K), lora_B (N, r)."""

    base: nn.Module
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float
    dropout_p: float


class ServedAdapter:
    """Beside a class of PEFT's LoRA layers: what of its state these kernels can compute."""

    def acting(self) -> Acting | None:
        """The adapter that acts, None where PEFT's own forward must compute: it is merged or disabled, not
        one plain LoRA adapter is active, or a module inside has hooks.
        """
        if self._disable_adapters or self.merged_adapters:
            return None
        # Past nn.Module's __getattr__, which takes longer than the rest.
        own = self._modules
        As, Bs = own["lora_A"]._modules, own["lora_B"]._modules
        names = [name for name in self.active_adapters if name in As]
        if len(names) != 1 or not self.is_plain_lora(names[0]):
            return None
        name = names[0]
        base, A, B, dropout = own["base_layer"], As[name], Bs[name], own["lora_dropout"]._modules[name]
        if not (type(A) is type(B) is nn.Linear and type(dropout) in (nn.Identity, nn.Dropout)):
            return None
        if not (is_quiet(base) and is_quiet(A) and is_quiet(B) and is_quiet(dropout)):
            return None
        scaling = self.scaling[name]
        # A tensor after PEFT's hotswapping; p=1 drops all.
        dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        if type(scaling) not in (int, float) or not 0.0 <= dropout_p < 1.0:
            return None
        factors = A._parameters.get("weight"), B._parameters.get("weight")
        return Acting(base, *factors, float(scaling), dropout_p)

    def trained_names(self) -> frozenset[str]:
        return frozenset(f"lora_B.{name}.weight" for name in self.lora_B)

    def is_plain_lora(self, name: str) -> bool:
        """Whether the adapter is x lora_Aᵀ lora_Bᵀ and nothing more (no DoRA, no bias on lora_B, ...)."""
        return name not in self.lora_variant and not self.lora_bias.get(name)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        super()._freeze_non_trainable_peft_weights(adapter_names)
        for name, A in self.lora_A.items():
            if self.is_plain_lora(name):
                A.requires_grad_(False)


def adapter_obstacle(layer: lora.LoraLayer, name: str) -> str | None:
    """Why an adapter of a LoRA layer of PEFT is not plain LoRA, or None."""
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')} is not plain LoRA"
    return "lora_bias=True" if layer.lora_bias.get(name) else None
