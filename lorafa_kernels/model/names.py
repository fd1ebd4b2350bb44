"""Modules of a model by their names: which a configuration matches, which are LoRA-FA layers, and what
wrappers add to a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from ..engines import wrapped_child
from ..nn.adapters import DEFAULT, Adapters, LoRAFAAdapter
from ..nn.conv1d import is_conv1d
from ..nn.linear import LoRAFALinear
from .config import LoRAFAConfig, expression_of
from .patterns import compiled

# Where a model keeps the configs of its further adapters.
ADAPTER_CONFIGS = "lorafa_adapter_configs"


def ends_of(name: str) -> list[str]:
    """The name and what follows each of its dots: what an entry of a list may be to match it."""
    return [name, *(name[dot + 1 :] for dot, character in enumerate(name) if character == ".")]


def _layer_index(name: str, patterns: list[str]) -> int | None:
    """Index of the layer that a module belongs to.

    Without patterns it is the first all-digit component that two others precede and one follows.
    """
    if not patterns:
        return next((int(part) for part in name.split(".")[2:-1] if part.isdecimal()), None)
    for pattern in patterns:
        if found := compiled(expression_of("layers_pattern", pattern)).groups(name):
            return int(found["lorafa_index"])
    return None


def _matcher(entries: list[str] | str | None) -> Callable[[str], bool]:
    """The rule of target_modules and exclude_modules (with a set: lists may name 10,000 experts)."""
    if isinstance(entries, str):
        return compiled(entries).matches
    known = frozenset(entries or ())
    return lambda name: not known.isdisjoint(ends_of(name))


def _layer_filter(config: LoRAFAConfig) -> Callable[[str], bool]:
    layers, patterns = config.layers_to_transform, config.layers_pattern or []
    if layers is None or layers == []:
        return lambda name: True
    indices = frozenset(layers if isinstance(layers, list) else [layers])
    full_names = frozenset(config.target_modules)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return lambda name: name in full_names or _layer_index(name, patterns) in indices


def target_names(model: nn.Module, config: LoRAFAConfig) -> list[str]:
    """Names of the modules that `config` adapts, in the model's order; a shared one by its first name."""
    is_excluded = _matcher(config.exclude_modules)
    saved = [compiled(expression_of("modules_to_save", entry)) for entry in config.modules_to_save or []]
    if config.all_linear:
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

        def is_target(name: str, module: nn.Module) -> bool:
            return module is not output and (
                isinstance(module, (nn.Linear, LoRAFALinear)) or is_conv1d(module)
            )
    else:
        matches, in_layers = _matcher(config.target_modules), _layer_filter(config)

        def is_target(name: str, module: nn.Module) -> bool:
            return matches(name) and in_layers(name)

    return [
        name
        for name, module in modules_by_name(model).items()
        if name
        and not isinstance(module, (Adapters, LoRAFAAdapter))
        and is_target(name, module)
        and not is_excluded(name)
        and not any(expression.matches(name) for expression in saved)
    ]


def modules_by_name(model: nn.Module, *, aliases: bool = False) -> dict[str, nn.Module]:
    """{name: module} without wrappers' name components; with aliases a shared module comes once per name.

    A wrapper (torch.compile, FSDP1, activation checkpointing, DDP, AveragedModel, a DeepSpeed engine) and
    what it wraps have one name, which is that of the latter.
    """
    check_module(model)
    found: dict[str, nn.Module] = {}
    plain: dict[str, str] = {}
    left_out: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=not aliases):
        above, _, last = name.rpartition(".")
        parts = [plain.get(above, ""), "" if name in left_out else last]
        plain[name] = ".".join(filter(None, parts))
        found[plain[name]] = module
        if (child := wrapped_child(module)) is not None:
            left_out.add(f"{name}.{child}" if name else child)
    return found


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, AveragedModel, a DeepSpeed engine and torch.compile, whose names checkpoints
    use.
    """
    check_module(model)
    while (child := wrapped_child(model)) in ("module", "_orig_mod"):
        model = model._modules[child]
    return model


def is_inside(name: str, outer_names: Iterable[str]) -> bool:
    return any(name == outer or name.startswith(outer + ".") for outer in outer_names)


def owners_of(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """{id of a parameter: the modules that have it, each once, with its name}"""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in modules_by_name(model).items():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append((name, module))
    return owners


def lorafa_layers(model: nn.Module) -> dict[str, LoRAFALinear]:
    """{name: layer} of every LoRAFALinear in `model`, a shared one under its first name."""
    return {
        name: module for name, module in modules_by_name(model).items() if isinstance(module, LoRAFALinear)
    }


def is_of_peft(module: nn.Module) -> bool:
    """Whether `module` itself is a PeftModel or one of PEFT's layers."""
    return any(
        c.__name__ in ("PeftModel", "BaseTuner", "BaseTunerLayer") and c.__module__.startswith("peft.")
        for c in type(module).__mro__
    )


def no_layers(model: nn.Module) -> ValueError:
    """What to raise for a model that holds no LoRA-FA layer."""
    if any(map(is_of_peft, model.modules())):
        return ValueError(
            "the model is PEFT's, and has PEFT's methods for this (save_pretrained, set_adapter, "
            "disable_adapter, merge_adapter, ...): this function is for what apply_lorafa has adapted"
        )
    return ValueError("the model holds no LoRA-FA layer: call apply_lorafa(model, config) first")


def named_layers(model: nn.Module) -> dict[str, LoRAFALinear]:
    layers = lorafa_layers(model)
    if not layers:
        raise no_layers(model)
    return layers


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's adapters: "default", that of apply_lorafa, then the others in the order in which
    they were added. The place of a name here is its number in an index. Raises ValueError if the model holds
    no LoRA-FA layer.
    """
    names = [DEFAULT]
    for layer in adapted_layers(model):
        names += layer.further_adapters()
    return tuple(dict.fromkeys(names))


def known_adapter(model: nn.Module, name: str) -> str:
    """Return the name of an adapter of the model. Raises ValueError for one that it does not have."""
    names = adapter_names(model)
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"the model has no adapter {name!r:.80}: it has {', '.join(names)}")
    return name


def chosen_adapter(model: nn.Module, name: str | None) -> str:
    """The same, for None the name of the active adapter."""
    return adapted_layers(model)[0].acting.name if name is None else known_adapter(model, name)


def layers_of(model: nn.Module, adapter: str) -> dict[str, LoRAFALinear | LoRAFAAdapter]:
    """{name of layer: what has the parameters and options of `adapter` there}, without layers that lack it;
    the layers themselves for "default".
    """
    found = {name: layer.adapter(adapter) for name, layer in lorafa_layers(model).items()}
    return {name: holder for name, holder in found.items() if holder is not None}


def adapted_layers(model: nn.Module) -> list[LoRAFALinear]:
    return list(named_layers(model).values())
