"""Accelerate's save_state and load_state of a model that apply_lorafa has adapted: the adapter alone.

    accelerator = adapter_states(Accelerator())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.save_state(folder)      folder is load_adapter's, too

accelerate is not imported here: what it needs of it comes with the Accelerator.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..model.checkpoint import save_adapter
from ..model.names import check_module, lorafa_layers, unwrap
from .checkpoints import adapted, holds_adapter, read_adapter

_HOW = "adapter_states"
_MARK = "lorafa_states"
# They write the models before the hooks are called, and write them whole.
_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def adapter_states(accelerator: Any) -> Any:
    """Let `accelerator.save_state` and `load_state` write and read adapters alone; return `accelerator`.

    The adapter of the first prepared model is in the folder itself, that of model i > 0 in adapter_<i>;
    optimizer, schedule, random state and what was registered are Accelerate's, as before. Models without
    LoRA-FA layers beside adapted ones are saved whole. A folder written without adapter_states is read, too.

    Raises TypeError for what is no Accelerator, ValueError under FSDP, DeepSpeed and Megatron-LM. save_state
    and load_state raise ValueError for a PeftModel, no adapted model, parameters that require grad and are no
    part of the adapter, and the errors of `save_adapter` and `load_adapter`; optimizers are untouched then.
    """
    if not hasattr(accelerator, "register_save_state_pre_hook"):
        raise TypeError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}")
    engine = accelerator.distributed_type.name
    if engine in _ENGINES:
        raise ValueError(
            f"under {engine} Accelerate's states are those of the engine, of the whole model: leave out "
            f"{_HOW} and call save_adapter(model, folder) at the end"
        )

    if getattr(accelerator, _MARK, False):
        return accelerator

    def save(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        chosen = _adapted(models)
        on_each_node = accelerator.project_configuration.save_on_each_node
        writes = accelerator.is_local_main_process if on_each_node else accelerator.is_main_process
        if writes and len(chosen) == len(models):
            # Of an earlier save_state without adapter_states.
            for file in _whole_models(folder):
                file.unlink()
        for index in reversed(chosen):
            del weights[index]
            if writes:
                save_adapter(chosen[index], _folder(folder, index))

    def load(models: list[nn.Module], folder: str) -> None:
        chosen = _adapted(models)
        of_adapters = any(holds_adapter(_folder(folder, index)) for index in chosen)
        whole = _whole_models(folder)
        if of_adapters and whole and len(chosen) == len(models):
            raise ValueError(
                f"{folder} holds both an adapter and {whole[0].name}, a whole model saved without {_HOW}: "
                "delete those that are not of this state"
            )
        if whole and not of_adapters:
            return
        for index in reversed(chosen):
            read_adapter(chosen[index], _folder(folder, index))
            del models[index]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    setattr(accelerator, _MARK, True)
    return accelerator


def _adapted(models: list[nn.Module]) -> dict[int, nn.Module]:
    """{position: model without wrappers} of those that hold an adapter."""
    for model in models:
        check_module(model)
    found = {
        i: adapted(m, _HOW) for i, m in enumerate(models) if len(models) == 1 or lorafa_layers(unwrap(m))
    }
    if not found:
        raise ValueError(
            "no prepared model holds a LoRA-FA layer: call apply_lorafa(model, config) before "
            "accelerator.prepare(model)"
        )
    return found


def _folder(folder: str | os.PathLike[str], index: int) -> Path:
    return Path(folder) / f"adapter_{index}" if index else Path(folder)


def _whole_models(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of the whole models that Accelerate has written there."""
    return sorted((*Path(folder).glob("model*.safetensors*"), *Path(folder).glob("pytorch_model*.bin*")))
