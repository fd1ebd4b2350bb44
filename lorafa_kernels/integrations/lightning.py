"""Lightning's checkpoints of a module whose model apply_lorafa has adapted: without the frozen base.

    class Module(AdapterCheckpoints, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = apply_lorafa(base_model(), config)

Neither lightning nor pytorch_lightning is imported here: the class serves both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..model.names import is_of_peft, lorafa_layers
from ..model.saved import saved_tensors

# Beside Lightning's own entries: {layer: scaling}, which state dicts do not have.
_SCALINGS = "lorafa_scalings"


class AdapterCheckpoints:
    """Base class to put before LightningModule, so that checkpoints leave out the frozen base.

    state_dict of a checkpoint has lora_A, lora_B, the modules of modules_to_save, whatever else requires
    grad, buffers, and what is outside of the adapted model, under the module's own names. Resuming,
    `load_from_checkpoint` and checkpoints that were written without this class work as they do in Lightning.

    A checkpoint of other layers, ranks or scalings is a ValueError that names the first; so are a PeftModel,
    and a module without LoRA-FA layers. A subclass that has these hooks itself calls super()'s.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the base out of checkpoint["state_dict"], which no merged layer gives."""
        super().on_save_checkpoint(checkpoint)
        layers = _layers(self)
        left_out = _base_names(self)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in left_out}
        checkpoint[_SCALINGS] = {name: layer.scaling for name, layer in layers.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this module, before any of it is loaded; add the base's tensors."""
        super().on_load_checkpoint(checkpoint)
        layers = _layers(self)
        own, base = self.state_dict(), _base_names(self)
        _check_state(checkpoint["state_dict"], own, base)
        for name, scaling in checkpoint.get(_SCALINGS, {}).items():
            if scaling != layers[name].scaling:
                raise ValueError(
                    f"the checkpoint has scaling={scaling} for {name}, the module {layers[name].scaling}: "
                    "use the lora_alpha, r and use_rslora that it was trained with"
                )
        # Lightning would call them missing. They are loaded into themselves.
        checkpoint["state_dict"] = {n: own[n] for n in base if n in own} | checkpoint["state_dict"]


def _layers(module: nn.Module) -> dict[str, Any]:
    if any(is_of_peft(inner) for inner in module.modules()):
        raise ValueError(
            "the module holds a model of PEFT's: leave out AdapterCheckpoints, and save that model with its "
            "save_pretrained"
        )
    if not (layers := lorafa_layers(module)):
        raise ValueError(
            "the module holds no LoRA-FA layer: call apply_lorafa(model, config) in its __init__, so that "
            "the optimizer and checkpoints see the adapter"
        )
    return layers


def _base_names(module: nn.Module) -> set[str]:
    """Names in the state dict of frozen parameters of adapted models. Buffers stay: training may change them
    (BatchNorm's running statistics).
    """
    roots = [inner for inner in module.modules() if "lorafa_report" in vars(inner)] or [module]
    kept = {id(factor) for layer in lorafa_layers(module).values() for factor in (layer.lora_A, layer.lora_B)}
    kept |= {id(tensor) for root in roots for tensor in saved_tensors(root).values()}
    base = {
        id(tensor)
        for root in roots
        for tensor in root.parameters()
        if not tensor.requires_grad and id(tensor) not in kept
    }
    return {n for n, tensor in module.named_parameters(remove_duplicate=False) if id(tensor) in base}


def _check_state(state: dict[str, Tensor], own: dict[str, Tensor], base: set[str]) -> None:
    for name, tensor in own.items():
        if name not in state and name not in base:
            raise ValueError(
                f"the checkpoint lacks {name}: it was written without this adapter, or with other "
                "target_modules"
            )
        if name in state and state[name].shape != tensor.shape:
            raise ValueError(
                f"the checkpoint has {name} of shape {tuple(state[name].shape)}, the module "
                f"{tuple(tensor.shape)}: use the configuration that it was trained with"
            )
    if surplus := [name for name in state if name not in own]:
        raise ValueError(
            f"the checkpoint has {surplus[0]}, which the module has not: use the target_modules and "
            "modules_to_save that it was trained with"
        )
