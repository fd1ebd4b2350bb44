"""transformers' save_pretrained of an adapted model, which writes what from_pretrained reads as the base
model.

Its file holds lora_A and lora_B beside the base weights, keys that the base model does not know and skips.
Trainers save their checkpoints that way and resume from them, so it warns and goes on.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any

from torch import nn

_NAME = "save_pretrained"


class SavePretrained:
    """What stands in the place of a model's save_pretrained; copies of the model get their own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        # A trainer saves many checkpoints.
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Warn, the first time, and save as the model's class does."""
        model = self._model()
        if not self._warned:
            self._warn()
        return getattr(type(model), _NAME)(model, *args, **kwargs)

    def _warn(self) -> None:
        self._warned = True
        warnings.warn(
            "save_pretrained writes the base model with the adapter's tensors beside it, and from_pretrained "
            "reads that as the base model, without the adapter. Call lorafa_kernels.save_adapter(model, "
            "folder) to save the adapter; or merge it with unload_adapter(model), and then save_pretrained. "
            "In a Trainer, lorafa_kernels.integrations.transformers.adapter_checkpoints(trainer) makes its "
            "checkpoints adapters",
            stacklevel=3,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        return SavePretrained(copy.deepcopy(self._model(), memo))

    def __reduce__(self):
        return SavePretrained, (self._model(),)


def guard_save(model: nn.Module) -> None:
    """Let save_pretrained of a model that has one warn, unless its author has put his own there."""
    if callable(getattr(type(model), _NAME, None)) and _NAME not in vars(model):
        model.__dict__[_NAME] = SavePretrained(model)


def release_save(model: nn.Module) -> None:
    """Undo guard_save."""
    if isinstance(vars(model).get(_NAME), SavePretrained):
        del model.__dict__[_NAME]
