"""Further adapters of a LoRAFALinear: their parameters, which one acts, and batches whose rows take several.

A layer has its own adapter, "default", and may have others, children of the child `adapters`: their keys are
adapters.<name>.lora_B, and adapters.<name>.lora_A unless they share the layer's. A layer with one adapter has
no such child.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..mixed.rows import Rows
from .initialise import draw_into

DEFAULT = "default"
# PEFT's name for a row without an adapter.
NO_ADAPTER = "__base__"
# An index, and the names that its numbers stand for.
Mixture = tuple[Rows, tuple[str, ...]]
graph_task = torch._C._current_graph_task_id


class LoRAFAAdapter(nn.Module):
    """The parameters of one further adapter and what they are applied with; the LoRAFALinear that it belongs
    to computes.

    lora_A (r, in_features), frozen, in the dtype of the layer's weight: its own, or with shares_lora_A the
    layer's Parameter. lora_B (out_features, r), trained. r, lora_alpha, lora_dropout, use_rslora, scaling,
    gradient_correction, init_lora_weights and init_seed as in LoRAFALinear.
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | str,
        init_seed: int | None,
        adapter_dtype: torch.dtype,
        gradient_correction: bool,
        share_lora_A: bool,
    ) -> None:
        super().__init__()
        # Not as a child of this module, whose parent it is.
        self.__dict__["layer"] = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.init_lora_weights = init_lora_weights
        self.init_seed = None if init_seed is None else int(init_seed)
        self.gradient_correction = gradient_correction
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.shares_lora_A = share_lora_A
        of_layer = layer.lora_A
        if not share_lora_A:
            lora_A = torch.empty(r, self.in_features, dtype=layer.weight.dtype, device=of_layer.device)
            self.lora_A = nn.Parameter(lora_A, requires_grad=False)
        lora_B = torch.empty(self.out_features, r, dtype=adapter_dtype, device=of_layer.device)
        self.lora_B = nn.Parameter(lora_B)
        self.train(layer.training)
        self.reset_lora_parameters()

    def __getattr__(self, name: str):
        # No Parameter of this module, where engines and optimizers would meet it a second time.
        if name == "lora_A" and self.__dict__.get("shares_lora_A"):
            return self.layer.lora_A
        return super().__getattr__(name)

    @property
    def merged(self) -> bool:
        """Whether the layer's weight has an adapter merged into it."""
        return self.layer.merged

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Initialise lora_A, unless it is the layer's, and lora_B anew, as init_lora_weights says."""
        reset(self, draw_A=not self.shares_lora_A)

    def forward(self, *_) -> Tensor:
        """Raise RuntimeError: the layer computes."""
        raise RuntimeError("an adapter is not called by itself: call the layer that it belongs to")

    def extra_repr(self) -> str:
        """Describe the adapter in print(model)."""
        return f"r={self.r}, scaling={self.scaling:g}" + (", shares lora_A" if self.shares_lora_A else "")


class Adapters(nn.Module):
    """The further adapters of a layer, by name."""

    def forward(self, *_) -> Tensor:
        """Raise RuntimeError: the layer computes."""
        raise RuntimeError("adapters are not called by themselves: call the layer that they belong to")


class Replay:
    """What is known of checkpointed forwards that run again within backward; one object for all layers of a
    model, since backward runs in threads of its own.

    now: the index, and its names, of the mixed batch that the present backward belongs to. expected: the last
    forward of a training model was that of a mixed batch.
    """

    def __init__(self) -> None:
        self.now: Mixture | None = None
        self.expected = False


@dataclass(frozen=True)
class Acting:
    """What a layer computes with other than its own adapter alone.

    name: the adapter that set_adapter chose. mixture: the index of a mixed batch, whose numbers are places in
    the names beside it; None outside of adapter_index. replay: None before the first mixed batch.
    """

    name: str = DEFAULT
    mixture: Mixture | None = None
    replay: Replay | None = None


def reset(adapter: nn.Module, draw_A: bool) -> None:
    """Initialise lora_A, where draw_A, and lora_B of a layer or a further adapter."""
    generator = None if adapter.init_seed is None else torch.Generator().manual_seed(adapter.init_seed)
    kind = "kaiming" if isinstance(adapter.init_lora_weights, bool) else adapter.init_lora_weights
    if draw_A:
        draw_into(adapter.lora_A, kind, generator)
    if adapter.init_lora_weights is False:
        draw_into(adapter.lora_B, "kaiming", generator)
    else:
        nn.init.zeros_(adapter.lora_B)


def check_name(name: object) -> str:
    """Return the name of an adapter. Raises TypeError for what is no str, ValueError for a name that no
    module can have.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of an adapter must be a str, got {type(name).__name__}")
    taken = hasattr(Adapters, name) or name in vars(Adapters()) or name == NO_ADAPTER
    if not name or "." in name or "/" in name or taken:
        raise ValueError(
            f"an adapter cannot be called {name!r:.80}: names must not be empty, hold a dot or slash, be an "
            f"attribute of nn.Module or {NO_ADAPTER}"
        )
    return name


def mixture_now(acting: Acting, training: bool) -> Mixture | None:
    """Return the index that rows take their adapters by, and its names; None where one adapter acts.

    training: of the layer. Raises RuntimeError where a forward runs again within backward and its index is
    not known.
    """
    replay = acting.replay
    if replay is None:
        return None
    if graph_task() == -1:
        # Of a backward that an error has ended.
        replay.now = None
        replay.expected = acting.mixture is not None or (replay.expected and not training)
        return acting.mixture
    if replay.now is not None:
        return replay.now
    if acting.mixture is None and replay.expected:
        raise RuntimeError(
            "a checkpointed forward runs again within backward, and which rows have which adapter is not "
            "known: within adapter_index call the model that it was given, not a part of it, or call "
            "backward within it as well"
        )
    return acting.mixture


def outside_of_compilers(function: Callable) -> Callable:
    """Keep torch.compile out of a function: the index of a batch is another in each step."""
    # Not torch.compiler.disable, which imports the compiler, and Triton with it, when it is called.
    disabled = torch._disable_dynamo(function)

    @functools.wraps(function)
    def called(*args):
        return disabled(*args) if torch.compiler.is_compiling() else function(*args)

    return called
