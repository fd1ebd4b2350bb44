"""Put LoRA-FA layers into a model, and take them out again.

`LoRAFAConfig` says which linear layers are adapted and how; its field names, defaults and matching rules are
those of PEFT 0.21's `LoraConfig`. `apply_lorafa` checks the whole model first, then replaces every matched
`nn.Linear` by a `LoRAFALinear` that shares its Parameter objects, and freezes the rest. The other functions
work on any model that holds a `LoRAFALinear`, whether `apply_lorafa` or its author put it there.

Modules in `modules_to_save` are trained whole. They stay where they are and get trainable clones of their
tensors; the originals wait outside of the state dict, in a plain attribute of the module that owns them, so
that they follow deepcopy and pickle and come back with `disable_adapter` and `unload_adapter(merge=False)`.

Afterwards fused blocks are placed (placing/) where the model computes what they compute.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import math
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..engines import is_dtensor, sharding_engine, wrapped_child
from ..nn.linear import INITIALISATIONS, LARGEST_RANK, LoRAFALinear, as_integer, as_number, shown
from .patterns import check_expression, compiled, limited
from .placing.bypass import check_calls
from .placing.first_steps import watch_first_steps
from .placing.place import Block, place_blocks, remove_blocks

_LOG = logging.getLogger("lorafa_kernels")
_ALL_LINEAR = "all-linear"
_ASIDE = "_lorafa_aside"
_UNTIED = "_lorafa_untied"
# What modules keep parameters, children and hooks in, and LSTMs their weights.
_HOLDERS = (dict, OrderedDict, set, list)


@dataclass(frozen=True)
class LoRAFAConfig:
    """Which linear layers get an adapter, and what kind (fields, defaults and rules of PEFT 0.21's
    `LoraConfig`).

    r, lora_alpha: rank and numerator of the scaling, lora_alpha / r, or lora_alpha / √r with `use_rslora`.
    target_modules: list: modules whose name is an entry or ends in "." + entry. str: a regular expression for
        the whole name, or "all-linear": every linear layer but the output embedding.
    exclude_modules: list or str like target_modules; these modules are left alone all the same.
    modules_to_save: modules whose name ends in an entry are trained whole and saved with the adapter.
    layers_to_transform: int or list: only layers of these indices. Goes with a list of target_modules, and
        does not bind a module that the list names in full.
    layers_pattern: str or list: the name before the index, "layers" say; any name without it.
    rank_pattern, alpha_pattern: {regular expression for the end of a name: r or lora_alpha}; "^" asks for the
        whole name, the first match counts.
    lora_dropout: dropout on the adapter's input, in [0, 1).
    init_lora_weights: as in `LoRAFALinear`: True, False or "gaussian".

    Raises ValueError, naming the field, for a value that is none of these.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            object.__setattr__(self, name, _strings(name, getattr(self, name)))
        object.__setattr__(self, "layers_to_transform", _indices(self.layers_to_transform))
        object.__setattr__(self, "rank_pattern", _pattern("rank_pattern", self.rank_pattern, _rank))
        object.__setattr__(self, "alpha_pattern", _pattern("alpha_pattern", self.alpha_pattern, _alpha))

        object.__setattr__(self, "r", _rank("r", self.r))
        object.__setattr__(self, "lora_alpha", _alpha("lora_alpha", self.lora_alpha))
        dropout = as_number(self.lora_dropout)
        if dropout is None or not 0 <= dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {shown(self.lora_dropout)}")
        object.__setattr__(self, "lora_dropout", dropout)
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora must be True or False, got {shown(self.use_rslora)}")
        # By type as well: 1 equals True, and a config file may hold anything.
        if (
            not isinstance(self.init_lora_weights, (bool, str))
            or self.init_lora_weights not in INITIALISATIONS
        ):
            raise ValueError(
                f"init_lora_weights must be one of {INITIALISATIONS}, got {shown(self.init_lora_weights)}"
            )
        if not self.target_modules:
            raise ValueError(
                "target_modules must say which layers to adapt: a list of module names, a regular "
                f'expression, or "{_ALL_LINEAR}"; got {self.target_modules!r}'
            )
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save must be a list of module names, got {self.modules_to_save!r}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} goes with a list of target_modules, not with a str")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, the indices of the layers to adapt")

    @property
    def all_linear(self) -> bool:
        """Whether target_modules is "all-linear", in any case."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == _ALL_LINEAR

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """(r, lora_alpha) of the module `name`: of the first pattern that matches, else the common ones."""
        return _lookup(self.rank_pattern, name, self.r), _lookup(self.alpha_pattern, name, self.lora_alpha)

    def scaling(self, name: str) -> float:
        """The factor on the adapter of the module `name`."""
        r, lora_alpha = self.rank_and_alpha(name)
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)


def _rank(name: str, value: Any) -> int:
    rank = as_integer(value)
    if rank is None or not 1 <= rank <= LARGEST_RANK:
        raise ValueError(f"{name} must be an integer of at least 1, and below 2**31, got {shown(value)}")
    return rank


def _alpha(name: str, value: Any) -> float:
    alpha = as_number(value)
    if alpha is None:
        raise ValueError(f"{name} must be a finite number, got {shown(value)}")
    return alpha


# What stands around an expression of each field where it is matched.
_AROUND = {
    "rank_pattern": (r"(.*\.)?(", ")"),
    "alpha_pattern": (r"(.*\.)?(", ")"),
    "modules_to_save": (r"(.*\.)?(?:", r")(\..*)?"),
    "layers_pattern": (r"(.*?\.)??(?:", r")\.(?P<lorafa_index>\d+)\.(?s:.*)"),
}


def _expression(field: str, source: str) -> str:
    before, after = _AROUND[field]
    return before + source + after


def _strings(name: str, value: Any) -> list[str] | str | None:
    """A checked copy of a field that holds names; a set is sorted, since its order is none."""
    if value is None:
        return None
    if isinstance(value, str):
        check_expression(name, value, *_AROUND.get(name, ()))
        return value
    if not isinstance(value, Iterable) or isinstance(value, (bytes, dict)):
        raise ValueError(f"{name} must be a list of str, got {shown(value)}")
    try:
        entries = list(value)
    except TypeError:
        entries = [None]
    if not all(isinstance(entry, str) and entry for entry in entries):
        raise ValueError(f"{name} must hold non-empty str only, got {shown(value)}")
    if name in _AROUND:
        for entry in entries:
            check_expression(name, entry, *_AROUND[name])
    return sorted(entries) if isinstance(value, (set, frozenset)) else entries


def _indices(value: Any) -> list[int] | int | None:
    if value is None:
        return None
    if (index := as_integer(value)) is not None:
        return index
    try:
        entries = [as_integer(entry) for entry in value]
    except TypeError:
        entries = [None]
    if None in entries:
        raise ValueError(f"layers_to_transform must be an int or a list of int, got {shown(value)}")
    return entries


def _pattern(name: str, value: Any, check: Callable[[str, Any], Any]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a dict from str to numbers, got {shown(value)}")
    for key in value:
        check_expression(name, key, *_AROUND[name])
    return {key: check(f"{name}[{shown(key)}]", entry) for key, entry in value.items()}


def _ends(name: str) -> list[str]:
    """The name and what follows each of its dots: what an entry of a list may be to match it."""
    return [name, *(name[dot + 1 :] for dot, character in enumerate(name) if character == ".")]


def _ends_as(name: str, source: str) -> bool:
    return compiled(_expression("rank_pattern", source)).matches(name)


def _lookup(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if _ends_as(name, key)), default)


def _layer_index(name: str, patterns: list[str]) -> int | None:
    """Index of the layer that a module belongs to.

    Without patterns it is the first all-digit component that two others precede and one follows.
    """
    if not patterns:
        return next((int(part) for part in name.split(".")[2:-1] if part.isdecimal()), None)
    for pattern in patterns:
        if found := compiled(_expression("layers_pattern", pattern)).groups(name):
            return int(found["lorafa_index"])
    return None


def _matcher(entries: list[str] | str | None) -> Callable[[str], bool]:
    """The rule of target_modules and exclude_modules (with a set: lists may name 10,000 experts)."""
    if isinstance(entries, str):
        return compiled(entries).matches
    known = frozenset(entries or ())
    return lambda name: not known.isdisjoint(_ends(name))


def _layer_filter(config: LoRAFAConfig) -> Callable[[str], bool]:
    layers, patterns = config.layers_to_transform, config.layers_pattern or []
    if layers is None or layers == []:
        return lambda name: True
    indices = frozenset(layers if isinstance(layers, list) else [layers])
    full_names = frozenset(config.target_modules)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return lambda name: name in full_names or _layer_index(name, patterns) in indices


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a Linear with a transposed weight, recognised without importing transformers."""
    return any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )


