"""A Llama-shaped model: by size with random weights, or from a folder; adapted, then split by tensor
parallelism and sharded by FSDP2.

Every process builds the whole model on its device before it is sharded, so a model must fit there once in the
chosen dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from examples import DemoError
from examples.llama.processes import Processes
from lorafa_kernels.integrations.parallel import llama_plan
from lorafa_kernels.tune.models import MODELS


class Depth(NamedTuple):
    """What lorafa_kernels.tune.models leaves out of a model, from its published config.json."""

    layers: int
    head_size: int
    vocabulary: int
    tied: bool


DEPTHS = {
    "Llama-3.2-1B": Depth(16, 64, 128_256, True),
    "Llama-3-8B": Depth(32, 128, 128_256, False),
    "Llama-3-70B": Depth(80, 128, 128_256, False),
    "Qwen3-8B": Depth(36, 128, 151_936, False),
    "Mistral-7B": Depth(32, 128, 32_000, False),
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    # With 0.02 no adapter could move the logits of weights this small, and the loss would not fall.
    "initializer_range": 0.2,
}


def config_of(size: str, vocabulary: int, sequence: int) -> LlamaConfig:
    """The configuration of a size, with at least `vocabulary` tokens and `sequence` positions."""
    if size == "tiny":
        config = LlamaConfig(**TINY)
    else:
        depth = DEPTHS[size]
        widths = {projection.name: projection for projection in MODELS[size]}
        config = LlamaConfig(
            hidden_size=widths["q_proj"].K,
            intermediate_size=widths["gate_proj"].N,
            num_hidden_layers=depth.layers,
            num_attention_heads=widths["q_proj"].N // depth.head_size,
            num_key_value_heads=widths["k_proj"].N // depth.head_size,
            head_dim=depth.head_size,
            vocab_size=depth.vocabulary,
            tie_word_embeddings=depth.tied,
        )
    config.vocab_size = max(config.vocab_size, vocabulary)
    config.max_position_embeddings = max(config.max_position_embeddings, sequence)
    return config


def build(
    size: str,
    folder: Path | None,
    *,
    vocabulary: int,
    sequence: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    shown: bool = True,
) -> nn.Module:
    """The base model on `device` in `dtype`: from the local `folder`, else of `size` with the random weights
    of `seed`, the same in every process. shown: with transformers' progress bar.

    Raises DemoError if the folder's model cannot be loaded or has too small a vocabulary.
    """
    if folder is None:
        torch.manual_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return LlamaForCausalLM(config_of(size, vocabulary, sequence))
        finally:
            torch.set_default_dtype(before)
    try:
        known = getattr(AutoConfig.from_pretrained(folder, local_files_only=True), "vocab_size", 0)
        if known < vocabulary:
            raise DemoError(
                f"--checkpoint {folder} knows {known} tokens, the text has ids up to {vocabulary - 1}: give "
                "its own --tokenizer"
            )
        with _progress_bars(shown):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DemoError(f"--checkpoint {folder} holds no model that transformers loads: {error}") from error
    if not isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList):
        raise DemoError(f"--checkpoint {folder} is no Llama-shaped model: it has no model.layers to shard")
    return model.to(device)


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    enabled = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def shard(model: nn.Module, processes: Processes, dtype: torch.dtype) -> None:
    """Shard an adapted model in place, a group for each layer and one for the rest.

    A layer is one group, so that the projections that the library computes together are gathered together.
    With a 16-bit `dtype` parameters are gathered in it; gradients are summed in fp32. Before that, matrices
    are split over each processes.split processes.

    Raises ValueError for a model that cannot be split so.
    """
    grid = (processes.shares, processes.split)
    mesh = init_device_mesh(processes.device.type, grid, mesh_dim_names=("data", "tensor"))
    if processes.split > 1:
        parallelize_module(model, mesh["tensor"], llama_plan(model, mesh["tensor"]))
    mesh = mesh["data"]
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
