"""Put LoRA-FA layers into a model.

`apply_lorafa` checks the whole model first, then replaces every matched `nn.Linear` by a `LoRAFALinear` that
shares its Parameter objects, and freezes the rest. Afterwards fused blocks are placed (placing/) where the
model computes what they compute.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..base import bnb
from ..engines import sharding_engine
from ..nn.conv1d import is_conv1d, layer_class, sizes
from ..nn.foreign import what_is_missing
from ..nn.initialise import seed_for
from ..nn.linear import LoRAFALinear
from ..nn.quantised import Quantised
from .config import LoRAFAConfig, ends_as
from .names import (
    check_module,
    ends_of,
    is_inside,
    is_of_peft,
    lorafa_layers,
    modules_by_name,
    owners_of,
    target_names,
    unwrap,
)
from .patterns import limited
from .peft_config import as_config
from .placing.bypass import check_calls
from .placing.first_steps import watch_first_steps
from .placing.place import Block, place_blocks
from .pretrained import guard_save
from .quantise import trainable_flag
from .report import AdaptedLayer, AdapterReport
from .saved import ASIDE, clone_tensors, lorafa_parameters, swap
from .targets import HEADS, new_parameters, resolved
from .ties import ties_told
from .vocabulary import vocabulary_of

_LOG = logging.getLogger("lorafa_kernels")
# What modules keep parameters, children and hooks in, and LSTMs their weights.
_HOLDERS = (dict, OrderedDict, set, list)


@dataclass(frozen=True)
class Target:
    """A linear layer that gets an adapter of rank r: lora_A (r, in_features), lora_B (out_features, r)."""

    linear: nn.Module
    r: int
    lora_alpha: float

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Those of lora_A and lora_B."""
        in_features, out_features = sizes(self.linear)
        return (self.r, in_features), (out_features, self.r)


@dataclass(frozen=True)
class Adaptation:
    """What a config does to a model, by module name; `saved`: the outermost modules of modules_to_save;
    `doubts`: adapters that may not act, in words.
    """

    config: LoRAFAConfig
    targets: dict[str, Target]
    saved: dict[str, nn.Module]
    doubts: tuple[str, ...] = ()


def adaptation_of(model: nn.Module, config: LoRAFAConfig, *, strict: bool = True) -> Adaptation:
    """Check `config` against `model` without touching it; the errors are those of `apply_lorafa`.

    strict: what matches target_modules and is no linear layer is an error, and not left out.
    """
    check_module(model)
    config = as_config(config)
    for name, module in model.named_modules():
        if is_of_peft(module):
            raise ValueError(
                f"{name or 'the model'} is PEFT's already: to run its LoRA layers on these kernels call "
                "lorafa_kernels.integrations.peft.accelerate_peft(model)"
            )
        if engine := sharding_engine(module):
            raise ValueError(
                f"{name or 'the model'} is under {engine} already, which would not see the adapter's "
                "parameters: call apply_lorafa first, then wrap the model"
            )
    model = unwrap(model)
    if lorafa_layers(model):
        raise ValueError("the model already holds LoRA-FA layers: call unload_adapter(model) first")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model is itself an nn.Linear, so there is no module to replace it in: use "
            "LoRAFALinear.from_linear(model)"
        )
    with limited():
        return _adaptation_of(model, resolved(model, config), strict)


def _adaptation_of(model: nn.Module, config: LoRAFAConfig, strict: bool) -> Adaptation:
    saved = _plan_saved(model, config)
    inside_saved = {id(inner): name for name, module in saved.items() for inner in module.modules()}
    modules = modules_by_name(model)
    targets = {}
    for name in target_names(model, config):
        module = modules[name]
        if id(module) in inside_saved:
            raise ValueError(
                f"{name} matches target_modules, and modules_to_save trains it whole as part of "
                f"{inside_saved[id(module)]}: leave it out of one of the two"
            )
        if text := what_is_missing(module):
            raise TypeError(f"{name}: {text} (or leave it out with exclude_modules)")
        if not isinstance(module, nn.Linear) and not is_conv1d(module):
            if not strict:
                continue
            raise ValueError(
                f"target_modules matches {name}, a {type(module).__name__}: only torch.nn.Linear and "
                "transformers' Conv1D can be adapted (leave it out with exclude_modules)"
            )
        try:
            layer_class(module).check_linear(module)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error} (leave it out with exclude_modules)") from error
        targets[name] = Target(module, *config.rank_and_alpha(name))
    if not targets:
        raise ValueError(_nothing_matches(modules, config))
    doubts = check_calls(model, {id(target.linear): name for name, target in targets.items()})
    return Adaptation(config, targets, saved, doubts)


