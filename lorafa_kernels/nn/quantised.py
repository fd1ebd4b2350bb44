"""QuantisedLinear, a frozen linear layer on a quantised base, and LoRAFAQuantisedLinear, the same with an
adapter.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..base import bnb
from ..base.frozen import QuantisedBase, base_of, quantised
from ..base.kinds import kind_of
from ..group.operands import LinearOperands
from ..linear.quantised import frozen_linear, quantised_linear
from ..operands import check_frozen
from .hooked import is_patched
from .linear import LoRAFALinear, is_exported, rebind_hooks


class Quantised:
    """What the two layers have in common: the tensors of a base among their parameters, under the names of
    base/kinds.py and with requires_grad=False.

    quantised_kind: name of the kind. dense_dtype: dtype of the weight that the base stands for; .to(dtype)
    changes it, and nothing of codes and scales. compute_dtype: what x is cast to (bitsandbytes' layers have
    one), or None.
    """

    quantised_kind: str
    dense_dtype: torch.dtype
    compute_dtype: torch.dtype | None = None

    def base(self) -> QuantisedBase:
        """The base of the layer, of its Parameter objects as they are now."""
        names = kind_of(self.quantised_kind).names
        tensors = [getattr(self, name) for name in names]
        return base_of(self.quantised_kind, tensors, (self.out_features, self.in_features), self.dense_dtype)

    def holds_base(self) -> bool:
        """Whether codes and scales are among the parameters, and no dense weight that it is merged into."""
        return True

    def dense_weight(self) -> Tensor:
        """Return the weight (out_features, in_features) that the base stands for, a new tensor."""
        return self.base().dense()

    def requires_grad_(self, requires_grad: bool = True):
        """As nn.Module. Raises RuntimeError for True: codes and scales cannot be trained."""
        if requires_grad:
            raise RuntimeError(
                f"the {self.quantised_kind} base of this layer cannot be trained: thaw parameters by name "
                "(lorafa_parameters(model) lists those of the adapter), or train a model with dense weights"
            )
        return super().requires_grad_(False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # A floating-point weight would have become this.
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype, device=self.weight.device)).dtype
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        # copy_ would turn fp32 scales into whole numbers.
        spec = kind_of(self.quantised_kind).spec(self.out_features, self.in_features)
        for name, (dtype, _) in spec.items():
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.dtype != dtype:
                errors.append(
                    f"{prefix}{name} has dtype {value.dtype}, expected {dtype}: the state is not of a "
                    f"{self.quantised_kind} base (docs/quantised.md lists its keys)"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _describe(self) -> str:
        return f"base={self.quantised_kind} of {str(self.dense_dtype).removeprefix('torch.')}"


def is_quantised(module: nn.Module) -> bool:
    """Whether LoRAFAQuantisedLinear is what stands in for `module`."""
    return isinstance(module, QuantisedLinear) or bnb.is_linear4bit(module)


def dtype_of(linear: nn.Module) -> torch.dtype:
    """The dtype of a layer's weight, of a quantised one that of the weight that it stands for."""
    return linear.dense_dtype if isinstance(linear, Quantised) else linear.weight.dtype


