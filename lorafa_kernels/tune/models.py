"""Shapes of the linear layers in well-known models, for `tune` and the benchmarks.

Source: each model's published config.json. Listed are the linear layers of one Transformer layer, in the
order in which they run; embeddings and the output head are not adapted and not listed.
"""

from __future__ import annotations

from typing import NamedTuple


class Projection(NamedTuple):
    """A linear layer: its name within a Transformer layer, in_features K, out_features N, bias or none."""

    name: str
    K: int
    N: int
    bias: bool


def _decoder(hidden: int, queries: int, keys: int, intermediate: int) -> tuple[Projection, ...]:
    """A Llama-like layer without biases. queries, keys: out_features of q, and of k and v each."""
    return (
        Projection("q_proj", hidden, queries, False),
        Projection("k_proj", hidden, keys, False),
        Projection("v_proj", hidden, keys, False),
        Projection("o_proj", queries, hidden, False),
        Projection("gate_proj", hidden, intermediate, False),
        Projection("up_proj", hidden, intermediate, False),
        Projection("down_proj", intermediate, hidden, False),
    )


def _encoder(hidden: int, intermediate: int) -> tuple[Projection, ...]:
    """A BERT-like layer, with biases."""
    return (
        Projection("query", hidden, hidden, True),
        Projection("key", hidden, hidden, True),
        Projection("value", hidden, hidden, True),
        Projection("attention.output.dense", hidden, hidden, True),
        Projection("intermediate.dense", hidden, intermediate, True),
        Projection("output.dense", intermediate, hidden, True),
    )


MODELS: dict[str, tuple[Projection, ...]] = {
    "Llama-3.2-1B": _decoder(2048, 2048, 512, 8192),
    "Llama-3-8B": _decoder(4096, 4096, 1024, 14336),
    "Llama-3-70B": _decoder(8192, 8192, 1024, 28672),
    "Qwen3-8B": _decoder(4096, 4096, 1024, 12288),
    "Mistral-7B": _decoder(4096, 4096, 1024, 14336),
    "RoBERTa-large": _encoder(1024, 4096),
    "T5-base": (
        Projection("q", 768, 768, False),
        Projection("k", 768, 768, False),
        Projection("v", 768, 768, False),
        Projection("o", 768, 768, False),
        Projection("wi", 768, 3072, False),
        Projection("wo", 3072, 768, False),
    ),
    "MiniLM": _encoder(384, 1536),
}


def distinct_shapes(model: str) -> list[Projection]:
    """Return one projection for each (K, N, bias) of `model`, in order: equal ones cost the same time.

    Raises ValueError for an unknown model.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}, expected one of {', '.join(MODELS)}")
    first: dict[tuple[int, int, bool], Projection] = {}
    for projection in MODELS[model]:
        first.setdefault((projection.K, projection.N, projection.bias), projection)
    return list(first.values())