def target_names(model: nn.Module, config: LoRAFAConfig) -> list[str]:
    """Names of the modules that `config` adapts, in the model's order; a shared one by its first name."""
    is_excluded = _matcher(config.exclude_modules)
    saved = [compiled(_expression("modules_to_save", entry)) for entry in config.modules_to_save or []]
    if config.all_linear:
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

        def is_target(name: str, module: nn.Module) -> bool:
            return module is not output and (
                isinstance(module, (nn.Linear, LoRAFALinear)) or _is_conv1d(module)
            )
    else:
        matches, in_layers = _matcher(config.target_modules), _layer_filter(config)

        def is_target(name: str, module: nn.Module) -> bool:
            return matches(name) and in_layers(name)

    return [
        name
        for name, module in modules_by_name(model).items()
        if name
        and is_target(name, module)
        and not is_excluded(name)
        and not any(expression.matches(name) for expression in saved)
    ]


def modules_by_name(model: nn.Module, *, aliases: bool = False) -> dict[str, nn.Module]:
    """{name: module} without wrappers' name components; with aliases a shared module comes once per name.

    A wrapper (torch.compile, FSDP1, activation checkpointing, DDP, AveragedModel, a DeepSpeed engine) and
    what it wraps have one name, which is that of the latter.
    """
    _check_module(model)
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


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, AveragedModel, a DeepSpeed engine and torch.compile, whose names checkpoints
    use.
    """
    _check_module(model)
    while (child := wrapped_child(model)) in ("module", "_orig_mod"):
        model = model._modules[child]
    return model


@dataclass(frozen=True)
class Target:
    """A linear layer that gets an adapter of rank r: lora_A (r, in_features), lora_B (out_features, r)."""

    linear: nn.Linear
    r: int
    lora_alpha: float


@dataclass(frozen=True)
class Plan:
    """What a config does to a model, by module name; `saved`: the outermost modules of modules_to_save;
    `doubts`: adapters that may not act, in words.
    """

    config: LoRAFAConfig
    targets: dict[str, Target]
    saved: dict[str, nn.Module]
    doubts: tuple[str, ...] = ()


def plan_lorafa(model: nn.Module, config: LoRAFAConfig) -> Plan:
    """Check `config` against `model` without touching it; the errors are those of `apply_lorafa`."""
    _check_module(model)
    if not isinstance(config, LoRAFAConfig):
        raise TypeError(f"config must be a LoRAFAConfig, got {type(config).__name__}")
    for name, module in model.named_modules():
        if engine := sharding_engine(module):
            raise ValueError(
                f"{name or 'the model'} is under {engine} already, which would know nothing of the adapter: "
                "adapt the model first, then wrap it"
            )
    model = unwrap(model)
    if lorafa_layers(model):
        raise ValueError("the model holds LoRA-FA layers already; unload_adapter(model) takes them out")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model is itself a Linear, which has no parent to replace it in: LoRAFALinear.from_linear"
        )
    with limited():
        return _plan(model, config)


def _plan(model: nn.Module, config: LoRAFAConfig) -> Plan:
    saved = _plan_saved(model, config)
    inside_saved = {id(inner): name for name, module in saved.items() for inner in module.modules()}
    modules = modules_by_name(model)
    targets = {}
    for name in target_names(model, config):
        module = modules[name]
        if id(module) in inside_saved:
            raise ValueError(
                f"{name} is in target_modules and, with {inside_saved[id(module)]}, in modules_to_save"
            )
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"target_modules matches {name}, a {type(module).__name__}, which is no torch.nn.Linear "
                "(exclude_modules leaves it out)"
            )
        try:
            LoRAFALinear.check_linear(module)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error} (exclude_modules leaves it out)") from error
        targets[name] = Target(module, *config.rank_and_alpha(name))
    if not targets:
        raise ValueError(_nothing_matches(modules, config))
    doubts = check_calls(model, {id(target.linear): name for name, target in targets.items()})
    return Plan(config, targets, saved, doubts)


def _plan_saved(model: nn.Module, config: LoRAFAConfig) -> dict[str, nn.Module]:
    entries = config.modules_to_save or []
    modules = modules_by_name(model, aliases=True)
    saved: dict[str, nn.Module] = {}
    for name, module in modules.items():
        # PEFT compares ends of names without asking for a dot in front.
        if not name or not name.endswith(tuple(entries)) or _is_inside(name, saved):
            continue
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
            raise ValueError(
                f"modules_to_save matches {name}, a {type(module).__name__}: name the modules inside"
            )
        for tensor_name, tensor in module.named_parameters():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise ValueError(
                    f"modules_to_save: {name}.{tensor_name} is {tensor.dtype} and cannot be trained"
                )
        saved[name] = module
    if entries and not saved:
        raise ValueError(f"modules_to_save matches no module: {entries}")
    inner = {id(module) for outer in saved.values() for module in outer.modules()}
    for name, module in modules.items():
        if id(module) in inner and not _is_inside(name, saved):
            # PEFT would train a copy under the other name and leave this one frozen.
            raise ValueError(
                f"{name} is a module of modules_to_save under another name: list this one as well"
            )
    return saved


def _is_inside(name: str, outer_names: Iterable[str]) -> bool:
    return any(name == outer or name.startswith(outer + ".") for outer in outer_names)


def _nothing_matches(modules: dict[str, nn.Module], config: LoRAFAConfig) -> str:
    message = f"target_modules matches no module: {config.target_modules!r}"
    for name in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
        if getattr(config, name) is not None:
            message += f", with {name}={getattr(config, name)!r}"
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
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


def _warn_unused(model: nn.Module, plan: Plan) -> None:
    """An entry that matches nothing is most likely a slip, though PEFT's configs may hold some on purpose."""
    config, names = plan.config, list(plan.targets)
    saved = config.modules_to_save or []
    unused = {
        "rank_pattern": [key for key in config.rank_pattern if not any(_ends_as(n, key) for n in names)],
        "alpha_pattern": [key for key in config.alpha_pattern if not any(_ends_as(n, key) for n in names)],
        "modules_to_save": [entry for entry in saved if not any(n.endswith(entry) for n in plan.saved)],
    }
    ends = {end for name in modules_by_name(unwrap(model)) for end in _ends(name)}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), list):
            unused[name] = [entry for entry in getattr(config, name) if entry not in ends]
    for name, entries in unused.items():
        if entries:
            warnings.warn(f"{name}: no module matches {', '.join(map(repr, entries))}", stacklevel=3)


