"""LoRAFAConv1D: what stands where a Conv1D of transformers was, GPT-2's linear layer with its weight stored
transposed.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn

from ..engines import not_plain
from ..operands import FLOAT_DTYPES
from .hooked import is_patched
from .linear import LoRAFALinear
from .quantised import LoRAFAQuantisedLinear, is_quantised


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, recognised without importing transformers."""
    return any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )


def layer_class(linear: nn.Module) -> type[LoRAFALinear]:
    """The class that stands in for `linear`."""
    if is_quantised(linear):
        return LoRAFAQuantisedLinear
    return LoRAFAConv1D if is_conv1d(linear) else LoRAFALinear


def sizes(linear: nn.Module) -> tuple[int, int]:
    """in_features and out_features of an nn.Linear or Conv1D."""
    return (linear.nx, linear.nf) if is_conv1d(linear) else (linear.in_features, linear.out_features)


class LoRAFAConv1D(LoRAFALinear):
    """A LoRAFALinear with weight stored as (in_features, out_features), the Parameter of the Conv1D itself.

    The kernels read it through its transposed view, so nothing is copied; fused blocks leave it out. Made by
    from_linear, which takes the options of LoRAFALinear.from_linear.
    """

    def __init__(self, *args, **kwargs) -> None:
        raise TypeError("LoRAFAConv1D is made from a layer of a model: LoRAFAConv1D.from_linear(conv1d)")

    @classmethod
    def from_linear(cls, linear: nn.Module, **options) -> LoRAFAConv1D:
        """As LoRAFALinear.from_linear, around a Conv1D."""
        cls.check_linear(linear)
        layer = cls.__new__(cls)
        in_features, out_features = sizes(linear)
        base = types.SimpleNamespace(
            in_features=in_features, out_features=out_features, weight=linear.weight, bias=linear.bias
        )
        layer._init_around(base, **_DEFAULTS | options)
        layer._adopt(linear)
        return layer

    @staticmethod
    def check_linear(linear: nn.Module) -> None:
        """Raise TypeError or ValueError, as LoRAFALinear.check_linear, unless `linear` is a plain Conv1D."""
        kind = type(linear)
        if not is_conv1d(linear):
            raise TypeError(f"{kind.__name__} is not a Conv1D of transformers")
        if kind.__name__ != "Conv1D" or kind.__call__ is not nn.Module.__call__:
            raise TypeError(
                f"{kind.__module__}.{kind.__name__} has a forward of its own: only a plain Conv1D can be "
                "adapted"
            )
        if is_patched(linear):
            raise ValueError("the layer's forward was patched on the instance: adapt the model before that")
        for name, shape in (("weight", (linear.nx, linear.nf)), ("bias", (linear.nf,))):
            tensor = getattr(linear, name)
            if isinstance(tensor, Tensor) and (reason := not_plain(tensor)):
                raise ValueError(f"{name} is {reason}")
            if not isinstance(tensor, nn.Parameter) or tensor.dtype not in FLOAT_DTYPES:
                raise ValueError(f"{name} is a {type(tensor).__name__}, expected a floating-point Parameter")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")

    def weight_matrix(self) -> Tensor:
        """Return the transposed view of weight, (out_features, in_features)."""
        return self.weight.t()

    def weight_shape(self) -> tuple[int, int]:
        """The shape that weight is stored in."""
        return self.in_features, self.out_features

    def _plus_product(self, weight: Tensor, B: Tensor, A: Tensor, scaling: float) -> Tensor:
        return torch.addmm(weight, A.t(), B.t(), alpha=scaling)

    def reset_parameters(self) -> None:
        """Initialise all parameters anew, weight and bias as Conv1D does. Raises as LoRAFALinear."""
        if self.merged:
            raise RuntimeError(
                "the adapter is merged into the weight: call unmerge() before reset_parameters()"
            )
        with torch.no_grad():
            nn.init.normal_(self.weight, std=0.02)
            nn.init.zeros_(self.bias)
        self.reset_lora_parameters()
        for adapter in self.further_adapters().values():
            adapter.reset_lora_parameters()


_DEFAULTS = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "init_lora_weights": True,
    "init_seed": None,
    "gradient_correction": False,
    "adapter_dtype": torch.float32,
}