class QuantisedLinear(Quantised, nn.Linear):
    """A frozen linear layer y = x Wᵀ + bias whose W (out_features, in_features) is quantised.

    x is (..., in_features) in the dtype of W, y (..., out_features). For backward it keeps the codes and
    scales by reference: W is made for forward and again for dx, and freed after each. Made by
    from_linear and from_base, and by quantize_base for a whole model.
    """

    def __init__(self, *args, **kwargs) -> None:
        raise TypeError("QuantisedLinear is made from a layer: QuantisedLinear.from_linear(linear, 'nf4')")

    @classmethod
    def from_linear(cls, linear: nn.Linear, kind: str) -> QuantisedLinear:
        """Quantise `linear`; its bias, hooks and attributes are taken over. kind: "nf4", "nf4-nested", "int8"
        or "fp8".

        Raises ValueError for another kind and for a weight that is not finite, and as
        LoRAFALinear.check_linear for a layer that is no plain nn.Linear.
        """
        kind_of(kind)
        LoRAFALinear.check_linear(linear)
        if linear.weight.is_meta:
            raise ValueError("weight is on the meta device and has no values to quantise: load it first")
        if "forward" in vars(linear):
            raise ValueError("the layer is offloaded by a hook of accelerate: quantise the model before that")
        return _with_base(cls, linear, quantised(linear.weight, kind))

    @classmethod
    def with_base(cls, linear: nn.Linear, base: QuantisedBase) -> QuantisedLinear:
        """The layer of a base, with all that `linear` has but its weight. Raises as QuantisedBase.check."""
        base.check()
        return _with_base(cls, linear, base)

    @classmethod
    def from_linear4bit(cls, linear: nn.Module) -> QuantisedLinear:
        """Take over bitsandbytes' Linear4bit: its codes and scales, in the memory where they are.

        x of any floating-point dtype is cast to its compute_dtype, as there. Raises ValueError as
        base.bnb.from_linear4bit, and for a layer whose forward was patched on the instance.
        """
        if is_patched(linear) or "forward" in vars(linear):
            raise ValueError(
                "the layer's forward was patched on the instance (by an offloading hook, for example): adapt "
                "the model before that"
            )
        layer = _with_base(cls, linear, bnb.from_linear4bit(linear))
        layer.__dict__.pop("quant_state", None)
        return layer

    @classmethod
    def from_base(cls, base: QuantisedBase, bias: nn.Parameter | None = None) -> QuantisedLinear:
        """Make the layer of a base. Raises as QuantisedBase.check, naming the tensor that does not fit."""
        linear = nn.Linear(*reversed(base.shape), bias=False, device="meta")
        linear.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return cls.with_base(linear, base)

    def forward(self, input: Tensor) -> Tensor:
        """Return y (..., out_features) for input (..., in_features). Raises as lorafa_linear."""
        if is_exported():
            return nn.functional.linear(input, self.dense_weight().to(input.dtype), self.bias)
        return frozen_linear(input, self.base(), self.bias, compute_dtype=self.compute_dtype)

    def reset_parameters(self) -> None:
        """Raises RuntimeError: codes have no initialisation."""
        raise RuntimeError("a quantised layer has no initialisation: quantise a dense layer instead")

    def to_linear(self) -> nn.Linear:
        """Return a dense nn.Linear with the weight that the base stands for, frozen."""
        return with_dense(self, self.dense_weight())

    def extra_repr(self) -> str:
        """Describe the layer in print(model)."""
        return f"{super().extra_repr()}, {self._describe()}"


def _with_base(kind: type[nn.Module], source: nn.Module, base: QuantisedBase) -> Any:
    """A layer of class `kind` with what `source` has, but for its weight, and the tensors of `base`."""
    layer = _like(kind, source)
    parameters = {
        name: nn.Parameter(tensor.detach(), requires_grad=False)
        for name, tensor in zip(base.kind.names, base.tensors, strict=True)
    }
    others = {name: value for name, value in source._parameters.items() if name != "weight"}
    layer._parameters.update(parameters | others)
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    layer.quantised_kind = base.kind.name
    layer.dense_dtype = base.dtype
    return layer


def with_dense(source: nn.Module, weight: Tensor) -> nn.Linear:
    """An nn.Linear with what the quantised layer `source` has, and a dense frozen weight in place of its
    base.
    """
    layer = _like(nn.Linear, source)
    names = kind_of(source.quantised_kind).names
    others = {name: value for name, value in source._parameters.items() if name not in names}
    layer._parameters.update({"weight": nn.Parameter(weight, requires_grad=False)} | others)
    for name in ("quantised_kind", "dense_dtype"):
        layer.__dict__.pop(name, None)
    return layer


def _like(kind: type[nn.Module], source: nn.Module) -> Any:
    """A layer of class `kind` with the attributes, hooks, buffers and children of `source`, and without
    parameters.
    """
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    for name, value in source.__dict__.items():
        if name != "_parameters":
            layer.__dict__[name] = value
    rebind_hooks(layer)
    return layer


def common_compute_dtype(layers: Iterable[nn.Module]) -> tuple[torch.dtype | None] | None:
    """The one compute_dtype that layers on quantised bases have, which may be None; None where one is not on
    such a base now, or they differ.
    """
    found = set()
    for layer in layers:
        if not isinstance(layer, Quantised) or not layer.holds_base():
            return None
        found.add((layer.dense_dtype, layer.compute_dtype))
    return (next(iter(found))[1],) if len(found) == 1 else None


def base_operands(layer: QuantisedLinear) -> LinearOperands:
    """What a block needs of a layer on a quantised base that has no adapter."""
    return LinearOperands(layer.base(), layer.bias)