def _warn_tied(model: nn.Module, plan: Plan) -> None:
    """An adapter on a layer that shares its weight acts in that layer alone; merged, the tie is cut."""
    owners = _owners(unwrap(model))
    for name, target in plan.targets.items():
        others = [other for other, module in owners[id(target.linear.weight)] if module is not target.linear]
        if others:
            warnings.warn(
                f"{name} shares its weight with {', '.join(others)}: the adapter acts in {name} alone, and "
                "merging it gives the layer a weight of its own",
                stacklevel=3,
            )


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """{id of a parameter: the modules that have it, each once, with its name}"""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in modules_by_name(model).items():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append((name, module))
    return owners


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted layer: weight (out_features, in_features), rank r, scaling as LoRAFALinear applies it."""

    name: str
    in_features: int
    out_features: int
    r: int
    scaling: float


@dataclass(frozen=True)
class AdapterReport:
    """What `apply_lorafa` did; `str()` of it is a short table. A shared parameter counts once.

    blocks: the modules that hold a fused block now, and those that were considered and why they hold none.
    doubts: adapters that may not act everywhere, and why.
    """

    layers: tuple[AdaptedLayer, ...]
    modules_to_save: tuple[str, ...]
    trained_parameters: int
    total_parameters: int
    blocks: tuple[Block, ...] = ()
    doubts: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds: dict[tuple[str, int, int, int, float], int] = {}
        for layer in self.layers:
            kind = (
                layer.name.rsplit(".", 1)[-1],
                layer.in_features,
                layer.out_features,
                layer.r,
                layer.scaling,
            )
            kinds[kind] = kinds.get(kind, 0) + 1
        share = 100 * self.trained_parameters / max(1, self.total_parameters)
        lines = [
            f"LoRA-FA: {len(self.layers)} layers adapted, {self.trained_parameters:,} of "
            f"{self.total_parameters:,} parameters trained ({share:.2f} %)"
        ]
        lines += [
            f"  {count:4d} x {leaf}: {k} -> {n}, r={r}, scaling={scaling:g}"
            for (leaf, k, n, r, scaling), count in kinds.items()
        ]
        lines += [f"  trained whole, without an adapter: {name}" for name in self.modules_to_save]
        lines += [f"  may have no effect: {text}" for text in self.doubts]
        for title, fused in (("fused", True), ("not fused, computed as before", False)):
            alike = Counter(str(block) for block in self.blocks if block.fused == fused)
            lines += [f"  {title}:"] if alike else []
            lines += [f"  {count:4d} x {text}" for text, count in alike.items()]
        return "\n".join(lines)


def apply_lorafa(
    model: nn.Module, config: LoRAFAConfig, *, fuse: bool = True, norm: bool = True
) -> nn.Module:
    """Adapt `model` in place and return it.

    Every `nn.Linear` that `config` matches becomes a `LoRAFALinear` that shares its weight and bias; a module
    under several names becomes one shared `LoRAFALinear`. All parameters are frozen but lora_B and those of
    `modules_to_save`. What was done is logged at INFO to the logger "lorafa_kernels" and kept as
    `model.lorafa_report` (an `AdapterReport`), the config as `model.lorafa_config`. Source: arXiv 2308.03303.

    fuse: gated MLPs, and adapted layers of one module that are fed the same tensor (q/k/v, gate/up), compute
    in one autograd node. norm: RMS norms keep their input instead of an fp32 copy of it. Both are recognised
    by what a module's forward does. Modules keep their names, keys, hooks and classes (isinstance holds), and
    compute as before where a block cannot: without gradients, with hooks on the layers inside, offloaded or
    sharded. The report's `blocks` says what was fused and why the rest was not.

    Warns of adapters that may not act everywhere (the report's `doubts`), since the model reads the weight of
    their layer in some places without calling it, and in the third backward pass of those that got no
    gradient.

    Raises ValueError or TypeError, and leaves the model untouched, if nothing matches (close names are
    listed), a matched module is not a plain nn.Linear, is never called by its model, or was compiled by
    itself, a module is both adapted and saved, or the model is a Linear itself, is sharded or wrapped in DDP,
    or holds LoRA-FA layers already. Any other error while the model is adapted leaves it untouched as well.
    """
    plan = plan_lorafa(model, config)
    _warn_unused(model, plan)
    _warn_tied(model, plan)
    for text in plan.doubts:
        warnings.warn(text, stacklevel=2)
    apply_plan(model, plan, fuse=fuse, norm=norm)
    return model


def apply_plan(model: nn.Module, plan: Plan, *, fuse: bool = True, norm: bool = True) -> None:
    """Carry out a checked plan, all of it or, after an error, nothing."""
    model, config = unwrap(model), plan.config
    with all_or_nothing(model), _ties_told(model):
        layers = {
            id(target.linear): LoRAFALinear.from_linear(
                target.linear,
                r=target.r,
                lora_alpha=target.lora_alpha,
                lora_dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
                init_lora_weights=config.init_lora_weights,
            )
            for target in plan.targets.values()
        }
        clones = _clone_tensors(plan.saved.values())
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for module, aside in clones:
            setattr(module, _ASIDE, aside)
            _swap(module)
        _replace(model, layers)
        blocks = place_blocks(modules_by_name(model), fuse=fuse, norm=norm)
        model.lorafa_config = config
        model.lorafa_report = _report(model, plan, blocks)
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


def _report(model: nn.Module, plan: Plan, blocks: tuple[Block, ...]) -> AdapterReport:
    layers = tuple(
        AdaptedLayer(name, layer.in_features, layer.out_features, layer.r, layer.scaling)
        for name, layer in lorafa_layers(model).items()
    )
    return AdapterReport(
        layers,
        tuple(plan.saved),
        sum(parameter.numel() for parameter in lorafa_parameters(model)),
        sum(parameter.numel() for parameter in model.parameters()),
        blocks,
        plan.doubts,
    )


@dataclass
class _Aside:
    """One module's own tensors that are out of place: the originals, or the trained ones while disabled."""

    tensors: dict[str, Tensor]
    holds_originals: bool


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _clone_tensors(saved: Iterable[nn.Module]) -> list[tuple[nn.Module, _Aside]]:
    """Trainable clones of all tensors of the saved modules; one shared within a module stays shared."""
    clones: dict[int, tuple[nn.Module, _Aside]] = {}
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
            clones[id(module)] = (module, _Aside(own, holds_originals=False))
    return list(clones.values())


def _swap(module: nn.Module) -> None:
    """Exchange the tensors in place with those aside.

    Those that come back follow what `.to()` did to those in place meanwhile. They stay the same objects, so
    optimizers and ties to other modules hold.
    """
    # Before the first exchange: a module is either in the one state or in the other.
    _check_swap(module)
    aside: _Aside = getattr(module, _ASIDE)
    for name, waiting in aside.tensors.items():
        current = getattr(module, name)
        if (waiting.device, waiting.dtype) != (current.device, current.dtype):
            waiting.data = waiting.data.to(current.device, current.dtype)
        setattr(module, name, waiting)
        aside.tensors[name] = current
    aside.holds_originals = not aside.holds_originals


def _check_swap(module: nn.Module) -> None:
    for name, waiting in getattr(module, _ASIDE).tensors.items():
        current, what = getattr(module, name), f"{name} of {type(module).__name__}"
        if is_dtensor(waiting) != is_dtensor(current):
            raise RuntimeError(f"{what} is sharded: its original cannot come back")
        if waiting.shape != current.shape:
            raise RuntimeError(
                f"{what} has shape {tuple(current.shape)}, its original {tuple(waiting.shape)}, which cannot "
                "come back: resize the model (resize_token_embeddings) before apply_lorafa"
            )


def _check_originals(model: nn.Module) -> None:
    """Raise RuntimeError if the originals of modules_to_save cannot all come back."""
    for name, module in _replaced(model).items():
        raise RuntimeError(
            f"{name}, a {type(module).__name__} of modules_to_save, was replaced since apply_lorafa, and its "
            "original cannot come back: resize the model (resize_token_embeddings) before apply_lorafa"
        )
    for module in _saved_modules(model):
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
        if _is_inside(name, report.modules_to_save)
        and _ASIDE not in module.__dict__
        and persistent_tensors(module)
    }


