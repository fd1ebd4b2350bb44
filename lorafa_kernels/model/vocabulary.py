"""Embeddings in adapter files: a vocabulary that was extended is saved with the adapter, as PEFT does, since
the base model on disk has no such rows.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torch import Tensor, nn

from ..nn.linear import LoRAFALinear
from .names import modules_by_name, unwrap


def vocabulary_of(model: nn.Module) -> int | None:
    """Number of tokens that the model's configuration says, or None."""
    config = getattr(unwrap(model), "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    return _number(getattr(config.get_text_config(), "vocab_size", None))


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def base_vocabulary(base: str | None) -> int | None:
    """vocab_size in the config.json of the base model: a folder's, or that in the hub's local cache."""
    if base is None:
        return None
    path: object = os.path.join(base, "config.json")
    hub = sys.modules.get("huggingface_hub")
    if not os.path.isfile(path) and hub is not None and not os.path.isdir(base):
        try:
            path = hub.try_to_load_from_cache(base, "config.json")
        except ValueError:
            return None
    if not isinstance(path, str) or not os.path.isfile(path):
        return None
    try:
        fields = json.loads(Path(path).read_bytes())
        text = fields.get("text_config") or {}
        return _number(fields.get("vocab_size", text.get("vocab_size")))
    except (OSError, ValueError, AttributeError):
        return None


def embedding_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{PEFT's name: tensor} of the input and output embeddings; of an adapted one those of its base layer."""
    model = unwrap(model)
    ends = []
    for function in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(model, function)())
        except (AttributeError, NotImplementedError, TypeError):
            continue
    found: dict[str, Tensor] = {}
    for name, module in modules_by_name(model).items():
        if any(module is end for end in ends):
            prefix = f"{name}.base_layer" if isinstance(module, LoRAFALinear) else name
            for part in ("weight", "bias"):
                tensor = module._parameters.get(part)
                if tensor is not None:
                    found[f"{prefix}.{part}"] = tensor
    return found
