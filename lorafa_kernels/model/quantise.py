"""Quantise the linear layers of a model in place, one after another."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..base.kinds import kind_of
from ..engines import sharding_engine
from ..nn.linear import LoRAFALinear
from ..nn.quantised import Quantised, QuantisedLinear
from .names import check_module, ends_of, is_of_peft, lorafa_layers, modules_by_name, owners_of, unwrap

_LOG = logging.getLogger("lorafa_kernels")
# transformers says with it that a quantised model cannot be trained; kept aside under the second name.
_FLAG, _ASIDE = "is_quantized", "_lorafa_is_quantized"


def quantize_base(model: nn.Module, kind: str = "nf4", *, skip: Iterable[str] | None = None) -> nn.Module:
    """Quantise the linear layers of a dense `model` in place and return it.

    kind: "nf4", "nf4-nested" (its scales in 8 bits), "int8" or "fp8" (both by output channel). Each plain
    nn.Linear becomes a QuantisedLinear, an nn.Linear still, under its name, and is frozen; the dense weight
    is freed before the next layer's turn. Then `apply_lorafa` adapts them. What was done, with the error of
    the weights, is logged at INFO to the logger "lorafa_kernels".

    skip: names of layers to leave dense, each a whole name or the end of one. None: the output embedding, and
    what the model's class keeps in fp32. Always left dense: a layer that shares its weight with another
    module, and one whose forward is not nn.Linear's.

    Raises ValueError for an unknown kind, a model without a layer to quantise, one that is adapted (by PEFT,
    too) or sharded already, or is an nn.Linear itself, a weight on the meta device and one that is not finite
    everywhere; TypeError for a skip that holds no str. All but the last are found before anything is changed;
    after it the layers before are quantised, and a second call goes on.
    """
    kind_of(kind)
    check_module(model)
    names = layers_to_quantise(model, skip)
    if not names:
        raise ValueError("there is no linear layer to quantise in the model")
    modules = modules_by_name(model)
    for name in names:
        if modules[name].weight.is_meta:
            raise ValueError(f"{name}.weight is on the meta device and has no values: load the model first")
    places = _places(model, {id(modules[name]): name for name in names})
    del modules
    before = after = 0
    errors: dict[str, float] = {}
    for name in names:
        parent, last = places[name][0]
        linear = parent._modules[last]
        before += linear.weight.nbytes
        try:
            layer = QuantisedLinear.from_linear(linear, kind)
        except ValueError as error:
            raise ValueError(f"{name}: {error} (leave it out with skip)") from error
        errors[name] = _error(layer.dense_weight(), linear.weight)
        for holder, child in places[name]:
            setattr(holder, child, layer)
        after += layer.base().nbytes
        del linear, layer
    _LOG.info("%s", _report(kind, errors, before, after))
    return model


def layers_to_quantise(model: nn.Module, skip: Iterable[str] | None = None) -> list[str]:
    """Names of the layers that quantize_base quantises, which has the arguments and errors."""
    core = unwrap(model)
    for name, module in model.named_modules():
        if engine := sharding_engine(module):
            raise ValueError(
                f"{name or 'the model'} is under {engine} already: quantise the model before it is wrapped"
            )
    if any(map(is_of_peft, model.modules())):
        raise ValueError(
            "the model holds PEFT's layers already, whose adapters would be quantised, too: call "
            "quantize_base before get_peft_model"
        )
    if lorafa_layers(core):
        raise ValueError("the model holds LoRA-FA layers already: call quantize_base before apply_lorafa")
    if isinstance(core, nn.Linear):
        raise ValueError(
            "the model is itself an nn.Linear, so there is no module to replace it in: use "
            "QuantisedLinear.from_linear(model, kind)"
        )
    left_out = _skipped(core, skip)
    owners = owners_of(core)
    names = []
    for name, module in modules_by_name(core).items():
        if not left_out.isdisjoint(ends_of(name)) or not _is_plain(module):
            continue
        if len(owners[id(module.weight)]) == 1:
            names.append(name)
    return names


def _skipped(model: nn.Module, skip: Iterable[str] | None) -> frozenset[str]:
    if skip is not None:
        names = [skip] if isinstance(skip, str) else list(skip)
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise TypeError(f"skip must hold names, got {wrong[0]!r:.80}")
        return frozenset(names)
    names = [name for name in getattr(model, "_keep_in_fp32_modules", None) or () if isinstance(name, str)]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names += [name for name, module in modules_by_name(model).items() if module is output]
    return frozenset(names)


def _is_plain(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or isinstance(module, Quantised):
        return False
    try:
        LoRAFALinear.check_linear(module)
    except (TypeError, ValueError):
        return False
    return True


def _places(model: nn.Module, names: dict[int, str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each of the modules {id: name} is a child."""
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for last, child in parent._modules.items():
            if id(child) in names:
                places.setdefault(names[id(child)], []).append((parent, last))
    return places


def _error(quantised: Tensor, weight: Tensor) -> float:
    """‖quantised − weight‖ / ‖weight‖ (Frobenius)."""
    with torch.no_grad():
        off = torch.linalg.vector_norm(quantised - weight, dtype=torch.float64)
        whole = torch.linalg.vector_norm(weight, dtype=torch.float64)
    return float(off / whole) if whole else 0.0


def _report(kind: str, errors: dict[str, float], before: int, after: int) -> str:
    largest = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    return (
        f"{len(errors)} linear layers quantised to {kind}: {before / 2**20:,.1f} MiB became "
        f"{after / 2**20:,.1f} MiB; error of the weights {100 * mean:.2f} % in the mean, at most "
        f"{100 * errors[largest]:.2f} % ({largest})"
    )


@contextmanager
def trainable_flag(model: nn.Module) -> Iterator[None]:
    """Keep model.is_quantized, by which transformers refuses to train a model that bitsandbytes quantised,
    true to what is done in this context: it is False while adapted layers hold what bitsandbytes' held.
    """
    yield
    core = unwrap(model)
    adapted = any(isinstance(layer, Quantised) for layer in lorafa_layers(core).values())
    if adapted and vars(core).get(_FLAG) is True:
        core.__dict__[_FLAG] = False
        core.__dict__[_ASIDE] = True
    elif not adapted and core.__dict__.pop(_ASIDE, False):
        core.__dict__[_FLAG] = True
