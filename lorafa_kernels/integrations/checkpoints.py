"""What the checkpoints of Trainer, Accelerate and Lightning have in common."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from ..engines import is_dtensor
from ..model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from ..model.names import chosen_adapter, is_of_peft, lorafa_layers, unwrap
from ..model.saved import unsaved_parameters


def adapted(model: nn.Module, how: str) -> nn.Module:
    """`model` without its wrappers, if an adapter's file can be its checkpoint.

    how: what the user called, for the message. Raises ValueError for a PeftModel, a model without LoRA-FA
    layers, one that is split over processes, and one that trains what the file does not hold, such as a
    second adapter.
    """
    core = unwrap(model)
    if any(is_of_peft(module) for module in core.modules()):
        raise ValueError(
            f"the model is PEFT's, whose own save_pretrained writes the adapter alone: leave out {how}"
        )
    if not lorafa_layers(core):
        raise ValueError(
            "the model holds no LoRA-FA layer: call apply_lorafa(model, config) before its trainer or "
            "optimizer is made"
        )
    if any(map(is_dtensor, core.parameters())):
        raise ValueError(
            "the model is split over processes already (tensor parallelism, fully_shard), and Trainer and "
            "Accelerate wrap it in DistributedDataParallel, which refuses it: train it in a loop of your "
            "own, as examples/train_llama.py does, and call save_adapter"
        )
    if others := unsaved_parameters(core, chosen_adapter(core, None)):
        more = ", ..." if len(others) > 4 else ""
        raise ValueError(
            f"{', '.join(others[:4])}{more} would be trained and be missing in the checkpoint, which holds "
            "the active adapter alone: name their modules in modules_to_save, or freeze them, those of other "
            "adapters too (requires_grad_(False))"
        )
    return core


def read_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """load_adapter of a checkpoint into the model that goes on, whose errors say what to do then."""
    try:
        load_adapter(model, folder)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(
            f"cannot go on from {folder}: {error}. {CONFIG_FILE} in it says with which r, lora_alpha and "
            "target_modules to adapt the model; else resume from another checkpoint, or from none"
        ) from error


def holds_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has the files of save_adapter, or one of them."""
    return any((Path(folder) / name).exists() for name in (WEIGHTS_FILE, CONFIG_FILE))