def _saved_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _ASIDE in module.__dict__]


def persistent_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and persistent buffers, what its state dict holds without its children's."""
    own = _own_tensors(module)
    return {name: tensor for name, tensor in own.items() if name not in module._non_persistent_buffers_set}


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of the trained parameters and buffers of modules_to_save, once per name they have."""
    found = {}
    for prefix, module in modules_by_name(model, aliases=True).items():
        aside: _Aside | None = module.__dict__.get(_ASIDE)
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
        aside: _Aside | None = module.__dict__.get(_ASIDE)
        if aside is not None:
            for name, current in persistent_tensors(module).items():
                original = aside.tensors[name] if aside.holds_originals else current
                found[f"{prefix}.{name}"] = tuple(original.shape)
    return found


def lorafa_layers(model: nn.Module) -> dict[str, LoRAFALinear]:
    """{name: layer} of every LoRAFALinear in `model`, a shared one under its first name."""
    return {
        name: module for name, module in modules_by_name(model).items() if isinstance(module, LoRAFALinear)
    }


def _named(model: nn.Module) -> dict[str, LoRAFALinear]:
    layers = lorafa_layers(model)
    if not layers:
        raise ValueError("the model holds no LoRA-FA layer: apply_lorafa(model, config) puts them in")
    return layers


def _adapted(model: nn.Module) -> list[LoRAFALinear]:
    return list(_named(model).values())


def lorafa_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What to hand to an optimizer: every lora_B (out_features, r), then the parameters of modules_to_save.

    Each comes once. Raises ValueError if the model holds no LoRA-FA layer.
    """
    trained = [layer.lora_B for layer in _adapted(model)]
    trained += [tensor for tensor in saved_tensors(model).values() if isinstance(tensor, nn.Parameter)]
    return list({id(parameter): parameter for parameter in trained}.values())


