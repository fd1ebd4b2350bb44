"""Keeps config.tie_word_embeddings of a transformers model true to the state of its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from .names import unwrap

UNTIED = "_lorafa_untied"


@contextlib.contextmanager
def ties_told(model: nn.Module) -> Iterator[None]:
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
            core.__dict__[UNTIED] = told
    elif after and not before:
        for config in core.__dict__.pop(UNTIED, ()):
            config.tie_word_embeddings = True


def _is_tied(model: nn.Module) -> bool:
    """Whether the output embedding has the weight of the input embedding."""
    try:
        ends = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return False
    first, last = (getattr(end, "weight", None) for end in ends)
    return isinstance(first, Tensor) and first is last
