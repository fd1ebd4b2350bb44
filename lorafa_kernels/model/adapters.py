"""Several adapters on one frozen base: add them, choose one, delete them, and mix them in a batch.

The adapter of apply_lorafa is "default" and belongs to the layers themselves. Others are added to layers that
are adapted already; a layer that an adapter does not target is the frozen base layer for it. lora_A stays
frozen in all of them, and every lora_B requires grad unless it is told otherwise: an adapter that does not
act gets no gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..engines import is_dtensor, sharding_engine
from ..mixed.rows import BASE, Rows
from ..nn.adapters import DEFAULT, NO_ADAPTER, Mixture, Replay, check_name, outside_of_compilers
from ..nn.initialise import seed_for
from ..nn.linear import LoRAFALinear
from .adapt import all_or_nothing
from .config import LoRAFAConfig
from .names import ADAPTER_CONFIGS, adapter_names, known_adapter, named_layers, target_names, unwrap
from .patterns import limited
from .peft_config import as_config

# What names no adapter in an index.
_NO_ADAPTER = (None, NO_ADAPTER)
queue_callback = torch.autograd.Variable._execution_engine.queue_callback


def add_adapter(
    model: nn.Module, name: str, config: LoRAFAConfig, *, share_lora_A: bool = False
) -> nn.Module:
    """Add the adapter `name` to layers of an adapted model and return the model; which one acts does not
    change.

    config: a LoRAFAConfig or `peft.LoraConfig`; without target_modules, all layers that are adapted.
    share_lora_A: the adapter has the lora_A of "default" in each layer, frozen like all of them, and its own
    lora_B; it must have the same rank. A mixed batch then takes one product for z.

    Raises, and changes nothing: ValueError if the model holds no LoRA-FA layer, for a name that is taken or
    that no module can have, a target that is not adapted yet, another rank with share_lora_A, modules_to_save
    (the base is shared), and a sharded model; TypeError for another config.
    """
    layers = targets_of(model, name, config)
    with all_or_nothing(unwrap(model)):
        put_adapter(unwrap(model), name, as_config(config), layers, share_lora_A)
    return model


def targets_of(model: nn.Module, name: str, config: LoRAFAConfig) -> dict[str, LoRAFALinear]:
    """{name: layer} that the new adapter `name` acts on. Raises as add_adapter, but for ranks."""
    check_name(name)
    layers = named_layers(model)
    if name in adapter_names(model):
        raise ValueError(f"the model already has an adapter {name!r}")
    for where, module in model.named_modules():
        if engine := sharding_engine(module):
            raise ValueError(
                f"{where or 'the model'} is under {engine} already, which would not see the adapter's "
                "parameters: add all adapters first, then wrap the model"
            )
    _check_several(layers)
    config = as_config(config)
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save={config.modules_to_save!r} is not supported in a further adapter: all adapters "
            "share the base, and apply_lorafa's config says what of it is trained"
        )
    if config.target_modules is None:
        return layers
    with limited():
        targets = target_names(unwrap(model), config)
    if not targets:
        raise ValueError(f"target_modules matches no module: {config.target_modules!r}")
    for target in targets:
        if target not in layers:
            raise ValueError(
                f"{target} matches target_modules and is not adapted: a further adapter can only act on "
                "layers that apply_lorafa adapted"
            )
    return {target: layers[target] for target in targets}


def _check_several(layers: dict[str, LoRAFALinear]) -> None:
    for where, layer in layers.items():
        if layer.adapters_obstacle:
            raise ValueError(f"{where} {layer.adapters_obstacle}, where a layer has one adapter alone")


def put_adapter(
    model: nn.Module, name: str, config: LoRAFAConfig, layers: dict[str, LoRAFALinear], share_lora_A: bool
) -> None:
    """Add an adapter to layers that targets_of found."""
    for where, layer in layers.items():
        r, lora_alpha = config.rank_and_alpha(where)
        try:
            layer.add_adapter(
                name,
                r=r,
                lora_alpha=lora_alpha,
                lora_dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
                init_lora_weights=config.init_lora_weights,
                init_seed=seed_for(config.init_seed, where),
                adapter_dtype=config.adapter_dtype,
                gradient_correction=config.gradient_correction,
                share_lora_A=share_lora_A,
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    # Another dict: that of before may be wanted back.
    setattr(model, ADAPTER_CONFIGS, {**model.__dict__.get(ADAPTER_CONFIGS, {}), name: config})


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Remove a further adapter and return the model. Numbers in an index change, as adapter_names does.

    Raises ValueError for "default", which is the layers' own (unload_adapter removes it), the active adapter
    and an unknown name; RuntimeError within adapter_index.
    """
    layers = named_layers(model)
    known_adapter(model, name)
    if name == DEFAULT:
        raise ValueError("'default' is the layers' own adapter: unload_adapter(model) removes it with them")
    for layer in layers.values():
        if layer.acting.mixture is not None:
            raise RuntimeError("an adapter cannot be deleted within adapter_index: leave it first")
        if layer.acting.name == name:
            raise ValueError(f"{name!r} is active: call set_adapter(model, another) first")
    for layer in layers.values():
        layer.delete_adapter(name)
    core = unwrap(model)
    configs = dict(core.__dict__.pop(ADAPTER_CONFIGS, {}))
    configs.pop(name, None)
    if configs:
        setattr(core, ADAPTER_CONFIGS, configs)
    return model