def merge_adapter(model: nn.Module, *, keep: str = "device", safe_merge: bool = False) -> nn.Module:
    """Install weight + scaling · lora_B lora_A (N, K) in every layer; `unmerge_adapter` takes it back.

    The old weight is kept, with keep="cpu" on the CPU, unless another module shares it. Layers that are
    merged already stay so. A layer that shared its weight with the input embedding has one of its own then,
    and model.config.tie_word_embeddings says so until it is unmerged.

    Raises, naming the layer, and changes nothing: ValueError if the model holds no LoRA-FA layer and, with
    safe_merge=True, if a merged weight is not finite everywhere; RuntimeError while an adapter is disabled
    and for weights that are offloaded, partitioned or sharded.
    """
    layers = {name: layer for name, layer in _named(model).items() if not layer.merged}
    _check_merge(layers, safe_merge)
    owners = _owners(model) if keep == "cpu" else {}
    done: list[LoRAFALinear] = []
    try:
        with _ties_told(model):
            for layer in layers.values():
                shared = len(owners.get(id(layer.weight), ())) > 1
                layer.merge(keep="device" if shared else keep)
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


def unmerge_adapter(model: nn.Module) -> nn.Module:
    """Put the old weights back, same objects, same bits. Raises ValueError without a LoRA-FA layer."""
    with _ties_told(model):
        for layer in _adapted(model):
            if layer.merged:
                layer.unmerge()
    return model


