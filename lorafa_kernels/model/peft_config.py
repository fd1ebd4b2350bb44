"""A LoRAFAConfig from PEFT's: from a `peft.LoraConfig`, or from the fields of an adapter_config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..nn.linear import shown
from .config import LoRAFAConfig
from .fields import INFORMATIVE, OWN_FIELDS, UNSUPPORTED

FIELDS = tuple(f.name for f in dataclasses.fields(LoRAFAConfig) if f.name not in OWN_FIELDS)
_KNOWN = frozenset(FIELDS) | INFORMATIVE | frozenset(UNSUPPORTED)
# They draw lora_A and lora_B, which a file has, and leave the base weights alone.
_DRAWN = ("eva",)


def as_config(config: object) -> LoRAFAConfig:
    """Return a LoRAFAConfig for one, or for a peft.LoraConfig. Raises TypeError for anything else, and
    ValueError as from_fields.
    """
    if isinstance(config, LoRAFAConfig):
        return config
    if any(c.__name__ == "LoraConfig" and c.__module__.startswith("peft.") for c in type(config).__mro__):
        return from_fields({f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    raise TypeError(f"config must be a LoRAFAConfig or a peft.LoraConfig, got {type(config).__name__}")


def from_fields(fields: Mapping[str, Any], *, loaded: bool = False) -> LoRAFAConfig:
    """Return the config that these fields of PEFT's LoraConfig make. loaded: the adapter's values come from a
    file, so how PEFT drew them says nothing.

    Raises ValueError, naming the first, for a field that is not supported away from its default.
    """
    kind = fields.get("peft_type")
    if getattr(kind, "value", kind) != "LORA":
        raise ValueError(f'peft_type is {shown(kind)}, expected "LORA"')
    for name, value in fields.items():
        if name not in _KNOWN and value:
            raise ValueError(f"{name}={shown(value)} is not supported by lorafa_kernels")
    taken = {name: _plain(value) for name, value in fields.items() if name in (*FIELDS, *UNSUPPORTED)}
    if taken.get("bias") is None:
        taken.pop("bias", None)
    if loaded:
        # Written anew with the file: they are about the model that it is loaded into.
        for name in ("auto_mapping", "inference_mode"):
            taken.pop(name, None)
        if taken.get("init_lora_weights") in _DRAWN:
            taken["init_lora_weights"] = True
    return LoRAFAConfig(**taken)


def _plain(value: Any) -> Any:
    """Settings of PEFT that are dataclasses of its own, as a dict."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