def _plan_saved(model: nn.Module, config: LoRAFAConfig) -> dict[str, nn.Module]:
    entries = config.modules_to_save or []
    modules = modules_by_name(model, aliases=True)
    saved: dict[str, nn.Module] = {}
    for name, module in modules.items():
        # PEFT compares ends of names without asking for a dot in front.
        if not name or not name.endswith(tuple(entries)) or is_inside(name, saved):
            continue
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
            raise ValueError(
                f"modules_to_save matches {name}, a {type(module).__name__}, which has no forward: name the "
                "modules inside it"
            )
        for tensor_name, tensor in module.named_parameters():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise ValueError(
                    f"modules_to_save matches {name}, but {name}.{tensor_name} has dtype {tensor.dtype} and "
                    "cannot be trained"
                )
        saved[name] = module
    if not saved and set(entries) - set(HEADS.get(config.task_type, ())):
        raise ValueError(f"modules_to_save matches no module: {entries}")
    inner = {id(module) for outer in saved.values() for module in outer.modules()}
    for name, module in modules.items():
        if id(module) in inner and not is_inside(name, saved):
            # PEFT would train a copy under the other name and leave this one frozen.
            raise ValueError(
                f"{name} is the same module as one in modules_to_save, under a second name: list {name} "
                "there, too"
            )
    return saved


def _nothing_matches(modules: dict[str, nn.Module], config: LoRAFAConfig) -> str:
    message = f"target_modules matches no module: {config.target_modules!r}"
    for name in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
        if getattr(config, name) is not None:
            message += f", with {name}={getattr(config, name)!r}"
    linears = [n for n, module in modules.items() if isinstance(module, nn.Linear) or is_conv1d(module)]
    leaves = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears))
    asked = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    close = [
        near
        for entry in asked
        for near in difflib.get_close_matches(entry, linears if "." in entry else leaves, n=3, cutoff=0.5)
    ]
    if close:
        return f"{message}. Close names: {', '.join(dict.fromkeys(close))}"
    return f"{message}. The model's linear layers end in: {', '.join(leaves[:12]) or 'nothing, it has none'}"


def _warn_unused(model: nn.Module, adaptation: Adaptation) -> None:
    """An entry that matches nothing is most likely a slip, though PEFT's configs may hold some on purpose."""
    config, names = adaptation.config, list(adaptation.targets)
    saved = set(config.modules_to_save or []) - set(HEADS.get(config.task_type, ()))
    unused = {
        "rank_pattern": [key for key in config.rank_pattern if not any(ends_as(n, key) for n in names)],
        "alpha_pattern": [key for key in config.alpha_pattern if not any(ends_as(n, key) for n in names)],
        "modules_to_save": [
            entry for entry in sorted(saved) if not any(n.endswith(entry) for n in adaptation.saved)
        ],
    }
    ends = {end for name in modules_by_name(unwrap(model)) for end in ends_of(name)}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), list):
            unused[name] = [entry for entry in getattr(config, name) if entry not in ends]
    for name, entries in unused.items():
        if entries:
            listed = ", ".join(map(repr, entries))
            warnings.warn(f"{name} has no effect for {listed}: no module matches", stacklevel=3)


def _warn_new(model: nn.Module, adaptation: Adaptation) -> None:
    """What a checkpoint did not hold was drawn at random, and would stay so."""
    new = [name for name in new_parameters(unwrap(model)) if not is_inside(name, adaptation.saved)]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in new))
    modules = [name for name in modules if name not in adaptation.targets]
    if modules:
        warnings.warn(
            f"the checkpoint of the model had no values for {', '.join(modules[:8])}: they are random and "
            f"stay frozen, unless modules_to_save={modules[:8]} names them (or a task_type does)",
            stacklevel=3,
        )


def _warn_tied(model: nn.Module, adaptation: Adaptation) -> None:
    """An adapter on a layer that shares its weight acts in that layer alone; merged, the tie is cut."""
    owners = owners_of(unwrap(model))
    for name, target in adaptation.targets.items():
        others = [other for other, module in owners[id(target.linear.weight)] if module is not target.linear]
        if others:
            warnings.warn(
                f"{name} shares its weight with {', '.join(others)}: the adapter changes {name} only, and "
                f"merging gives {name} a weight of its own",
                stacklevel=3,
            )


