"""Ways to fine-tune a model, as a plan compares them: what each makes of the model, and its optimizer.

    full          all parameters are trained
    peft          LoRA as PEFT 0.21 has it by default: lora_A and lora_B trained, in fp32
    lora          LoRA with lora_A and lora_B in the model's dtype (autocast_adapter_dtype=False)
    lorafa-plain  LoRA-FA as a formula of PyTorch operations: lora_A frozen, in the model's dtype
    lorafa        apply_lorafa of this library
    lorafa-nf4    the same on a base of NF4 (quantize_base)

All adapt the same layers. Source of the formulas of peft and lora: peft/tuners/lora/layer.py, Linear.forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.frozen import base_of
from ..base.kinds import KINDS
from ..model.adapt import adaptation_of, apply_lorafa
from ..model.config import LoRAFAConfig
from ..model.names import lorafa_layers, target_names
from ..model.quantise import layers_to_quantise
from ..nn.linear import LoRAFALinear
from ..nn.quantised import QuantisedLinear, dtype_of


@dataclass(frozen=True)
class Adapters:
    """The adapters of a plan. names: of the adapted layers; adapter_dtype: of what is trained, for all
    methods but "peft" (fp32) and "lora" (the model's); None: the model's.
    """

    names: tuple[str, ...]
    rank: int = 16
    dropout: float = 0.0
    adapter_dtype: torch.dtype | None = torch.float32


class LoRALinear(nn.Module):
    """An nn.Linear with a LoRA adapter, written as PEFT does.

    train_A=False is LoRA-FA. input_dtype: what x is cast to for the adapter, None: the adapter is cast to
    the dtype of x instead.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        dropout: float,
        *,
        dtypes: tuple[torch.dtype, torch.dtype],
        train_A: bool,
        input_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        features = _features(base)
        options = {"device": base.weight.device}
        self.lora_A = nn.Parameter(
            torch.zeros(rank, features[0], dtype=dtypes[0], **options), requires_grad=train_A
        )
        self.lora_B = nn.Parameter(torch.zeros(features[1], rank, dtype=dtypes[1], **options))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = 2.0
        self.input_dtype = input_dtype

    @property
    def weight(self) -> nn.Parameter:
        # Some models read the dtype of a layer's weight.
        return self.base.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., out_features) for x (..., in_features)."""
        y = self.base(x)
        dtype = y.dtype
        lora_A, lora_B = self.lora_A, self.lora_B
        if self.input_dtype is None:
            lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        else:
            # What a name stands for lives as long as in PEFT's forward.
            x = x.to(self.input_dtype)
        y = y + F.linear(F.linear(self.dropout(x), lora_A), lora_B) * self.scaling
        return y.to(dtype)


def _features(base: nn.Module) -> tuple[int, int]:
    """in_features and out_features of an nn.Linear, or of transformers' Conv1D."""
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    return base.nx, base.nf


@dataclass(frozen=True)
class Method:
    """key: as in JSON. title: for a reader. adapt(model, adapters): changes the model in place. adapters:
    whether it has any.
    """

    key: str
    title: str
    adapt: Callable[[nn.Module, Adapters], None]
    has_adapters: bool = True


def _full(model: nn.Module, adapters: Adapters) -> None:
    model.requires_grad_(True)


def _put_adapters(model: nn.Module, adapters: Adapters, make: Callable[[nn.Module], nn.Module]) -> None:
    model.requires_grad_(False)
    for name in adapters.names:
        parent, _, last = name.rpartition(".")
        holder = model.get_submodule(parent)
        # Layers of the whole model that this one has not.
        setattr(holder, last, make(getattr(holder, last)))


def _peft(model: nn.Module, adapters: Adapters) -> None:
    wide = torch.float32
    _put_adapters(
        model,
        adapters,
        lambda base: LoRALinear(
            base, adapters.rank, adapters.dropout, dtypes=(wide, wide), train_A=True, input_dtype=wide
        ),
    )


def _lora(model: nn.Module, adapters: Adapters) -> None:
    def make(base: nn.Module) -> nn.Module:
        own = base.weight.dtype
        return LoRALinear(
            base, adapters.rank, adapters.dropout, dtypes=(own, own), train_A=True, input_dtype=own
        )

    _put_adapters(model, adapters, make)


def _lorafa_plain(model: nn.Module, adapters: Adapters) -> None:
    def make(base: nn.Module) -> nn.Module:
        dtypes = base.weight.dtype, adapters.adapter_dtype or base.weight.dtype
        return LoRALinear(
            base, adapters.rank, adapters.dropout, dtypes=dtypes, train_A=False, input_dtype=None
        )

    _put_adapters(model, adapters, make)