class LoRAFAQuantisedLinear(Quantised, LoRAFALinear):
    """A LoRAFALinear whose weight is quantised: y = x Wᵀ + scaling · (x lora_Aᵀ) lora_Bᵀ + bias.

    For backward it keeps M·r numbers, and codes and scales by reference. W is made for forward and again for
    backward, in the dtype of x, and freed after each: at most one dense weight is there at a time. lora_A is
    in the dtype that the layer computes in. Made by from_linear, which takes the options of
    LoRAFALinear.from_linear; apply_lorafa calls it.
    """

    adapters_obstacle = "has a quantised base"

    def __init__(self, *args, **kwargs) -> None:
        raise TypeError(
            "LoRAFAQuantisedLinear is made from a quantised layer: LoRAFAQuantisedLinear.from_linear(layer)"
        )

    @classmethod
    def from_linear(cls, linear: nn.Module, **options) -> LoRAFAQuantisedLinear:
        """As LoRAFALinear.from_linear, around a QuantisedLinear or bitsandbytes' Linear4bit, whose codes and
        scales are shared: no copy of them and no dense weight.
        """
        cls.check_linear(linear)
        origin = type(linear)
        if bnb.is_linear4bit(linear):
            linear = QuantisedLinear.from_linear4bit(linear)
        layer = cls.__new__(cls)
        dtype = linear.compute_dtype or linear.dense_dtype
        stand_in = nn.Parameter(torch.empty(0, dtype=dtype, device=linear.weight.device), False)
        around = types.SimpleNamespace(
            in_features=linear.in_features,
            out_features=linear.out_features,
            weight=stand_in,
            bias=linear.bias,
        )
        layer._init_around(around, **_DEFAULTS | options)
        layer._parameters["weight"] = linear._parameters["weight"]
        layer._adopt(linear)
        layer._origin = origin
        return layer

    @staticmethod
    def check_linear(linear: nn.Module) -> None:
        """Raise TypeError or ValueError unless `linear` is a QuantisedLinear, or a Linear4bit that can be
        taken over.
        """
        if bnb.is_linear4bit(linear):
            bnb.from_linear4bit(linear)
            if is_patched(linear) or "forward" in vars(linear):
                raise ValueError(
                    "the layer's forward was patched on the instance (by an offloading hook, for example): "
                    "adapt the model before that"
                )
            return
        if type(linear) is not QuantisedLinear:
            raise TypeError(f"{type(linear).__name__} is not a QuantisedLinear")
        if is_patched(linear):
            raise ValueError("the layer's forward was patched on the instance: adapt the model before that")
        linear.base().check()

    def forward(self, input: Tensor) -> Tensor:
        """Return y (..., out_features) for input (..., in_features). Raises as LoRAFALinear."""
        if self.merged:
            self.check_merged_call()
        if self.merged and not self.holds_base():
            return self._dense_forward(input)
        if is_exported():
            return self._plain_formula(input, self)
        if self.merged or not self.adapter_enabled:
            check_frozen(self.base(), self.lora_A, self.bias)
            return frozen_linear(input, self.base(), self.bias, compute_dtype=self.compute_dtype)
        return quantised_linear(
            input,
            self.base(),
            self.lora_A,
            self.lora_B,
            self.bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
            gradient_correction=self.gradient_correction,
            impl=self.impl,
            compute_dtype=self.compute_dtype,
        )

    def _dense_forward(self, input: Tensor) -> Tensor:
        check_frozen(self.weight, self.lora_A, self.bias)
        if self.compute_dtype is None:
            return nn.functional.linear(input, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        y = nn.functional.linear(input.to(self.compute_dtype), self.weight.to(self.compute_dtype), bias)
        return y.to(input.dtype)

    def holds_base(self) -> bool:
        """As Quantised.holds_base."""
        return not self.weight.is_floating_point()

    def base(self) -> QuantisedBase:
        """The base of the layer, of its Parameter objects as they are now; of a layer that is merged into a
        dense weight the one that was kept.
        """
        return super().base() if self.holds_base() else self._kept_base()

    def _kept_base(self) -> QuantisedBase:
        shape = (self.out_features, self.in_features)
        return base_of(self.quantised_kind, self._unmerged, shape, self.dense_dtype)

    def frozen_operands(self, adapter: Any = None) -> tuple[QuantisedBase, Tensor, Tensor | None]:
        """As LoRAFALinear.frozen_operands, with the base in the place of the weight."""
        return self.base(), self.lora_A, self.bias

    def weight_matrix(self) -> Tensor:
        """Return the dense weight (out_features, in_features), a new tensor unless it is merged into one."""
        return self.base().dense() if self.holds_base() else self.weight

    def weight_shape(self) -> tuple[int, ...]:
        """The shape that weight is stored in: that of the codes, unless it is merged into a dense weight."""
        if not self.holds_base():
            return self.out_features, self.in_features
        return kind_of(self.quantised_kind).spec(self.out_features, self.in_features)["weight"][1]

    def _merged_weight(self, device: torch.device) -> Tensor:
        base = self._kept_base() if self.merged else self.base()
        dtype = base.dtype
        wide = torch.promote_types(dtype, torch.float32)
        # As in LoRAFALinear.
        B = self.lora_B.to(dtype).to(wide)
        dense, A = base.dense(wide).to(device), self.lora_A.to(wide)
        return self._plus_product(dense, B, A, self.scaling).to(dtype)

    def merge(self, keep: str = "device", safe_merge: bool = False, requantize: bool = False) -> None:
        """Install the merged weight as a dense one in dense_dtype, or with requantize=True quantised anew,
        and keep the present codes and scales for unmerge. The rest as LoRAFALinear.merge.

        Requantised, the weight is off by an error of the size of the base's own: requantised_error says how
        much.
        """
        if keep not in ("device", "cpu"):
            raise ValueError(f'keep must be "device" or "cpu", got {keep!r}')
        for name, flag in (("safe_merge", safe_merge), ("requantize", requantize)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r:.80}")
        if self.merged:
            return
        self.check_mergeable()
        merged = self.finite_merged_weight() if safe_merge else self.merged_weight()
        names = kind_of(self.quantised_kind).names
        new: dict[str, Tensor] = {"weight": merged}
        if requantize:
            new = dict(zip(names, quantised(merged, self.quantised_kind).tensors, strict=True))
        kept = [self._parameters[name] for name in names]
        if keep == "cpu":
            for parameter in kept:
                parameter.data = parameter.data.to("cpu")
        self._unmerged = kept
        for name in names:
            # A dense weight has no scales beside it.
            self._parameters[name] = nn.Parameter(new[name], False) if name in new else None
        self.merged = True

    def unmerge(self) -> None:
        """Put back the codes and scales that merge kept: the same Parameter objects with the same bits."""
        if not self.merged:
            return
        self._check_owned("the layer", "unmerged")
        device = self.weight.device
        if device.type == "meta" and not self._unmerged[0].is_meta:
            raise RuntimeError(
                "the merged weight is on the meta device, where the original weight would lose its values: "
                "remove the hook that offloads it first"
            )
        for name, kept in zip(kind_of(self.quantised_kind).names, self._unmerged, strict=True):
            kept.data = kept.data.to(device)
            self._parameters[name] = kept
        self._unmerged = []
        self.merged = False

    def requantised_error(self) -> float:
        """‖Q(W + ΔW) − (W + ΔW)‖ / ‖W + ΔW‖ (Frobenius) of merging with requantize=True."""
        merged = self.merged_weight()
        again = quantised(merged, self.quantised_kind).dense()
        wide = torch.promote_types(merged.dtype, torch.float32)
        off = torch.linalg.vector_norm(again.to(wide) - merged.to(wide))
        return float(off / torch.linalg.vector_norm(merged.to(wide)).clamp(min=torch.finfo(wide).tiny))

    def to_linear(self, merge: bool = True, safe_merge: bool = False, requantize: bool = False) -> nn.Module:
        """Return a linear layer in this layer's place: a dense nn.Linear with the merged weight; with
        requantize=True one of the class that from_linear was given, quantised anew; with merge=False that
        class and the original codes and scales. Errors as LoRAFALinear.to_linear.
        """
        for name, flag in (("merge", merge), ("safe_merge", safe_merge), ("requantize", requantize)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r:.80}")
        self.check_unloadable(merge=merge)
        weight = None
        if merge:
            weight = self.finite_merged_weight() if safe_merge else self.merged_weight()
        self.unmerge()
        origin, self._origin = self._origin, QuantisedLinear
        try:
            linear = super().to_linear(merge=False)
        finally:
            self._origin = origin
        if weight is not None and not requantize:
            return with_dense(linear, weight)
        if weight is not None:
            again = quantised(weight, linear.quantised_kind)
            linear = _with_base(QuantisedLinear, with_dense(linear, weight), again)
        if origin is QuantisedLinear:
            return linear
        # Its weight comes with what bitsandbytes knows of it.
        back = _like(origin, linear)
        for name in ("quantised_kind", "dense_dtype"):
            back.__dict__.pop(name, None)
        parameter = bnb.to_params4bit(linear.base(), back)
        back._parameters.update({"weight": parameter, "bias": linear.bias})
        back.quant_state = parameter.quant_state
        return back

    def reset_parameters(self) -> None:
        """Raises RuntimeError: codes have no initialisation. reset_lora_parameters makes the adapter anew."""
        raise RuntimeError(
            "a quantised layer has no initialisation: reset_lora_parameters() makes its adapter anew"
        )

    def extra_repr(self) -> str:
        """Describe the layer in print(model)."""
        return f"{super().extra_repr()}, {self._describe()}"

    def _apply(self, fn, recurse=True):
        if self._unmerged and self._unmerged[0].device == self.weight.device:
            for kept in self._unmerged:
                kept.data = fn(kept.data)
            held, self._unmerged = self._unmerged, []
            try:
                return super()._apply(fn, recurse)
            finally:
                self._unmerged = held
        return super()._apply(fn, recurse)


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
