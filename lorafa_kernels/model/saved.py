"""Modules in `modules_to_save`: trained whole, and put back.

They stay where they are and get trainable clones of their tensors; the originals wait outside of the state
dict, in a plain attribute of the module that owns them, so that they follow deepcopy and pickle and come back
with `disable_adapter` and `unload_adapter(merge=False)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..engines import is_dtensor
from ..nn.adapters import DEFAULT
from .names import adapter_names, chosen_adapter, is_inside, layers_of, modules_by_name, unwrap
from .report import AdapterReport

ASIDE = "_lorafa_aside"


@dataclass
class Aside:
    """One module's own tensors that are out of place: the originals, or the trained ones while disabled."""

    tensors: dict[str, Tensor]
    holds_originals: bool


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def clone_tensors(saved: Iterable[nn.Module]) -> list[tuple[nn.Module, Aside]]:
    """Trainable clones of all tensors of the saved modules; one shared within a module stays shared."""
    clones: dict[int, tuple[nn.Module, Aside]] = {}
    for outer in saved:
        memo: dict[int, Tensor] = {}
        for module in outer.modules():
            if id(module) in clones:
                continue
            for tensor in _own_tensors(module).values():
                if id(tensor) not in memo:
                    copy = tensor.detach().clone()
                    memo[id(tensor)] = nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy
            own = {name: memo[id(tensor)] for name, tensor in _own_tensors(module).items()}
            clones[id(module)] = (module, Aside(own, holds_originals=False))
    return list(clones.values())


def swap(module: nn.Module) -> None:
    """Exchange the tensors in place with those aside.

    Those that come back follow what `.to()` did to those in place meanwhile. They stay the same objects, so
    optimizers and ties to other modules hold.
    """
    # Before the first exchange: a module is either in the one state or in the other.
    _check_swap(module)
    aside: Aside = getattr(module, ASIDE)
    for name, waiting in aside.tensors.items():
        current = getattr(module, name)
        if (waiting.device, waiting.dtype) != (current.device, current.dtype):
            waiting.data = waiting.data.to(current.device, current.dtype)
        setattr(module, name, waiting)
        aside.tensors[name] = current
    aside.holds_originals = not aside.holds_originals


def _check_swap(module: nn.Module) -> None:
    for name, waiting in getattr(module, ASIDE).tensors.items():
        current, what = getattr(module, name), f"{name} of {type(module).__name__}"
        if is_dtensor(waiting) != is_dtensor(current):
            raise RuntimeError(
                f"{what} was sharded after apply_lorafa, so the original tensor cannot be put back: do "
                "this in a model that is not sharded"
            )
        if waiting.shape != current.shape:
            raise RuntimeError(
                f"{what} has shape {tuple(current.shape)}, the original has {tuple(waiting.shape)} and "
                "cannot be put back: resize the model (resize_token_embeddings) before apply_lorafa"
            )


def check_originals(model: nn.Module) -> None:
    """Raise RuntimeError if the originals of modules_to_save cannot all come back."""
    for name, module in _replaced(model).items():
        raise RuntimeError(
            f"{name}, a {type(module).__name__} of modules_to_save, was replaced after apply_lorafa, so the "
            "original cannot be put back: resize the model (resize_token_embeddings) before apply_lorafa"
        )
    for module in saved_modules(model):
        _check_swap(module)


def _replaced(model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} of what stands where apply_lorafa had put clones, and has none: it was put there since,
    by resize_token_embeddings say, and is trained whole like the one before.
    """
    core = unwrap(model)
    report: AdapterReport | None = core.__dict__.get("lorafa_report")
    if report is None or not report.modules_to_save:
        return {}
    return {
        name: module
        for name, module in modules_by_name(core, aliases=True).items()
        if is_inside(name, report.modules_to_save)
        and ASIDE not in module.__dict__
        and persistent_tensors(module)
    }


def saved_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if ASIDE in module.__dict__]


def persistent_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and persistent buffers, what its state dict holds without its children's."""
    own = _own_tensors(module)
    return {name: tensor for name, tensor in own.items() if name not in module._non_persistent_buffers_set}


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of the trained parameters and buffers of modules_to_save, once per name they have."""
    found = {}
    for prefix, module in modules_by_name(model, aliases=True).items():
        aside: Aside | None = module.__dict__.get(ASIDE)
        if aside is not None:
            for name, current in persistent_tensors(module).items():
                found[f"{prefix}.{name}"] = current if aside.holds_originals else aside.tensors[name]
    for prefix, module in _replaced(model).items():
        found |= {f"{prefix}.{name}": tensor for name, tensor in persistent_tensors(module).items()}
    return found


def original_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape at apply_lorafa} of what saved_tensors lists, but for modules that were put in since."""
    found = {}
    for prefix, module in modules_by_name(model, aliases=True).items():
        aside: Aside | None = module.__dict__.get(ASIDE)
        if aside is not None:
            for name, current in persistent_tensors(module).items():
                original = aside.tensors[name] if aside.holds_originals else current
                found[f"{prefix}.{name}"] = tuple(original.shape)
    return found


def lorafa_parameters(model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """What to hand to an optimizer: every lora_B (out_features, r) of the active adapter, or of `adapter`,
    then the parameters of modules_to_save, which belong to "default".

    Each comes once. Raises ValueError if the model holds no LoRA-FA layer, or no adapter of that name.
    """
    name = chosen_adapter(model, adapter)
    trained = [holder.lora_B for holder in layers_of(model, name).values()]
    if name != DEFAULT:
        return list({id(parameter): parameter for parameter in trained}.values())
    trained += [tensor for tensor in saved_tensors(model).values() if isinstance(tensor, nn.Parameter)]
    return list({id(parameter): parameter for parameter in trained}.values())


def unsaved_parameters(model: nn.Module, adapter: str | None = None) -> list[str]:
    """Names of the parameters that require grad and are no part of `adapter` and its files; for None, of no
    adapter's.
    """
    names = adapter_names(model) if adapter is None else [adapter]
    held = {id(parameter) for name in names for parameter in lorafa_parameters(model, name)}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
