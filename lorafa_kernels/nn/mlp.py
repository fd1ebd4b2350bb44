"""LoRAFASwiGLU and LoRAFAGeGLU: the gated MLP of a Transformer as one module."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mlp.api import lorafa_gated_mlp
from ..mlp.quantised import quantised_gated_mlp
from ..operands import autocast_enabled
from .group import checked_names, mixes, operands_of
from .initialise import seed_for
from .linear import LoRAFALinear, check_seed, checked_size, is_exported, shown
from .quantised import LoRAFAQuantisedLinear, Quantised, common_compute_dtype, dtype_of, is_quantised

NAMES = ("gate_proj", "up_proj", "down_proj")


class _GatedMLP(nn.Module):
    """What LoRAFASwiGLU and LoRAFAGeGLU have in common; they tell what `activation` is."""

    activation: str
    # Of modules that were pickled before there was a choice.
    _by_layer = False

    def _activate(self, gate: Tensor) -> Tensor:
        if self.activation == "silu":
            return F.silu(gate)
        return F.gelu(gate, approximate="tanh" if self.activation == "gelu_tanh" else "none")

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        bias: bool = False,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        init_seed: int | None = None,
        device=None,
        dtype=None,
        adapter_dtype: torch.dtype = torch.float32,
        gradient_correction: bool = False,
    ) -> None:
        options = {
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "use_rslora": use_rslora,
            "init_lora_weights": init_lora_weights,
            "device": device,
            "dtype": dtype,
            "adapter_dtype": adapter_dtype,
            "gradient_correction": gradient_correction,
        }
        hidden, intermediate = checked_size("hidden", hidden), checked_size("intermediate", intermediate)
        shapes = (hidden, intermediate), (hidden, intermediate), (intermediate, hidden)
        check_seed(init_seed)
        seeds = [seed_for(init_seed, name) for name in NAMES]
        layers = [LoRAFALinear(*s, bias, init_seed=k, **options) for s, k in zip(shapes, seeds, strict=True)]
        self._init_around(*layers)

    @classmethod
    def from_linears(
        cls,
        gate: nn.Linear | LoRAFALinear,
        up: nn.Linear | LoRAFALinear,
        down: nn.Linear | LoRAFALinear,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        init_seed: int | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        gradient_correction: bool = False,
        adapt: Collection[str] | None = None,
    ) -> _GatedMLP:
        """Build the MLP around three layers, sharing their Parameter objects: no copy of a weight.

        A LoRAFALinear among them is taken as it is. adapt: names of those (gate_proj, up_proj, down_proj)
        that else get an adapter, None for all; the others stay plain linear layers, frozen. The remaining
        arguments as in LoRAFALinear.

        Raises:
            ValueError, TypeError: as LoRAFALinear.from_linear; ValueError also for layers that do not fit
                together and for a name in adapt that is none of the three.
        """
        check_seed(init_seed)
        adapt = NAMES if adapt is None else checked_names(adapt, NAMES)
        layers = dict(zip(NAMES, (gate, up, down), strict=True))
        for name, layer in layers.items():
            if isinstance(layer, LoRAFALinear) or is_quantised(layer):
                continue
            try:
                LoRAFALinear.check_linear(layer)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
        _check_shapes(layers)
        for name, layer in layers.items():
            if isinstance(layer, LoRAFALinear):
                continue
            if name not in adapt:
                layer.requires_grad_(False)
                continue
            kind = LoRAFAQuantisedLinear if is_quantised(layer) else LoRAFALinear
            layers[name] = kind.from_linear(
                layer,
                r=r,
                lora_alpha=lora_alpha,
                lora_dropout=lora_dropout,
                use_rslora=use_rslora,
                init_lora_weights=init_lora_weights,
                init_seed=seed_for(init_seed, name),
                adapter_dtype=adapter_dtype,
                gradient_correction=gradient_correction,
            )
        mlp = cls.__new__(cls)
        mlp._init_around(*layers.values())
        # Of the module alone: the layers keep theirs.
        mlp.training = gate.training
        return mlp

    def _init_around(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        nn.Module.__init__(self)
        self.impl = "auto"
        self.gate_proj = gate
        self.up_proj = up
        self.down_proj = down
        self._by_layer = any(isinstance(layer, Quantised) for layer in (gate, up, down))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., hidden) for x (..., hidden). Raises as lorafa_gated_mlp and operands_of."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if self._by_layer or is_exported() or any(map(mixes, layers)):
            return self._by_layers(x)
        return lorafa_gated_mlp(x, *map(operands_of, layers), activation=self.activation, impl=self.impl)

    def _by_layers(self, x: Tensor) -> Tensor:
        """forward where a layer is quantised, or operations must stay those of the layers."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        common = common_compute_dtype(layers) if self._by_layer and not is_exported() else None
        if common is None or not computes_in(common[0], x):
            return self.down_proj(self._activate(self.gate_proj(x)) * self.up_proj(x))
        options = {"activation": self.activation, "impl": self.impl, "compute_dtype": common[0]}
        return quantised_gated_mlp(x, *map(operands_of, layers), **options)