def unload_adapter(model: nn.Module, merge: bool = True, *, safe_merge: bool = False) -> nn.Module:
    """Put a linear layer back for every LoRA-FA layer and return the model; the adapter is gone after that.

    merge=True: with merged weights, and with the trained tensors in modules_to_save; no copy of the old is
    kept. merge=False: with the original Parameter objects everywhere. Each has the class, hooks and
    attributes of the layer that was adapted. requires_grad of what remains does not change. A layer that
    shared its weight with the input embedding and was merged has one of its own then, and
    model.config.tie_word_embeddings says so.

    Errors as merge_adapter, those about merging with merge=True alone; RuntimeError also for a layer whose
    forward is patched and for modules_to_save whose original cannot come back. They change nothing: all is
    checked first. Then layers go one by one, so that one merged weight at a time is held beside the old one;
    where memory runs out a second call does the rest.
    """
    layers = _named(model)
    if not isinstance(merge, bool):
        raise TypeError(f"merge must be True or False, got {merge!r}")
    if isinstance(model, LoRAFALinear):
        return model.to_linear(merge=merge, safe_merge=safe_merge)
    for name, layer in layers.items():
        layer.check_unloadable(name, merge=merge)
    if merge:
        _check_merge(layers, safe_merge)
    else:
        _check_originals(model)
    with _ties_told(model):
        _unload(model, list(layers.values()), merge)
    for name in ("lorafa_config", "lorafa_report", _UNTIED):
        unwrap(model).__dict__.pop(name, None)
    return model


