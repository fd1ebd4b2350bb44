"""What a config leaves to the model: default target_modules of its architecture, and the head of its task."""

from __future__ import annotations

import dataclasses
import importlib.util

from torch import nn

from .config import ALL_LINEAR, LoRAFAConfig
from .names import modules_by_name
from .vocabulary import base_vocabulary, embedding_tensors, vocabulary_of

# The modules that PEFT trains whole for a task, by name.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def resolved(model: nn.Module, config: LoRAFAConfig) -> LoRAFAConfig:
    """Return `config` with target_modules, those of PEFT's table for the architecture if it names none, and
    with the head of its task among modules_to_save.

    Raises ValueError if it names no target_modules and PEFT, where it is installed, has none either.
    """
    changes = {}
    if config.target_modules is None:
        changes["target_modules"] = _default_targets(model)
    heads = HEADS.get(config.task_type, ())
    if heads:
        saved = config.modules_to_save or []
        changes["modules_to_save"] = [*saved, *(name for name in heads if name not in saved)]
    return dataclasses.replace(config, **changes) if changes else config


def _default_targets(model: nn.Module) -> list[str] | str:
    if importlib.util.find_spec("peft") is None:
        return ALL_LINEAR
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table

    config = getattr(model, "config", None)
    kind = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    if kind in table:
        return table[kind] if isinstance(table[kind], str) else sorted(table[kind])
    raise ValueError(
        f"target_modules must say which layers to adapt: a list of module names, a regular expression, or "
        f'"{ALL_LINEAR}"; PEFT has no default for '
        + (f"model_type={kind!r}" if kind else "a model without config.model_type")
    )


def new_parameters(model: nn.Module) -> list[str]:
    """Names of parameters that transformers did not find in the checkpoint and initialised, embeddings aside,
    and an output embedding that has grown with them; none for a model that came from no checkpoint.
    """
    named = dict(model.named_parameters())
    flags = {name: getattr(parameter, "_is_hf_initialized", False) for name, parameter in named.items()}
    if not any(flags.values()):
        return []
    inside = {
        id(parameter)
        for module in modules_by_name(model).values()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    base = getattr(getattr(model, "config", None), "name_or_path", None)
    if base_vocabulary(base if isinstance(base, str) else None) not in (None, vocabulary_of(model)):
        inside |= {id(tensor) for tensor in embedding_tensors(model).values()}
    return [name for name, flag in flags.items() if not flag and id(named[name]) not in inside]
