"""Merge adapters into the weights, take them out again, and remove or disable them.

These functions work on any model that holds a `LoRAFALinear`, whether `apply_lorafa` or its author put it
there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from torch import nn

from ..nn.linear import LoRAFALinear
from ..nn.quantised import LoRAFAQuantisedLinear
from .names import ADAPTER_CONFIGS, adapted_layers, named_layers, owners_of, unwrap
from .placing.place import remove_blocks
from .pretrained import release_save
from .quantise import trainable_flag
from .saved import ASIDE, check_originals, saved_modules, swap
from .ties import UNTIED, ties_told

_LOG = logging.getLogger("lorafa_kernels")


def merge_adapter(
    model: nn.Module, *, keep: str = "device", safe_merge: bool = False, requantize: bool = False
) -> nn.Module:
    """Install weight + scaling · lora_B lora_A (N, K) of the active adapter in every layer;
    `unmerge_adapter` takes it back.

    The old weight is kept, with keep="cpu" on the CPU, unless another module shares it. Layers that are
    merged already stay so. A layer that shared its weight with the input embedding has one of its own then,
    and model.config.tie_word_embeddings says so until it is unmerged.

    A layer on a quantised base gets a dense weight, several times as large as its codes. With requantize=True
    it stays quantised: the merged weight is quantised anew, which is off by an error of the size of the
    base's own; how much is logged as a warning to the logger "lorafa_kernels".

    Raises, naming the layer, and changes nothing: ValueError if the model holds no LoRA-FA layer, with
    safe_merge=True if a merged weight is not finite everywhere, and with requantize=True if no layer has a
    quantised base; RuntimeError while an adapter is disabled and for weights that are offloaded, partitioned
    or sharded.
    """
    layers = {name: layer for name, layer in named_layers(model).items() if not layer.merged}
    _check_merge(layers, safe_merge)
    again = _requantised(layers, requantize)
    owners = owners_of(model) if keep == "cpu" else {}
    done: list[LoRAFALinear] = []
    try:
        with ties_told(model):
            for layer in layers.values():
                shared = len(owners.get(id(layer.weight), ())) > 1
                options = {"requantize": True} if layer in again else {}
                layer.merge(keep="device" if shared else keep, **options)
                done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    return model


def _check_merge(layers: dict[str, LoRAFALinear], safe_merge: bool) -> None:
    if not isinstance(safe_merge, bool):
        raise TypeError(f"safe_merge must be True or False, got {safe_merge!r}")
    for name, layer in layers.items():
        layer.check_mergeable(name)
    if safe_merge:
        for name, layer in layers.items():
            layer.finite_merged_weight(name)


def _requantised(layers: dict[str, LoRAFALinear], requantize: bool) -> set[LoRAFALinear]:
    """The layers whose merged weight is to be quantised anew; logs by how much it is off then."""
    if not isinstance(requantize, bool):
        raise TypeError(f"requantize must be True or False, got {requantize!r}")
    if not requantize or not layers:
        return set()
    quantised = {name: layer for name, layer in layers.items() if isinstance(layer, LoRAFAQuantisedLinear)}
    if not quantised:
        raise ValueError("requantize=True, but no LoRA-FA layer of the model has a quantised base")
    errors = {name: layer.requantised_error() for name, layer in quantised.items()}
    largest = max(errors, key=errors.__getitem__)
    _LOG.warning(
        "%d merged weights quantised again: off by %.2f %% of the weight in the mean, at most %.2f %% (%s)",
        len(errors),
        100 * sum(errors.values()) / len(errors),
        100 * errors[largest],
        largest,
    )
    return set(quantised.values())


def unmerge_adapter(model: nn.Module) -> nn.Module:
    """Put the old weights back, same objects, same bits. Raises ValueError without a LoRA-FA layer."""
    with ties_told(model):
        for layer in adapted_layers(model):
            if layer.merged:
                layer.unmerge()
    return model


def unload_adapter(
    model: nn.Module, merge: bool = True, *, safe_merge: bool = False, requantize: bool = False
) -> nn.Module:
    """Put a linear layer back for every LoRA-FA layer and return the model; all adapters are gone after that.

    merge=True: with the active adapter merged into the weights, and with the trained tensors in
    modules_to_save; no copy of the old is kept. merge=False: with the original Parameter objects everywhere.
    Each has the class, hooks and attributes of the layer that was adapted. requires_grad of what remains does
    not change. A layer that shared its weight with the input embedding and was merged has one of its own
    then, and model.config.tie_word_embeddings says so.

    A layer on a quantised base becomes a dense nn.Linear when it is merged; with requantize=True it stays
    quantised, as merge_adapter says.

    Errors as merge_adapter, those about merging with merge=True alone; RuntimeError also for a layer whose
    forward is patched and for modules_to_save whose original cannot come back. They change nothing: all is
    checked first. Then layers go one by one, so that one merged weight at a time is held beside the old one;
    where memory runs out a second call does the rest.
    """
    layers = named_layers(model)
    if not isinstance(merge, bool):
        raise TypeError(f"merge must be True or False, got {merge!r}")
    if requantize and not merge:
        raise ValueError("requantize=True goes with merge=True: without merging the base stays as it is")
    if isinstance(model, LoRAFALinear):
        again = {"requantize": True} if model in _requantised(layers, requantize) else {}
        return model.to_linear(merge=merge, safe_merge=safe_merge, **again)
    for name, layer in layers.items():
        layer.check_unloadable(name, merge=merge)
    if merge:
        _check_merge(layers, safe_merge)
    else:
        check_originals(model)
    again = _requantised(layers, requantize)
    with ties_told(model), trainable_flag(model):
        _unload(model, list(layers.values()), merge, again)
    release_save(unwrap(model))
    for name in ("lorafa_config", "lorafa_report", ADAPTER_CONFIGS, UNTIED):
        unwrap(model).__dict__.pop(name, None)
    return model


def _unload(model: nn.Module, layers: list[LoRAFALinear], merge: bool, again: set[LoRAFALinear]) -> None:
    remove_blocks(model.modules())
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            parents.setdefault(id(child), []).append((parent, name))
    layers.reverse()
    while layers:
        layer = layers.pop()
        linear = layer.to_linear(merge=merge, **({"requantize": True} if layer in again else {}))
        again.discard(layer)
        for parent, name in parents[id(layer)]:
            setattr(parent, name, linear)
    for module in saved_modules(model):
        if getattr(module, ASIDE).holds_originals != merge:
            swap(module)
        delattr(module, ASIDE)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the model computes as the frozen base model does, modules_to_save included.

    Merged layers are unmerged for it, and merged again on leaving, with the adapter as it is then. Whatever
    ends the context, every layer gets back the flag that it had on entering, so that contexts nest. No
    requires_grad changes. Raises ValueError without a LoRA-FA layer, RuntimeError if the originals of
    modules_to_save cannot come back, or a merged weight cannot.
    """
    layers = adapted_layers(model)
    flags = [(layer, layer.adapter_enabled) for layer in layers]
    merged: list[tuple[LoRAFALinear, str]] = []
    trained = [module for module in saved_modules(model) if getattr(module, ASIDE).holds_originals]
    check_originals(model)
    try:
        with ties_told(model):
            for layer in layers:
                if layer.merged:
                    keep = layer.kept_where()
                    layer.unmerge()
                    merged.append((layer, keep))
                layer.adapter_enabled = False
            for module in trained:
                swap(module)
        yield model
    finally:
        with ties_told(model):
            for layer, keep in merged:
                # Which merging asks for.
                layer.adapter_enabled = True
                layer.merge(keep)
            for layer, flag in flags:
                layer.adapter_enabled = flag
            for module in trained:
                if ASIDE in module.__dict__ and not getattr(module, ASIDE).holds_originals:
                    swap(module)