def _unload(model: nn.Module, layers: list[LoRAFALinear], merge: bool) -> None:
    remove_blocks(model.modules())
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            parents.setdefault(id(child), []).append((parent, name))
    layers.reverse()
    while layers:
        layer = layers.pop()
        linear = layer.to_linear(merge=merge)
        for parent, name in parents[id(layer)]:
            setattr(parent, name, linear)
    for module in _saved_modules(model):
        if getattr(module, _ASIDE).holds_originals != merge:
            _swap(module)
        delattr(module, _ASIDE)


@contextlib.contextmanager
def _ties_told(model: nn.Module) -> Iterator[None]:
    """Keep config.tie_word_embeddings of a transformers model true to what is done in this context.

    With a flag that says "tied" the output embedding is neither saved nor left alone by tie_weights().
    """
    core = unwrap(model)
    before = _is_tied(core)
    yield
    after = _is_tied(core)
    if before and not after:
        config = getattr(core, "config", None)
        told = [config]
        with contextlib.suppress(Exception):
            told.append(config.get_text_config())
        told = [c for c in told if getattr(c, "tie_word_embeddings", None) is True]
        for config in told:
            config.tie_word_embeddings = False
        if told:
            core.__dict__[_UNTIED] = told
    elif after and not before:
        for config in core.__dict__.pop(_UNTIED, ()):
            config.tie_word_embeddings = True


