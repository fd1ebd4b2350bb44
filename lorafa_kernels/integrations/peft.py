"""PEFT's LoRA layers on these kernels, with lora_A frozen: LoRA-FA (arXiv 2308.03303) for a model, a config
or a trainer that is PEFT's. peft is imported where a function needs it.

    accelerate_peft(model)                            a PeftModel, in place, fused blocks included
    SFTTrainer(..., peft_config=register(config))     before there is a model
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from ..model.adapt import all_or_nothing, parameters_of
from ..model.names import check_module, modules_by_name, unwrap
from ..model.placing.place import Block, place_blocks, remove_blocks
from ..model.report import AdaptedLayer, block_lines, layer_lines

_LOG = logging.getLogger("lorafa_kernels")


@dataclass(frozen=True)
class KeptLayer:
    """A LoRA layer that PEFT computes: name, the class of its base layer, and why."""

    name: str
    base: str
    reason: str


@dataclass(frozen=True)
class PeftReport:
    """What `accelerate_peft` did; `str()` of it is a short table.

    layers: those that run on these kernels now. kept: those that PEFT computes, now or for good. blocks: the
    modules that hold a fused block, and those that were considered and why they hold none. Parameters count
    once, trained ones are those that require grad.
    """

    layers: tuple[AdaptedLayer, ...]
    kept: tuple[KeptLayer, ...]
    trained_parameters: int
    total_parameters: int
    blocks: tuple[Block, ...] = ()

    def __str__(self) -> str:
        share = 100 * self.trained_parameters / max(1, self.total_parameters)
        lines = [
            f"LoRA-FA in PEFT: {len(self.layers)} of {len(self.layers) + len(self.kept)} LoRA layers on "
            f"these kernels, {self.trained_parameters:,} of {self.total_parameters:,} parameters trained "
            f"({share:.2f} %)"
        ]
        lines += layer_lines(self.layers)
        if self.kept:
            alike = Counter(f"{kept.base}: {kept.reason}" for kept in self.kept)
            lines += ["  computed by PEFT, as before:"]
            lines += [f"  {count:4d} x {text}" for text, count in alike.items()]
        return "\n".join(lines + block_lines(self.blocks))


def _layers_module() -> ModuleType:
    """peft_layers.py. Raises ImportError, which says what to install."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError(f"this needs PEFT and transformers ({error}): pip install 'peft>=0.20'") from error
    if not hasattr(BaseTunerLayer, "_freeze_non_trainable_peft_weights"):
        raise ImportError(
            "this needs PEFT 0.20 or newer, which asks its layers what stays frozen: before, "
            "disable_adapter and set_adapter train lora_A again. pip install -U peft"
        )
    from . import peft_layers

    return peft_layers


def accelerate_peft(model: nn.Module, *, fuse: bool = True, norm: bool = True) -> nn.Module:
    """Let the LoRA layers of a PeftModel run on these kernels, in place, with lora_A frozen; return `model`.

    model: a PeftModel, or any model that holds `peft.tuners.lora` layers. Every LoRA layer over a plain
    nn.Linear or Conv1D, over bitsandbytes' Linear4bit of NF4 and over what quantize_base made is served: it
    stays what it is, with PEFT's names, files, merging and adapters, and
    computes y = x weightᵀ + scaling · (x lora_Aᵀ) lora_Bᵀ + bias as `lorafa_linear` does, for x
    (..., in_features). lora_A, (r, in_features), stays frozen whatever is called on the model. What cannot be
    served (DoRA, embeddings, convolutions, other quantised bases, trained biases) keeps PEFT's own path and
    trained lora_A; several active or merged adapters and mixed batches do so while they last. Adapters that
    are added later are served as well. fuse, norm: as in `apply_lorafa`; unloading takes the blocks out.

    `print(model.lorafa_report)` says what runs where and why; it is logged at INFO too. Call it again after a
    change to have it told anew.

    Raises TypeError if `model` is no module, ValueError if it holds no LoRA layer of PEFT, or one of DoRA or
    another variant on what quantize_base made, ImportError without PEFT 0.20 or newer. Any error leaves the
    model untouched.
    """
    check_module(model)
    peft_layers = _layers_module()
    core = unwrap(model)
    base = core.get_base_model() if hasattr(core, "get_base_model") else core
    modules = modules_by_name(base)
    layers = {n: m for n, m in modules.items() if isinstance(m, peft_layers.lora.LoraLayer)}
    if not layers:
        raise ValueError(
            "the model holds no LoRA layer of PEFT: pass what get_peft_model(model, LoraConfig(...)) "
            "returned, or adapt a plain model with lorafa_kernels.apply_lorafa(model, config)"
        )
    for layer in layers.values():
        peft_layers.check_variants(layer)
    with all_or_nothing(core):
        remove_blocks(core.modules())
        kept = {n: reason for n, layer in layers.items() if (reason := peft_layers.obstacle(layer))}
        for name, layer in layers.items():
            if name not in kept:
                peft_layers.serve(layer)
                if reason := peft_layers.present_obstacle(layer):
                    kept[name] = reason
        for module in core.modules():
            if type(module) is peft_layers.lora.LoraModel:
                module.__class__ = peft_layers.ServedLoraModel
        inside = {id(m) for layer in layers.values() for m in layer.modules() if m is not layer}
        outside = {name: module for name, module in modules.items() if id(module) not in inside}
        blocks = place_blocks(outside, fuse=fuse, norm=norm)
        core.lorafa_report = _report(core, peft_layers, layers, kept, blocks)
    _LOG.info("%s", core.lorafa_report)
    return model


def _report(
    model: nn.Module,
    peft_layers: ModuleType,
    layers: dict[str, Any],
    kept: dict[str, str],
    blocks: Iterable[Block],
) -> PeftReport:
    served = []
    for name, layer in layers.items():
        if name not in kept:
            (adapter,) = (a for a in layer.active_adapters if a in layer.lora_A)
            shape = layer.in_features, layer.out_features
            base = peft_layers.kind_of_base(layer)
            served.append(AdaptedLayer(name, *shape, layer.r[adapter], layer.scaling[adapter], base))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return PeftReport(
        tuple(served),
        tuple(KeptLayer(n, type(layers[n].get_base_layer()).__name__, reason) for n, reason in kept.items()),
        trained,
        parameters_of(model),
        tuple(blocks),
    )


def register(config: Any) -> Any:
    """Make a `peft.LoraConfig` one whose layers run on these kernels, with lora_A frozen; return it.

    For get_peft_model(model, register(config)) and trainers that are given a peft_config. Layers are those
    that `accelerate_peft` serves; fused blocks are placed by calling it on the model that came of it. The
    registration is not saved: a folder that PEFT wrote holds plain LoRA.

    Raises TypeError if `config` is no LoraConfig, ImportError without PEFT 0.20 or newer.
    """
    peft_layers = _layers_module()
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module(dict.fromkeys((nn.Linear, peft_layers.Conv1D), peft_layers.choose))
    return config
