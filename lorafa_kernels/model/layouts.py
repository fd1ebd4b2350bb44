"""Names of modules in earlier versions of transformers, such as those of vision-language models before 4.52.

transformers knows them: it renames the keys of checkpoints of that time. A model of its own means that it is
imported already.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable

from torch import nn


def renamer(model: nn.Module) -> Callable[[str], str] | None:
    """A function from the name of a module, at any time, to the one that it has in `model`; None where
    transformers knows of no other names.
    """
    of_class = getattr(model, "_checkpoint_conversion_mapping", None)
    if isinstance(of_class, dict) and of_class:
        return lambda name: _first(of_class, name)
    if "transformers" not in sys.modules or not hasattr(model, "base_model_prefix"):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return None
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    if not renamings:
        return None
    known = dict.fromkeys(model.state_dict(), True)
    end = ".weight"

    def rename(name: str) -> str:
        return rename_source_key(name + end, renamings, [], model.base_model_prefix, known)[0].removesuffix(
            end
        )

    return rename


def _first(mapping: dict[str, str], name: str) -> str:
    for pattern, replacement in mapping.items():
        # Their replacements are patterns of what they look for the other way round.
        new, count = re.subn(pattern, re.sub(r"\^|\(\?[^)]*\)", "", replacement), name)
        if count:
            return new
    return name


def present_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """{name: the module's name in `model`} of those of `names` that are no module's now, and were earlier."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    absent = [name for name in names if name not in modules]
    rename = renamer(model) if absent else None
    if rename is None:
        return {}
    found = {name: rename(name) for name in absent}
    return {name: new for name, new in found.items() if new != name and new in modules}