def _is_tied(model: nn.Module) -> bool:
    """Whether the output embedding has the weight of the input embedding."""
    try:
        ends = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return False
    first, last = (getattr(end, "weight", None) for end in ends)
    return isinstance(first, Tensor) and first is last


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the model computes as the frozen base model does, modules_to_save included.

    On leaving, by an exception too, every layer gets back the flag that it had on entering, so that contexts
    nest. No requires_grad changes. Raises ValueError without a LoRA-FA layer, RuntimeError if one is merged
    or the originals of modules_to_save cannot come back.
    """
    layers = _adapted(model)
    if any(layer.merged for layer in layers):
        raise RuntimeError(
            "the adapter is merged into the weights: unmerge_adapter(model) before disable_adapter"
        )
    flags = [(layer, layer.adapter_enabled) for layer in layers]
    trained = [module for module in _saved_modules(model) if getattr(module, _ASIDE).holds_originals]
    _check_originals(model)
    try:
        with _ties_told(model):
            for layer in layers:
                layer.adapter_enabled = False
            for module in trained:
                _swap(module)
        yield model
    finally:
        with _ties_told(model):
            for layer, flag in flags:
                layer.adapter_enabled = flag
            for module in trained:
                if _ASIDE in module.__dict__ and not getattr(module, _ASIDE).holds_originals:
                    _swap(module)