def computes_in(compute_dtype: torch.dtype | None, x: Tensor) -> bool:
    """Whether layers with this compute_dtype compute in the dtype of x, or of autocast. What an MLP keeps
    would be in a dtype that its activation is not in, where they do not.
    """
    return compute_dtype is None or compute_dtype == x.dtype or autocast_enabled(x.device.type)


class LoRAFASwiGLU(_GatedMLP):
    """A gated MLP with LoRA-FA adapters: y = down_proj(silu(gate_proj(x)) · up_proj(x)).

    x and y are (..., hidden). All is computed in one autograd node, which keeps the outputs of gate_proj and
    up_proj and M·r numbers for each adapter, and not x nor what down_proj reads. The three layers are
    children of the names that Llama gives them, so parameters are called `gate_proj.weight`,
    `gate_proj.lora_B` and so on. Their own forward and its hooks are not called. A layer that is merged, or
    has its adapter disabled, acts as the plain linear layer that it is then. Layers on quantised bases are
    one node as well if all three are, and compute in the dtype of x; else each is computed by itself.

    Args:
        hidden, intermediate: features of x and y, and of what gate_proj and up_proj return.
        bias: whether the three layers have one.
        device, dtype, and the rest: as in LoRAFALinear, for each of the three, which draws from init_seed and
            its name.

    Raises:
        ValueError: as LoRAFALinear; a hidden or intermediate that is negative or huge.
        TypeError: one of them that is no integer.

    `impl` (default "auto") chooses the implementation, as in lorafa_linear; that of the layers is not looked
    at.
    """

    activation = "silu"


class LoRAFAGeGLU(_GatedMLP):
    """A gated MLP as LoRAFASwiGLU with GELU in silu's place: y = down_proj(gelu(gate_proj(x)) · up_proj(x)).

    approximate: "none", GELU by erf, or "tanh", as in torch.nn.functional.gelu; ValueError for another. The
    remaining arguments, those of from_linears too, as in LoRAFASwiGLU.
    """

    def __init__(
        self, hidden: int, intermediate: int, bias: bool = False, *, approximate: str = "none", **adapter
    ) -> None:
        check_approximate(approximate)
        super().__init__(hidden, intermediate, bias, **adapter)
        self.approximate = approximate

    @classmethod
    def from_linears(
        cls,
        gate: nn.Linear | LoRAFALinear,
        up: nn.Linear | LoRAFALinear,
        down: nn.Linear | LoRAFALinear,
        *,
        approximate: str = "none",
        **adapter,
    ) -> _GatedMLP:
        """Build the MLP around three layers, as LoRAFASwiGLU.from_linears does."""
        check_approximate(approximate)
        mlp = super().from_linears(gate, up, down, **adapter)
        mlp.approximate = approximate
        return mlp

    @property
    def activation(self) -> str:
        """The activation's name, as lorafa_gated_mlp takes it."""
        check_approximate(self.approximate)
        return "gelu_tanh" if self.approximate == "tanh" else "gelu"

    def extra_repr(self) -> str:
        """Describe the module in print(model)."""
        return f"approximate={self.approximate!r}"


def check_approximate(approximate: str) -> None:
    """Raise ValueError unless GELU has that form."""
    if not isinstance(approximate, str) or approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {shown(approximate)}")


def _check_shapes(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError unless the three layers fit together."""
    gate, up, down = layers.values()
    wanted = (
        ("up_proj", up, "in_features", gate.in_features),
        ("up_proj", up, "out_features", gate.out_features),
        ("down_proj", down, "in_features", gate.out_features),
    )
    for name, layer, what, expected in wanted:
        if getattr(layer, what) != expected:
            raise ValueError(
                f"{name} has {what} {getattr(layer, what)}, expected {expected}: gate_proj is "
                f"{gate.in_features} → {gate.out_features}"
            )
    for name, layer in layers.items():
        for what, value, expected in (
            ("dtype", dtype_of(layer), dtype_of(gate)),
            ("device", layer.weight.device, gate.weight.device),
        ):
            if value != expected:
                raise ValueError(
                    f"{name} has {what} {value}, gate_proj has {expected}: both must be the same"
                )