def set_adapter(model: nn.Module, name: str) -> nn.Module:
    """Let the adapter `name` act from now on and return the model.

    Forward, merge_adapter, unload_adapter, disable_adapter, lorafa_parameters, save_adapter and explain then
    mean it. No requires_grad changes. For none at all, as in PEFT, there is disable_adapter. Raises
    ValueError for an unknown name, RuntimeError while merged.
    """
    layers = named_layers(model)
    known_adapter(model, name)
    for where, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{where} is merged: call unmerge_adapter(model) before set_adapter")
    for layer in layers.values():
        layer.set_acting(dataclasses.replace(layer.acting, name=name))
    return model


@contextlib.contextmanager
def adapter_index(model: nn.Module, index: Tensor | Iterable[int | str | None]) -> Iterator[nn.Module]:
    """Within this context each sample of a batch has the adapter that `index` says.

    index: for each sample (B of them) a place in adapter_names(model), or −1 for the base model alone: an
    int32 or int64 tensor (B,) on the model's device, whose values are read once on entering, or a list, which
    may hold names, and None for the base, as well. Every adapted layer must get x (B, ..., in_features).

    One product computes the base of all samples; each adapter's lora_B gets the gradient of its own samples,
    zero where it has none. A layer keeps z and the index for backward. Where forward is checkpointed it meets
    the same index in backward, also after the context has ended, if the model given here was called and not
    a part of it; forwards with and without an index must not share one backward then. The active adapter
    does not matter. Fused blocks give way. Contexts nest. One model takes one index at a time, whatever the
    thread.

    Raises, before anything is computed: ValueError for a number out of range, an unknown name, another dtype,
    shape or device, and in forward for another length than x has; TypeError for no tensor or list;
    RuntimeError while merged, and in forward for impl="triton", which has no kernel for it yet.
    """
    layers = named_layers(model)
    names = adapter_names(model)
    _check_several(layers)
    for where, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{where} is merged: call unmerge_adapter(model) before adapter_index")
        # Sharded ones may wait on another device than where they compute.
        device = None if is_dtensor(layer.lora_B) else layer.lora_B.device
        if isinstance(index, Tensor) and device not in (None, index.device):
            raise ValueError(f"index is on {index.device}, {where} on {device}: both must be on one device")
    rows = Rows.of(_numbers(index, names), len(names))
    mixture = rows, names
    known = (layer.acting.replay for layer in layers.values())
    replay = next((replay for replay in known if replay is not None), Replay())
    before = [(layer, layer.acting.mixture) for layer in layers.values()]
    called = dict.fromkeys((model, unwrap(model)))
    hooks = [module.register_forward_hook(_hook(replay, mixture)) for module in called]
    for layer in layers.values():
        layer.set_acting(dataclasses.replace(layer.acting, mixture=mixture, replay=replay))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        for layer, previous in before:
            layer.set_acting(dataclasses.replace(layer.acting, mixture=previous))


def _numbers(index: Any, names: tuple[str, ...]) -> Any:
    """`index` with names as numbers."""
    if isinstance(index, (Tensor, str, bytes)) or not isinstance(index, Iterable):
        return index
    numbers = []
    for entry in index:
        if entry in _NO_ADAPTER:
            entry = BASE
        elif isinstance(entry, str):
            if entry not in names:
                raise ValueError(f"the model has no adapter {entry!r:.80}: it has {', '.join(names)}")
            entry = names.index(entry)
        numbers.append(entry)
    return numbers


def _hook(replay: Replay, mixture: Mixture):
    """A forward hook: when backward reaches what the model returned, checkpoints run forward with `mixture`
    until that backward has ended.
    """

    def end() -> None:
        replay.now = None

    def begin(_) -> None:
        if replay.now is not mixture:
            replay.now = mixture
            queue_callback(end)

    @outside_of_compilers
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.grad_fn.register_prehook(begin)

    return hook
