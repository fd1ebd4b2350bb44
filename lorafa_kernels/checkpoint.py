"""Adapters on disk, in PEFT's format, both ways.

A folder holds adapter_config.json (the fields of PEFT's LoraConfig) and adapter_model.safetensors (metadata
{"format": "pt"}) with, under the model's own module names,

    base_model.model.<module>.lora_A.weight     (r, in_features)
    base_model.model.<module>.lora_B.weight     (out_features, r)
    base_model.model.<module>.<tensor>          every parameter and persistent buffer of modules_to_save

Saving writes both files aside and renames them, loading checks everything before it touches the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from .adapt import (
    LoRAFAConfig,
    Plan,
    apply_plan,
    lorafa_layers,
    lorafa_parameters,
    modules_by_name,
    persistent_tensors,
    plan_lorafa,
    saved_tensors,
    target_names,
    unwrap,
)
from .nn.linear import LoRAFALinear

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_FIELDS = tuple(field.name for field in dataclasses.fields(LoRAFAConfig))

# Fields of PEFT 0.21's LoraConfig that say nothing about the computation.
_INFORMATIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Fields with a neutral value that is not None, False or empty; the last two only matter beside another field.
_NEUTRAL = {"peft_type": "LORA", "bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}


def lorafa_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """{PEFT's key: tensor} of the adapter: the tensors themselves, detached, on their devices, in their
    dtypes.

    lora_A is (r, in_features), lora_B (out_features, r); modules_to_save come with all their tensors. A
    shared layer comes under its first name, a shared module of modules_to_save under each, as PEFT has them.
    Raises ValueError if the model holds no LoRA-FA layer or is one, RuntimeError if a layer is merged. A
    DTensor is gathered, which every rank must take part in.
    """
    model = unwrap(model)
    for name, layer in _layers(model).items():
        if layer.merged:
            raise RuntimeError(f"{name} is merged: unmerge_adapter(model) before saving its adapter")
    return {key: _gathered(tensor.detach()) for key, tensor in _tensors(model).items()}


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _layers(model: nn.Module) -> dict[str, LoRAFALinear]:
    if isinstance(model, LoRAFALinear):
        raise ValueError(
            "the model is itself a LoRAFALinear: PEFT's format names layers, so put it into a module"
        )
    layers = lorafa_layers(model)
    if not layers:
        raise ValueError("the model holds no LoRA-FA layer: apply_lorafa(model, config) puts them in")
    return layers


def _adapter_keys(name: str) -> tuple[str, str]:
    return f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's live tensors by key, for reading and for writing into."""
    found: dict[str, Tensor] = {}
    for name, layer in lorafa_layers(model).items():
        key_A, key_B = _adapter_keys(name)
        found |= {key_A: layer.lora_A, key_B: layer.lora_B}
    return found | {_PREFIX + name: tensor for name, tensor in saved_tensors(model).items()}


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` into the folder `path`, so that `load_adapter` and PEFT can load it.

    Both files are written aside, synced and renamed, and an error leaves those that were there before as they
    were. If the config has not changed, as when a training run saves again and again, the save is one rename,
    which a crash cannot divide; else a crash between the two leaves the new config beside the old weights,
    which loading refuses where layers or ranks differ. With sharded parameters (DTensor) every rank calls
    this and rank 0 writes.

    Raises RuntimeError while merged, ValueError if the model holds no LoRA-FA layer, a tensor without storage
    (on the meta device) or a config that PEFT cannot express, NotADirectoryError if `path` is a file.
    """
    model = unwrap(model)
    tensors = lorafa_state_dict(model)
    config = _config_json(_config_of(model), model)
    for key, tensor in tensors.items():
        _check_storage(key, tensor)
    _warn_unsaved(model)
    # A copy of each: safetensors refuses tensors that share storage, as aliases do.
    copies = {key: tensor.to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    weights = safetensors.torch.save(copies, metadata={"format": "pt"})
    if any(hasattr(tensor, "device_mesh") for tensor in _tensors(model).values()) and dist.get_rank() != 0:
        return
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; an adapter is saved into a folder")
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _install(folder, config, weights)
    except BaseException:
        if created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _check_storage(key: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(
            f"{key} is on the meta device and has no values: materialise or gather the model first"
        )


def _warn_unsaved(model: nn.Module) -> None:
    adapter = {id(parameter) for parameter in lorafa_parameters(model)}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in adapter]
    if others:
        warnings.warn(
            f"the adapter file does not hold {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}, "
            "which require grad: name their modules in modules_to_save, or save them yourself",
            stacklevel=3,
        )


def _config_of(model: nn.Module) -> LoRAFAConfig:
    """The config of apply_lorafa, if it still describes the layers, else one derived from them."""
    layers = lorafa_layers(model)
    config = getattr(model, "lorafa_config", None)
    if config is None or not _describes(config, model, layers):
        config = _derived_config(model, layers)
    elif config.all_linear:
        config = dataclasses.replace(config, target_modules=_exact_targets(layers, model))
    for name, layer in layers.items():
        if layer.scaling != config.scaling(name):
            raise ValueError(
                f"{name} has scaling={layer.scaling}, its lora_alpha and r give {config.scaling(name)}"
            )
    return config


def _describes(config: LoRAFAConfig, model: nn.Module, layers: dict[str, LoRAFALinear]) -> bool:
    return target_names(model, config) == list(layers) and all(
        (layer.r, layer.lora_alpha) == config.rank_and_alpha(name) and layer.use_rslora == config.use_rslora
        for name, layer in layers.items()
    )


def _derived_config(model: nn.Module, layers: dict[str, LoRAFALinear]) -> LoRAFAConfig:
    if len({layer.use_rslora for layer in layers.values()}) > 1:
        raise ValueError("some layers have use_rslora and some have not, which PEFT's format cannot express")

    def common(values: Iterable[Any]) -> Any:
        return Counter(values).most_common(1)[0][0]

    r = common(layer.r for layer in layers.values())
    alpha = common(layer.lora_alpha for layer in layers.values())
    previous = getattr(model, "lorafa_config", None)
    return LoRAFAConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=_exact_targets(layers, model),
        lora_dropout=common(layer.lora_dropout for layer in layers.values()),
        use_rslora=next(iter(layers.values())).use_rslora,
        modules_to_save=None if previous is None else previous.modules_to_save,
        rank_pattern={"^" + re.escape(name): layer.r for name, layer in layers.items() if layer.r != r},
        alpha_pattern={
            "^" + re.escape(name): layer.lora_alpha
            for name, layer in layers.items()
            if layer.lora_alpha != alpha
        },
    )


def _exact_targets(names: Iterable[str], model: nn.Module) -> list[str] | str:
    """target_modules for just these names: a list, unless one ends the name of another module."""
    names = sorted(names)
    config = LoRAFAConfig(target_modules=names)
    if sorted(target_names(model, config)) == names:
        return names
    return "|".join(re.escape(name) for name in names)


def _config_json(config: LoRAFAConfig, model: nn.Module) -> bytes:
    base = getattr(getattr(model, "config", None), "name_or_path", None)
    fields = {
        **dataclasses.asdict(config),
        "auto_mapping": None,
        "base_model_name_or_path": base if isinstance(base, str) and base else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "peft_type": "LORA",
        "revision": None,
        "task_type": None,
        "use_dora": False,
    }
    # Sorted on the outside only: in rank_pattern and alpha_pattern the first match counts.
    return json.dumps(dict(sorted(fields.items())), indent=2).encode()


def _install(folder: Path, config: bytes, weights: bytes) -> None:
    """Replace both files or neither. The small one goes first: it is the one that can be put back."""
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    previous = config_path.read_bytes() if config_path.exists() else None
    staged: list[Path] = []
    try:
        new_weights = _write_aside(weights_path, weights, staged)
        if previous == config:
            os.replace(new_weights, weights_path)
        else:
            new_config = _write_aside(config_path, config, staged)
            backup = None if previous is None else _write_aside(config_path, previous, staged)
            os.replace(new_config, config_path)
            try:
                os.replace(new_weights, weights_path)
            except BaseException:
                if backup is None:
                    config_path.unlink()
                else:
                    os.replace(backup, config_path)
                raise
    finally:
        for leftover in staged:
            leftover.unlink(missing_ok=True)
    _sync_folder(folder)


def _write_aside(path: Path, data: bytes, staged: list[Path]) -> Path:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    staged.append(aside)
    with open(aside, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return aside


def _sync_folder(folder: Path) -> None:
    """Make the renames last through a power failure, where the system can (Windows cannot open folders)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load the adapter in the folder `path`, written by `save_adapter` or by PEFT, and return `model`.

    A model without LoRA-FA layers is adapted first, as the file's config says, with fused blocks as in
    `apply_lorafa`; one that has them must agree with the file in layers, ranks and scalings. Values are cast
    to the dtype of the parameter they go to and follow its device. A lora_A that PEFT trained is taken over,
    and stays frozen here.

    Everything is checked before the model is touched. Raises FileNotFoundError for a missing folder or file,
    RuntimeError while merged, and ValueError for a damaged file, a config field that is not supported, away
    from its default, and a key that is missing, unexpected or of another shape; it names the first.
    """
    folder = Path(path)
    config = _read_config(folder)
    values = _read_weights(folder)
    core = unwrap(model)
    plan = None
    if isinstance(core, LoRAFALinear) or lorafa_layers(core):
        _check_layers(_layers(core), config)
        slots = {key: _Slot.of(tensor) for key, tensor in _tensors(core).items()}
    else:
        plan = plan_lorafa(core, config)
        slots = _planned_slots(plan)
    _check_values(values, slots, folder / WEIGHTS_FILE)
    if plan is not None:
        apply_plan(core, plan)
    for key, target in _tensors(core).items():
        _write(target, values[key])
    return model


@torch.no_grad()
def _write(target: Tensor, value: Tensor) -> None:
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(
            value.to(target.device, target.dtype), target.device_mesh, target.placements
        )
    target.copy_(value)


def _read_config(folder: Path) -> LoRAFAConfig:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; an adapter is loaded from a local folder")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    if fields.get("peft_type") != "LORA":
        raise ValueError(f'{path}: peft_type is {fields.get("peft_type")!r}, expected "LORA"')
    for name, value in fields.items():
        if not (name in _FIELDS or name in _INFORMATIVE or not value or value == _NEUTRAL.get(name)):
            raise ValueError(f"{path}: {name}={value!r} is not supported")
    try:
        return LoRAFAConfig(**{name: fields[name] for name in _FIELDS if name in fields})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise ValueError(
                f"{folder} holds adapter_model.bin, a pickle, which is not read here: load it with PEFT and "
                f"save it again, which writes {WEIGHTS_FILE}"
            )
        raise FileNotFoundError(f"{path} is missing")
    try:
        return safetensors.torch.load(path.read_bytes())
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _check_layers(layers: dict[str, LoRAFALinear], config: LoRAFAConfig) -> None:
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{name} is merged: unmerge_adapter(model) before loading an adapter")
        r, _ = config.rank_and_alpha(name)
        if layer.r != r:
            raise ValueError(f"{name} has r={layer.r}, the file's config says {r}")
        if layer.scaling != config.scaling(name):
            raise ValueError(
                f"{name} has scaling={layer.scaling}, the file's config says {config.scaling(name)}"
            )


class _Slot(NamedTuple):
    """What a value from the file must fit; slots of one identity are one tensor under several keys."""

    shape: tuple[int, ...]
    is_floating_point: bool
    is_meta: bool
    identity: Hashable

    @classmethod
    def of(cls, tensor: Tensor, owner: nn.Module | None = None) -> _Slot:
        return cls(tuple(tensor.shape), tensor.is_floating_point(), tensor.is_meta, (id(owner), id(tensor)))


def _planned_slots(plan: Plan) -> dict[str, _Slot]:
    """The slots that the model will have once the plan is carried out."""
    slots: dict[str, _Slot] = {}
    for name, target in plan.targets.items():
        linear, is_meta = target.linear, target.linear.weight.is_meta
        shapes = (target.r, linear.in_features), (linear.out_features, target.r)
        for key, shape in zip(_adapter_keys(name), shapes, strict=True):
            slots[key] = _Slot(shape, True, is_meta, key)
    for name, outer in plan.saved.items():
        for inner_name, inner in modules_by_name(outer, aliases=True).items():
            for tensor_name, tensor in persistent_tensors(inner).items():
                path = ".".join(filter(None, (name, inner_name, tensor_name)))
                # Clones are made per outermost module: what two of them share now, they will not share then.
                slots[_PREFIX + path] = _Slot.of(tensor, outer)
    return slots


def _check_values(values: dict[str, Tensor], slots: dict[str, _Slot], path: Path) -> None:
    first: dict[Hashable, str] = {}
    for key, slot in slots.items():
        if key not in values:
            raise ValueError(f"{path}: {key} is missing; it should be {slot.shape}")
        value = values[key]
        if tuple(value.shape) != slot.shape:
            raise ValueError(f"{path}: {key} is {tuple(value.shape)}, expected {slot.shape}")
        if value.is_floating_point() != slot.is_floating_point:
            raise ValueError(f"{path}: {key} is {value.dtype}, which is not what the model has there")
        if slot.is_meta:
            raise ValueError(
                f"{key} would go to the meta device, which holds no values: materialise the model first"
            )
        twin = first.setdefault(slot.identity, key)
        if twin != key and not torch.equal(_bits(value), _bits(values[twin])):
            raise ValueError(f"{path}: {key} differs from {twin}, which is the same tensor in this model")
    for key in values:
        if key not in slots:
            raise ValueError(f"{path}: {key} is unexpected: the model has no such tensor to load")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
