"""Adapters on disk, in PEFT's format, both ways.

A folder holds adapter_config.json (the fields of PEFT's LoraConfig) and adapter_model.safetensors (metadata
{"format": "pt"}) with, under the model's own module names,

    base_model.model.<module>.lora_A.weight     (r, in_features)
    base_model.model.<module>.lora_B.weight     (out_features, r)
    base_model.model.<module>.<tensor>          every parameter and persistent buffer of modules_to_save

Saving replaces both files at once (exchange.py), loading checks everything before it touches the model, and
reads no more than the model takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..engines import full_shape, is_dtensor, is_partitioned, plain_class, whole
from ..nn.adapters import DEFAULT, LoRAFAAdapter
from ..nn.conv1d import LoRAFAConv1D
from ..nn.linear import LoRAFALinear, shown
from .adapt import Adaptation, adaptation_of, all_or_nothing, apply_adaptation
from .adapters import put_adapter, targets_of
from .card import CARD_FILE, card_of
from .config import LoRAFAConfig
from .exchange import locked, replace_files
from .layouts import present_names
from .names import (
    ADAPTER_CONFIGS,
    adapter_names,
    chosen_adapter,
    layers_of,
    lorafa_layers,
    modules_by_name,
    no_layers,
    target_names,
    unwrap,
)
from .patterns import limited
from .peft_config import FIELDS, from_fields
from .saved import original_shapes, persistent_tensors, saved_tensors, unsaved_parameters
from .vocabulary import base_vocabulary, embedding_tensors, vocabulary_of

# What has the parameters and options of one adapter of a layer.
Adapted = LoRAFALinear | LoRAFAAdapter
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_LARGEST_CONFIG = 16 << 20
# safetensors itself stops at 100 MB; an entry has some 150 bytes.
_LARGEST_HEADER = 32 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def lorafa_state_dict(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """{PEFT's key: tensor} of the active adapter, or of `adapter`: the tensors themselves, detached, on their
    devices, in their dtypes.

    lora_A is (r, in_features), lora_B (out_features, r); modules_to_save come with all their tensors, with
    "default" alone. A shared layer comes under its first name, a shared module of modules_to_save under each,
    as PEFT has them. Names are those of the model inside DDP, AveragedModel, a DeepSpeed engine,
    torch.compile.

    A DTensor and a parameter of DeepSpeed's ZeRO-3 is gathered, which every rank must take part in. Raises
    ValueError if the model holds no LoRA-FA layer or is one, for an unknown adapter, and for a tensor that is
    not here as a whole (under FSDP1 call this within FullyShardedDataParallel.summon_full_params);
    RuntimeError if a layer is merged.
    """
    model = unwrap(model)
    for name, layer in _layers(model).items():
        if layer.merged:
            raise RuntimeError(f"{name} is merged: call unmerge_adapter(model) before saving its adapter")
    adapter = chosen_adapter(model, adapter)
    tensors = _tensors(model, adapter)
    with whole(tensors.values()):
        # Of what is about to be partitioned again there must be a copy.
        gathered = {
            key: tensor.detach().clone() if is_partitioned(tensor) else _gathered(tensor.detach())
            for key, tensor in tensors.items()
        }
    _check_whole(model, gathered, adapter)
    return gathered


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def _check_whole(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str) -> None:
    """Raise ValueError, naming the first, if a tensor of the adapter is only a part of what it should be."""
    for key, (shape, resizable) in _whole_shapes(model, adapter).items():
        tensor = tensors[key]
        got = full_shape(tensor)
        # resize_token_embeddings changes the first dimension.
        fits = got[1:] == shape[1:] and len(got) == len(shape) and 0 not in got if resizable else got == shape
        if fits or (resizable and got == shape):
            if _has_storage(tensor):
                continue
            reason = "its storage has been freed"
        else:
            reason = f"it has shape {got}, expected {shape}"
        raise ValueError(
            f"{key} is not here as a whole ({reason}), an engine has partitioned it. Gather it first (under "
            "FSDP1: within FullyShardedDataParallel.summon_full_params(model))"
        )


def _has_storage(tensor: Tensor) -> bool:
    """Whether there is memory behind the elements; tensors without any, fake ones and those on meta, pass."""
    if tensor.is_meta or is_dtensor(tensor) or type(tensor) not in (Tensor, nn.Parameter):
        return True
    return tensor.numel() == 0 or is_partitioned(tensor) or tensor.untyped_storage().nbytes() > 0


def _whole_shapes(model: nn.Module, adapter: str) -> dict[str, tuple[tuple[int, ...], bool]]:
    """{key: (shape, whether the model's author may have changed its first dimension)}"""
    found = {}
    for name, layer in layers_of(model, adapter).items():
        shapes = (layer.r, layer.in_features), (layer.out_features, layer.r)
        found |= {key: (shape, False) for key, shape in zip(_adapter_keys(name), shapes, strict=True)}
    if adapter != DEFAULT:
        return found
    return found | {_PREFIX + name: (shape, True) for name, shape in original_shapes(model).items()}


def _layers(model: nn.Module) -> dict[str, LoRAFALinear]:
    if isinstance(model, LoRAFALinear):
        raise ValueError(
            "the model is itself a LoRAFALinear, and PEFT's files need a layer name: put it into a module, "
            "such as nn.Sequential"
        )
    layers = lorafa_layers(model)
    if not layers:
        raise no_layers(model)
    return layers


def _adapter_keys(name: str) -> tuple[str, str]:
    return f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight"


def _tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The adapter's live tensors by key, for reading and for writing into."""
    found: dict[str, Tensor] = {}
    for name, layer in layers_of(model, adapter).items():
        key_A, key_B = _adapter_keys(name)
        found |= {key_A: layer.lora_A, key_B: layer.lora_B}
    if adapter != DEFAULT:
        return found
    return found | {_PREFIX + name: tensor for name, tensor in saved_tensors(model).items()}


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, adapter: str | None = None) -> None:
    """Write the active adapter of `model`, or `adapter`, into the folder `path`, so that `load_adapter` and
    PEFT can load it.

    The config says the task, the base model and, without a task, its class, so that PEFT's
    AutoPeftModelForCausalLM.from_pretrained(path) and the like load both. A README.md, the card that hubs
    read, is written where there is none.

    Both files change at once: after an error those that were there before are as they were, and after a crash
    or power failure at any moment a reader, PEFT too, finds the old pair or the new one (exchange.py; where
    the file system has no symbolic links, a crash may leave none). Two saves into one folder wait for each
    other. What crashed saves have left is removed. With parameters that an engine has sharded (DTensor,
    ZeRO-3) every rank calls this and rank 0 writes.

    Raises RuntimeError while merged, TypeError or ValueError for a `path` that is none, ValueError if the
    model holds no LoRA-FA layer or no such adapter, a tensor without storage (on the meta device), one that
    is not here as a whole, or a config that PEFT cannot express, NotADirectoryError if `path` is a file.
    """
    folder = _folder(path)
    model = unwrap(model)
    tensors = lorafa_state_dict(model, adapter)
    adapter = chosen_adapter(model, adapter)
    with limited():
        described = _config_of(model, adapter)
        base = _base_of(described, model)
        config = _config_json(described, base, model)
    tensors |= _extended_embeddings(model, base, tensors)
    for key, tensor in tensors.items():
        _check_storage(key, tensor)
    _warn_unsaved(model)
    # A copy of each: safetensors refuses tensors that share storage, as aliases do.
    copies = {key: tensor.to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    weights = _safetensors().torch.save(copies, metadata={"format": "pt"})
    live = _tensors(model, adapter).values()
    sharded = any(is_dtensor(tensor) or is_partitioned(tensor) for tensor in live)
    if sharded and dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: pass a folder, an adapter consists of two files")
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # The config last: without it neither this library nor PEFT sees an adapter.
        replace_files(folder, {WEIGHTS_FILE: weights, CONFIG_FILE: config})
    except BaseException:
        if created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    card = card_of(described, base, of_transformers=hasattr(getattr(model, "config", None), "model_type"))
    # One that is there is the author's. The adapter is whole without it.
    with contextlib.suppress(OSError), open(folder / CARD_FILE, "xb") as file:
        file.write(card)


def _extended_embeddings(
    model: nn.Module, base: str | None, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The embeddings by key, if the base model on disk, or that of apply_lorafa, had another vocabulary."""
    now, report = vocabulary_of(model), model.__dict__.get("lorafa_report")
    before = base_vocabulary(base) or getattr(report, "vocabulary", None)
    if now is None or before is None or now == before:
        return {}
    found = {
        key: _gathered(tensor.detach())
        for name, tensor in embedding_tensors(model).items()
        if (key := _PREFIX + name) not in tensors
    }
    if found:
        warnings.warn(
            f"the vocabulary has {now} tokens, the base model's {before}: the embeddings are saved with the "
            "adapter. New rows are not trained unless modules_to_save names the embeddings",
            stacklevel=3,
        )
    return found


def _folder(path: str | os.PathLike[str]) -> Path:
    try:
        text = os.fspath(path)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise TypeError(f"path must be a str or os.PathLike of str, got {shown(path)}")
    if not text or "\0" in text:
        raise ValueError(f"path must name a folder, got {shown(path)}")
    return Path(text)


def _check_storage(key: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(
            f"{key} is on the meta device and has no values: load or gather the model's weights first"
        )


def _warn_unsaved(model: nn.Module) -> None:
    if others := unsaved_parameters(model):
        warnings.warn(
            f"the adapter file does not contain {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}, "
            "though they require grad: name their modules in modules_to_save, or save them yourself",
            stacklevel=3,
        )


def _config_of(model: nn.Module, adapter: str) -> LoRAFAConfig:
    """The config of apply_lorafa or add_adapter, if it still describes the layers, else one derived from
    them.
    """
    layers = layers_of(model, adapter)
    if adapter == DEFAULT:
        given = getattr(model, "lorafa_config", None)
    else:
        given = getattr(model, ADAPTER_CONFIGS, {}).get(adapter)
    config = given
    if config is None or not _describes(config, model, layers):
        config = _derived_config(model, layers, given)
    elif config.all_linear:
        config = dataclasses.replace(config, target_modules=_exact_targets(layers, model))
    for name, layer in layers.items():
        if layer.scaling != config.scaling(name):
            raise ValueError(
                f"{name} has scaling={layer.scaling}, but its lora_alpha and r give {config.scaling(name)}, "
                "and PEFT's format stores only those"
            )
    return config


def _describes(config: LoRAFAConfig, model: nn.Module, layers: Mapping[str, Adapted]) -> bool:
    return target_names(model, config) == list(layers) and all(
        (layer.r, layer.lora_alpha) == config.rank_and_alpha(name)
        and layer.use_rslora == config.use_rslora
        and layer.gradient_correction == config.gradient_correction
        for name, layer in layers.items()
    )


def _derived_config(
    model: nn.Module, layers: Mapping[str, Adapted], previous: LoRAFAConfig | None
) -> LoRAFAConfig:
    if len({layer.use_rslora for layer in layers.values()}) > 1:
        raise ValueError("use_rslora differs between layers, and PEFT's format stores one value for all")

    def common(values: Iterable[Any]) -> Any:
        return Counter(values).most_common(1)[0][0]

    r = common(layer.r for layer in layers.values())
    alpha = common(layer.lora_alpha for layer in layers.values())
    return dataclasses.replace(
        previous or LoRAFAConfig(),
        r=r,
        lora_alpha=alpha,
        target_modules=_exact_targets(layers, model),
        lora_dropout=common(layer.lora_dropout for layer in layers.values()),
        use_rslora=next(iter(layers.values())).use_rslora,
        # What chose other layers than there are now.
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        gradient_correction=common(layer.gradient_correction for layer in layers.values()),
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


def _base_of(config: LoRAFAConfig, model: nn.Module) -> str | None:
    """Name or folder of the base model, where it is known."""
    base = config.base_model_name_or_path or getattr(getattr(model, "config", None), "name_or_path", None)
    return base if isinstance(base, str) and base else None


def _config_json(config: LoRAFAConfig, base: str | None, model: nn.Module) -> bytes:
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name in FIELDS} | {
        # A task says which class to load with, otherwise this does.
        "auto_mapping": None if config.task_type else _class_of(model),
        "base_model_name_or_path": base,
        "fan_in_fan_out": any(isinstance(layer, LoRAFAConv1D) for layer in lorafa_layers(model).values()),
        "inference_mode": True,
        "peft_type": "LORA",
        "use_dora": False,
    }
    # PEFT does not know these two, and warns of what it does not know.
    del fields["init_seed"]
    if not config.gradient_correction:
        del fields["gradient_correction"]
    if config.init_lora_weights == "orthogonal" and any(
        r % 2 for r in (config.r, *config.rank_pattern.values())
    ):
        # PEFT's own initialisation of this name refuses odd ranks, before it loads the values.
        fields["init_lora_weights"] = True
    # Sorted on the outside only: in rank_pattern and alpha_pattern the first match counts.
    return json.dumps(dict(sorted(fields.items())), indent=2).encode()


def _class_of(model: nn.Module) -> dict[str, str]:
    """PEFT's auto_mapping: the class to load the base model with."""
    kind = plain_class(model)
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True, adapter: str | None = None
) -> nn.Module:
    """Load the adapter in the folder `path`, written by `save_adapter` or by PEFT, and return `model`.

    A model without LoRA-FA layers is adapted first, as the file's config says, with fused blocks as in
    `apply_lorafa`; one that has them must agree with the file in layers, ranks and scalings. Values are cast
    to the dtype of the parameter they go to and follow its device; a lora_A in fp32 stays so in a
    model that is adapted here, and is rounded, with a warning, in one that is adapted already. A lora_A that
    PEFT trained is taken over, and stays frozen here. Embeddings in the file, of a vocabulary that was
    extended, go into the model's own. Names of modules in earlier versions of transformers are understood.

    adapter: the adapter to load into; None for the active one. One that the model does not have is added to
    layers that are adapted already, with a lora_A of its own. One that shares lora_A takes files with the
    same lora_A only.

    strict: False leaves out, with a warning, what cannot be adapted here (experts of mixtures, which PEFT has
    as target_parameters) and keys that the model has no tensor for.

    Everything is checked before the model is touched. Raises FileNotFoundError for a missing folder or file,
    RuntimeError while merged, TypeError or ValueError for a `path` that is none, and ValueError for a damaged
    file or one of absurd size, a config field that is not supported, away from its default, and a key that is
    missing, unexpected or of another shape; it names the first.
    """
    folder, core = _folder(path), unwrap(model)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: pass the local folder that holds the adapter")
    with limited(), locked(folder, shared=True), all_or_nothing(core):
        _load(model, core, folder, strict, adapter)
    return model


def _load(model: nn.Module, core: nn.Module, folder: Path, strict: bool, adapter: str | None) -> None:
    config, experts = _read_config(folder)
    config = _present_targets(core, config)
    with _open_weights(folder) as weights:
        adaptation, added = None, {}
        if isinstance(core, LoRAFALinear) or lorafa_layers(core):
            _layers(core)
            name = chosen_adapter(core, None) if adapter is None else adapter
            if name in adapter_names(core):
                _check_layers(layers_of(core, name), config)
                tensors = _tensors(core, name)
                _check_whole(core, tensors, name)
                slots = {key: _Slot.of(tensor) for key, tensor in tensors.items()}
            else:
                added = targets_of(core, name, config)
                slots = _added_slots(added, config)
        elif adapter not in (None, DEFAULT):
            raise ValueError(
                f"adapter={shown(adapter)} is to be added to an adapted model: load or apply the first "
                "adapter without a name"
            )
        else:
            name = DEFAULT
            adaptation = adaptation_of(model, config, strict=strict and not experts)
            slots = _planned_slots(adaptation)
        names = _keys_here(core, weights.entries, slots)
        entries = {names.get(key, key): entry for key, entry in weights.entries.items()}
        embeddings = _embedding_slots(core, adaptation, entries, slots)
        slots |= {key: _Slot.of(tensor) for key, tensor in embeddings.items()}
        surplus = [key for key in entries if key not in slots]
        if experts and strict:
            raise ValueError(
                f"{folder / CONFIG_FILE}: target_parameters={shown(experts)} is not supported: they are "
                f"stacks of matrices that no nn.Linear holds ({', '.join(surplus[:4])}). strict=False loads "
                "the rest"
            )
        if surplus and not strict:
            warnings.warn(f"left out, the model has no such tensor: {', '.join(surplus[:8])}", stacklevel=4)
            entries = {key: entry for key, entry in entries.items() if key in slots}
        _check_entries(entries, slots, weights.path, embeddings)
        values = {names.get(key, key): value for key, value in weights.read().items()}
    _check_twins(values, slots, weights.path)
    if adaptation is not None:
        apply_adaptation(core, adaptation)
        _widen(core, values, name)
    elif added:
        put_adapter(core, name, config, added, share_lora_A=False)
        _widen(core, values, name)
    else:
        _check_shared(core, values, name)
        _warn_rounded(core, values, name)
    targets = _tensors(core, name) | embeddings
    # Whatever can fail does so before the first is written.
    ready = {key: _for(target, values[key]) for key, target in targets.items()}
    with whole(targets.values(), writing=True), torch.no_grad():
        for key, target in targets.items():
            target.copy_(ready[key])


def _present_targets(model: nn.Module, config: LoRAFAConfig) -> LoRAFAConfig:
    """`config` with modules that it lists by names of earlier versions under those they have now."""
    if not isinstance(config.target_modules, list):
        return config
    names = present_names(model, [name for name in config.target_modules if "." in name])
    if not names:
        return config
    return dataclasses.replace(config, target_modules=[names.get(n, n) for n in config.target_modules])


def _keys_here(model: nn.Module, keys: Iterable[str], slots: Mapping[str, Any]) -> dict[str, str]:
    """{key of the file: key here} of keys whose module has another name by now."""
    pattern = re.compile(re.escape(_PREFIX) + r"(.+?)((?:\.lora_[AB]|\.base_layer)?\.[^.]+)")
    strange = {key: found for key in keys if key not in slots and (found := pattern.fullmatch(key))}
    names = present_names(model, {found[1] for found in strange.values()})
    return {key: _PREFIX + names[found[1]] + found[2] for key, found in strange.items() if found[1] in names}


def _embedding_slots(
    model: nn.Module, adaptation: Adaptation | None, entries: Mapping[str, Any], slots: Mapping[str, Any]
) -> dict[str, Tensor]:
    """{key: tensor} of the model's embeddings that the file holds beside the adapter."""
    found = {}
    for name, tensor in embedding_tensors(model).items():
        module, _, part = name.rpartition(".")
        # PEFT's name of a layer that is about to be adapted.
        planned = f"{module}.base_layer.{part}" if adaptation and module in adaptation.targets else name
        key = _PREFIX + planned
        if key in entries and key not in slots:
            found[key] = tensor
    return found


def _added_slots(layers: Mapping[str, LoRAFALinear], config: LoRAFAConfig) -> dict[str, _Slot]:
    """The slots that a further adapter will have."""
    slots = {}
    for name, layer in layers.items():
        r, _ = config.rank_and_alpha(name)
        shapes = (r, layer.in_features), (layer.out_features, r)
        for key, shape in zip(_adapter_keys(name), shapes, strict=True):
            slots[key] = _Slot(shape, True, layer.lora_B.is_meta, key)
    return slots


def _check_shared(model: nn.Module, values: Mapping[str, Tensor], adapter: str) -> None:
    """Raise ValueError, naming the first, for a lora_A that other adapters have too and that would change."""
    for name, layer in lorafa_layers(model).items():
        sharing = [n for n, other in layer.further_adapters().items() if other.shares_lora_A]
        if not sharing or adapter not in (DEFAULT, *sharing):
            continue
        key = _adapter_keys(name)[0]
        if not torch.equal(values[key].to(layer.lora_A.device, layer.lora_A.dtype), layer.lora_A):
            raise ValueError(
                f"{key} in the file is not the lora_A that {', '.join((DEFAULT, *sharing))} share: load it "
                "under a name of its own"
            )


def _rounded(model: nn.Module, values: Mapping[str, Tensor], adapter: str) -> dict[str, Adapted]:
    """The layers whose lora_A in the file has bits that the parameter in the model cannot hold."""
    found = {}
    for name, layer in layers_of(model, adapter).items():
        value = values[_adapter_keys(name)[0]]
        if not torch.equal(value.to(layer.lora_A.dtype).to(value.dtype), value):
            found[name] = layer
    return found


def _widen(model: nn.Module, values: Mapping[str, Tensor], adapter: str) -> None:
    """Make lora_A fp32 where it was trained so for a weight of 16 bits, so that saving gives it back."""
    for layer in _rounded(model, values, adapter).values():
        if layer.lora_A.element_size() == 2:
            wide = torch.empty_like(layer.lora_A, dtype=torch.float32)
            layer.lora_A = nn.Parameter(wide, requires_grad=False)


def _warn_rounded(model: nn.Module, values: Mapping[str, Tensor], adapter: str) -> None:
    if rounded := list(_rounded(model, values, adapter)):
        more = f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""
        warnings.warn(
            f"lora_A of {rounded[0]}{more} has fewer bits in the model than in the file and is rounded: load "
            "into a model without LoRA-FA layers to keep it as it is",
            stacklevel=5,
        )


def _for(target: Tensor, value: Tensor) -> Tensor:
    value = value.to(target.device, target.dtype)
    if not is_dtensor(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements)


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file. Raises FileNotFoundError, and ValueError for a device, pipe or folder."""
    try:
        # Opening a pipe would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is not a regular file") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _read_config(folder: Path) -> tuple[LoRAFAConfig, Any]:
    """The config, and PEFT's target_parameters, which it leaves out."""
    path = folder / CONFIG_FILE
    with _open_regular(path) as file:
        content = file.read(_LARGEST_CONFIG + 1)
    if len(content) > _LARGEST_CONFIG:
        raise ValueError(f"{path} has more than {_LARGEST_CONFIG:,} bytes: it is not an adapter's config")
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    try:
        experts = fields.pop("target_parameters", None)
        config = from_fields(fields, loaded=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if config.target_modules is None:
        raise ValueError(f"{path}: target_modules is missing, it says which layers the adapter belongs to")
    return config, experts


class _Entry(NamedTuple):
    """What a safetensors header says of a tensor: dtype by safetensors' name, shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating_point(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


class _Weights:
    """A safetensors file whose header was read, and whose values are read on demand."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        size = os.fstat(file.fileno()).st_size
        self._start = file.read(8)
        length = int.from_bytes(self._start, "little")
        if len(self._start) < 8 or length > size - 8:
            raise ValueError(f"{path} is damaged: the file ends inside its header")
        if length > _LARGEST_HEADER:
            raise ValueError(
                f"{path} is damaged: its header has {length:,} bytes, at most {_LARGEST_HEADER:,} are allowed"
            )
        self._start += file.read(length)
        try:
            header = json.loads(self._start[8:])
            header.pop("__metadata__", None)
            self.entries = {
                key: _Entry(str(entry["dtype"]), tuple(map(int, entry["shape"])))
                for key, entry in header.items()
            }
            ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        except (ValueError, RecursionError, TypeError, AttributeError, LookupError, OverflowError) as error:
            raise ValueError(f"{path} is damaged: its header cannot be read ({error})") from error
        self._bytes = max(ends, default=0)
        if size - 8 - length != self._bytes:
            raise ValueError(
                f"{path} is damaged: its header lists {self._bytes:,} bytes of tensors, the file holds "
                f"{size - 8 - length:,}"
            )

    def read(self) -> dict[str, Tensor]:
        """All tensors by key."""
        safetensors = _safetensors()
        try:
            return safetensors.torch.load(self._start + self._file.read(self._bytes))
        except (
            safetensors.SafetensorError,
            KeyError,
            ValueError,
            RuntimeError,
            OverflowError,
            TypeError,
        ) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error


def _safetensors():
    """The package, imported where a file is read or written: training and the doctor run without it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"adapter files need safetensors ({error}): pip install 'safetensors[numpy]'"
        ) from error
    return safetensors


@contextlib.contextmanager
def _open_weights(folder: Path) -> Iterator[_Weights]:
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"{folder} holds adapter_model.bin, a pickle file, which lorafa_kernels does not read: load it "
            f"with PEFT and save it again, which writes {WEIGHTS_FILE}"
        )
    with _open_regular(path) as file:
        yield _Weights(path, file)


def _check_layers(layers: Mapping[str, Adapted], config: LoRAFAConfig) -> None:
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{name} is merged: call unmerge_adapter(model) before loading an adapter")
        r, _ = config.rank_and_alpha(name)
        if layer.r != r:
            raise ValueError(f"{name} has r={layer.r} in the model, r={r} in the file's config")
        if layer.scaling != config.scaling(name):
            raise ValueError(
                f"{name} has scaling={layer.scaling} in the model, {config.scaling(name)} in the file's "
                "config"
            )


class _Slot(NamedTuple):
    """What a value from the file must fit; slots of one identity are one tensor under several keys."""

    shape: tuple[int, ...]
    is_floating_point: bool
    is_meta: bool
    identity: Hashable

    @classmethod
    def of(cls, tensor: Tensor, owner: nn.Module | None = None) -> _Slot:
        return cls(full_shape(tensor), tensor.is_floating_point(), tensor.is_meta, (id(owner), id(tensor)))


def _planned_slots(adaptation: Adaptation) -> dict[str, _Slot]:
    """The slots that the model will have once the adaptation is carried out."""
    slots: dict[str, _Slot] = {}
    for name, target in adaptation.targets.items():
        is_meta = target.linear.weight.is_meta
        for key, shape in zip(_adapter_keys(name), target.shapes, strict=True):
            slots[key] = _Slot(shape, True, is_meta, key)
    for name, outer in adaptation.saved.items():
        for inner_name, inner in modules_by_name(outer, aliases=True).items():
            for tensor_name, tensor in persistent_tensors(inner).items():
                path = ".".join(filter(None, (name, inner_name, tensor_name)))
                # Clones are made per outermost module: what two of them share now, they will not share then.
                slots[_PREFIX + path] = _Slot.of(tensor, outer)
    return slots


def _check_entries(
    entries: dict[str, _Entry], slots: dict[str, _Slot], path: Path, embeddings: Collection[str]
) -> None:
    for key, slot in slots.items():
        if key not in entries:
            raise ValueError(f"{path}: {key} is missing, expected shape {slot.shape}")
        entry = entries[key]
        if entry.shape != slot.shape:
            rows = (
                f": call model.resize_token_embeddings({entry.shape[0]}) first" if key in embeddings else ""
            )
            raise ValueError(f"{path}: {key} has shape {entry.shape}, expected {slot.shape}{rows}")
        if entry.is_floating_point != slot.is_floating_point:
            dtype = _DTYPES.get(entry.dtype, entry.dtype)
            expected = "a floating-point dtype" if slot.is_floating_point else "no floating-point one"
            raise ValueError(f"{path}: {key} has dtype {dtype}, expected {expected}, as in the model")
        if slot.is_meta:
            raise ValueError(
                f"{key} is on the meta device in the model, which holds no values: load its weights first"
            )
    for key in entries:
        if key not in slots:
            raise ValueError(f"{path}: {key} is unexpected: the model has no such tensor")


def _check_twins(values: dict[str, Tensor], slots: dict[str, _Slot], path: Path) -> None:
    first: dict[Hashable, str] = {}
    for key, slot in slots.items():
        twin = first.setdefault(slot.identity, key)
        if twin != key and not torch.equal(_bits(values[key]), _bits(values[twin])):
            raise ValueError(f"{path}: {key} differs from {twin}, but both are one tensor in the model")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