def _lorafa(model: nn.Module, adapters: Adapters) -> None:
    config = LoRAFAConfig(
        r=adapters.rank,
        lora_alpha=2 * adapters.rank,
        lora_dropout=adapters.dropout,
        target_modules=list(adapters.names),
    )
    with warnings.catch_warnings():
        # Of tied weights and the like: nothing of it changes the memory.
        warnings.simplefilter("ignore")
        apply_lorafa(model, config)
    for layer in lorafa_layers(model).values():
        dtype = adapters.adapter_dtype or dtype_of(layer)
        if layer.lora_B.dtype != dtype:
            layer.lora_B = nn.Parameter(layer.lora_B.detach().to(dtype))


def _lorafa_nf4(model: nn.Module, adapters: Adapters) -> None:
    kind = KINDS["nf4"]
    for name in layers_to_quantise(model):
        linear = model.get_submodule(name)
        N, K = linear.weight.shape
        # Of sizes alone: codes of no weight.
        codes = [
            torch.empty(shape, dtype=dtype, device=linear.weight.device)
            for dtype, shape in kind.spec(N, K).values()
        ]
        base = base_of(kind.name, codes, (N, K), linear.weight.dtype)
        layer = QuantisedLinear.with_base(linear, base)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    _lorafa(model, adapters)


METHODS = (
    Method("full", "full fine-tuning", _full, has_adapters=False),
    Method("peft", "LoRA, PEFT's default (fp32)", _peft),
    Method("lora", "LoRA in the model's dtype", _lora),
    Method("lorafa-plain", "LoRA-FA in plain PyTorch", _lorafa_plain),
    Method("lorafa", "LoRA-FA, this library", _lorafa),
    Method("lorafa-nf4", "LoRA-FA on an NF4 base", _lorafa_nf4),
)
BY_KEY = {method.key: method for method in METHODS}


def set_dropout(model: nn.Module, dropout: float) -> None:
    """Set the dropout of all adapters in `model`."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        elif isinstance(module, LoRAFALinear):
            module.lora_dropout = dropout


class AdamW8bit(torch.optim.Optimizer):
    """The states of bitsandbytes' AdamW8bit, and no update of values: two moments of 8 bits with an fp32
    scale for each 256 numbers, fp32 moments for parameters of fewer than 4,096 numbers.

    Source: bitsandbytes/optim/optimizer.py, Optimizer2State.init_state. Its update is one kernel for each
    parameter, which allocates nothing.
    """

    BLOCK, LEAST = 256, 4096

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = self._states(parameter)

    def _states(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter.numel() < self.LEAST:
            return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")}
        blocks = -(-parameter.numel() // self.BLOCK)
        device = parameter.device
        return {
            "state1": torch.zeros_like(parameter, dtype=torch.uint8),
            "state2": torch.zeros_like(parameter, dtype=torch.uint8),
            "absmax1": torch.zeros(blocks, dtype=torch.float32, device=device),
            "absmax2": torch.zeros(blocks, dtype=torch.float32, device=device),
        }


def adapted_names(model: nn.Module, targets: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the layers that `targets` (as target_modules) adapts in `model`.

    Of "all-linear" those that apply_lorafa adapts, nn.Linear; where there is none (GPT-2 has Conv1D only)
    the output embedding. Raises ValueError, which lists close names, where nothing matches.
    """
    asked = targets if isinstance(targets, str) else list(targets)
    config = LoRAFAConfig(target_modules=asked)
    if config.all_linear:
        modules = dict(model.named_modules())
        names = [name for name in target_names(model, config) if isinstance(modules[name], nn.Linear)]
        if not names and hasattr(model, "get_output_embeddings"):
            output = model.get_output_embeddings()
            names = [name for name, module in modules.items() if module is output]
        if names:
            return tuple(names)
    return tuple(adaptation_of(model, config).targets)


OPTIMIZERS = ("adamw", "adamw-8bit", "sgd")


def make_optimizer(name: str, parameters: list[nn.Parameter], device: str) -> torch.optim.Optimizer:
    """Return an optimizer of OPTIMIZERS, as torch makes it on `device` ("cuda" or "cpu") by default."""
    # torch.optim takes its foreach form for CUDA tensors, and one parameter at a time on a CPU.
    foreach = device == "cuda"
    if name == "adamw":
        return torch.optim.AdamW(parameters, foreach=foreach)
    if name == "sgd":
        return torch.optim.SGD(parameters, foreach=foreach)
    return AdamW8bit(parameters)
