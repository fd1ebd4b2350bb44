"""The model card of an adapter: the README.md that hubs read, as short as PEFT's."""

from __future__ import annotations

import json

from .._version import __version__
from .config import LoRAFAConfig

CARD_FILE = "README.md"


def card_of(config: LoRAFAConfig, base: str | None, *, of_transformers: bool) -> bytes:
    """The card's text: what hubs index (base model, library, task, tags), how to load it, the version."""
    tags = ["lora", "lora-fa", *(["transformers"] if of_transformers else [])]
    tags += [f"base_model:adapter:{base}"] if base else []
    # JSON's strings are YAML's.
    head = [f"base_model: {json.dumps(base)}"] if base else []
    head += ["library_name: peft"]
    head += ["pipeline_tag: text-generation"] if config.task_type == "CAUSAL_LM" else []
    head += ["tags:", *(f"- {json.dumps(tag)}" for tag in sorted(tags))]
    lines = [
        "---",
        *head,
        "---",
        "",
        f"# LoRA-FA adapter{f' of {base}' if base else ''}",
        "",
        "Load it with PEFT (`PeftModel.from_pretrained(model, folder)`) or with lorafa_kernels",
        "(`load_adapter(model, folder)`).",
        "",
        "### Framework versions",
        "",
        f"- lorafa_kernels {__version__}",
        "",
    ]
    return "\n".join(lines).encode()