def apply_lorafa(
    model: nn.Module, config: LoRAFAConfig, *, fuse: bool = True, norm: bool = True
) -> nn.Module:
    """Adapt `model` in place and return it. config: a LoRAFAConfig or a `peft.LoraConfig`.

    Every `nn.Linear` that `config` matches, and transformers' `Conv1D`, becomes a `LoRAFALinear` that shares
    its weight and bias; so does what `quantize_base` has quantised, and bitsandbytes' Linear4bit of NF4,
    whose codes and scales are shared. A module under several names becomes one shared `LoRAFALinear`. All
    parameters are frozen but lora_B and those of `modules_to_save`. What was done is logged at INFO to the
    logger "lorafa_kernels" and kept as `model.lorafa_report` (an `AdapterReport`), the config, with what it
    left to the model filled in, as `model.lorafa_config`. Source: arXiv 2308.03303.

    fuse: gated MLPs, and adapted layers of one module that are fed the same tensor (q/k/v, gate/up), compute
    in one autograd node. norm: RMS norms keep their input instead of an fp32 copy of it. Both are recognised
    by what a module's forward does. Modules keep their names, keys, hooks and classes (isinstance holds), and
    compute as before where a block cannot: without gradients, with hooks on the layers inside, offloaded or
    sharded. The report's `blocks` says what was fused and why the rest was not.

    Warns of adapters that may not act everywhere (the report's `doubts`), since the model reads the weight of
    their layer in some places without calling it, and in the third backward pass of those that got no
    gradient; of layers that share their weight, and of parameters that were not in the model's checkpoint and
    would stay random.

    Raises ValueError or TypeError, and leaves the model untouched, if nothing matches (close names are
    listed), the model is PEFT's already, a matched module is not a plain nn.Linear or Conv1D, is never called
    by its model, or was compiled by itself, a module is both adapted and saved, or the model is a Linear
    itself, is sharded or wrapped in DDP, or holds LoRA-FA layers already. Any other error while the model is
    adapted leaves it untouched as well.
    """
    adaptation = adaptation_of(model, config)
    _warn_unused(model, adaptation)
    _warn_tied(model, adaptation)
    _warn_new(model, adaptation)
    for text in adaptation.doubts:
        warnings.warn(text, stacklevel=2)
    apply_adaptation(model, adaptation, fuse=fuse, norm=norm)
    return model


def apply_adaptation(
    model: nn.Module, adaptation: Adaptation, *, fuse: bool = True, norm: bool = True
) -> None:
    """Carry out a checked adaptation, all of it or, after an error, nothing."""
    model, config = unwrap(model), adaptation.config
    with all_or_nothing(model), ties_told(model), trainable_flag(model):
        layers = {
            id(target.linear): layer_class(target.linear).from_linear(
                target.linear,
                r=target.r,
                lora_alpha=target.lora_alpha,
                lora_dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
                init_lora_weights=config.init_lora_weights,
                adapter_dtype=config.adapter_dtype,
                init_seed=seed_for(config.init_seed, name),
                gradient_correction=config.gradient_correction,
            )
            for name, target in adaptation.targets.items()
        }
        clones = clone_tensors(adaptation.saved.values())
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for module, aside in clones:
            setattr(module, ASIDE, aside)
            swap(module)
        _replace(model, layers)
        blocks = place_blocks(modules_by_name(model), fuse=fuse, norm=norm)
        model.lorafa_config = config
        model.lorafa_report = _report(model, adaptation, blocks)
        guard_save(model)
        watch_first_steps(lorafa_layers(model))
    _LOG.info("%s", model.lorafa_report)


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Give every module of `model` back its class, attributes and children, and every parameter its
    requires_grad, if an error ends this context.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = []
    for module in model.modules():
        held = {n: copy.copy(v) for n, v in vars(module).items() if type(v) in _HOLDERS}
        modules.append((module, type(module), dict(vars(module)), held))
    try:
        yield
    except BaseException:
        for module, kind, attributes, held in modules:
            if type(module) is not kind:
                module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in held.items():
                if isinstance(content, list):
                    attributes[name][:] = content
                else:
                    attributes[name].clear()
                    attributes[name].update(content)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _replace(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Put replacements[id(old)] wherever `old` is a child."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


def _report(model: nn.Module, adaptation: Adaptation, blocks: tuple[Block, ...]) -> AdapterReport:
    layers = tuple(
        AdaptedLayer(name, layer.in_features, layer.out_features, layer.r, layer.scaling, _base_of(layer))
        for name, layer in lorafa_layers(model).items()
    )
    return AdapterReport(
        layers,
        tuple(adaptation.saved),
        sum(parameter.numel() for parameter in lorafa_parameters(model)),
        parameters_of(model),
        blocks,
        adaptation.doubts,
        tuple(_left_out(model)) if adaptation.config.all_linear else (),
        vocabulary_of(model),
    )


def _base_of(layer: LoRAFALinear) -> str:
    return layer.quantised_kind if isinstance(layer, Quantised) else "dense"


def parameters_of(model: nn.Module) -> int:
    """Parameters of the model; of a quantised layer those of the weight that it stands for."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, Quantised):
            codes = sum(tensor.numel() for tensor in module.base().tensors)
        elif bnb.is_linear4bit(module):
            codes = module.weight.numel()
        else:
            continue
        total += module.in_features * module.out_features - codes
    return total


def _left_out(model: nn.Module) -> Iterator[str]:
    """Modules that are no layers of torch and own matrices, or a stack of them: experts, routers."""
    for module in modules_by_name(model).values():
        if isinstance(module, LoRAFALinear) or type(module).__module__.startswith("torch."):
            continue
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.dim() > 1 and tensor.shape[0] > 1:
                kind = "a stack of matrices" if tensor.dim() > 2 else "a matrix"
                yield f"{type(module).__name__}.{name}, {kind} {tuple(tensor.shape)} that no nn.Linear holds"
