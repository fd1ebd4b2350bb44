"""LoRAFALinear: what stands where an nn.Linear was."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

from ..correction import as_corrected
from ..engines import frozen_view, full_shape, manager_of, not_plain
from ..group.operands import LinearOperands
from ..linear.api import lorafa_linear
from ..mixed.api import lorafa_linear_mixed
from ..mixed.rows import Rows
from ..operands import FLOAT_DTYPES, autocast_enabled, check_frozen
from .adapters import (
    DEFAULT,
    Acting,
    Adapters,
    LoRAFAAdapter,
    check_name,
    mixture_now,
    outside_of_compilers,
    reset,
)
from .hooked import computing_device, give_hook, hook_of, is_patched, take_hook

# Asked for in each call.
_is_tracing = torch._C._is_tracing
INITIALISATIONS = (True, False, "gaussian", "orthogonal")
# Attributes of the layer itself; all others it has belong to the linear layer that it stands for as well.
_OWN = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "init_lora_weights",
        "init_seed",
        "gradient_correction",
        "scaling",
        "impl",
        "adapter_enabled",
        "merged",
        "_unmerged",
        "_origin",
        "_shadowed",
        "_acting",
    }
)
LARGEST_RANK = 2**31 - 1


class LoRAFALinear(nn.Module):
    """A linear layer with a LoRA-FA adapter: y = x weightᵀ + scaling · (x lora_Aᵀ) lora_Bᵀ + bias, of which
    only lora_B is trained.

    LoRA-FA: arXiv 2308.03303. x is (..., in_features), y (..., out_features). For backward the layer keeps
    M·r numbers and not x.

    Parameters of the module, all but lora_B with requires_grad=False: weight (out_features, in_features),
    bias (out_features,) or None, lora_A (r, in_features) in weight's dtype, lora_B (out_features, r) in
    adapter_dtype. Thawing a frozen one makes the next forward raise a ValueError that names it.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        r: rank, at least 1.
        lora_alpha: scaling is lora_alpha / r, with use_rslora lora_alpha / √r (arXiv 2312.03732).
        lora_dropout: probability in [0, 1) of dropping an element of x before lora_A while training. No mask
            is kept, but 8 bytes of a seed; eval() costs nothing.
        init_lora_weights: True, Kaiming-uniform lora_A and zero lora_B (the layer starts as the base
            layer); "gaussian", lora_A from N(0, 1/r²) and zero lora_B; "orthogonal", lora_A of orthogonal
            rows as long as Kaiming's in the mean, lora_A lora_Aᵀ = I/3 (if r ≤ in_features, else of
            orthogonal columns), and zero lora_B; False, both Kaiming-uniform.
        init_seed: what lora_A (and lora_B, where it is not zero) is drawn from: the same values on every
            device and rank and whatever was drawn before, rounded to the dtype. None: from the default
            generator of the device.
        adapter_dtype: dtype of lora_B.
        gradient_correction: lora_B's gradient is multiplied by (1/s²) · (lora_A lora_Aᵀ + 1e-8 I)⁻¹, s the
            scaling: the correction of LoRA-FA's second version. The inverse (r, r) is made once, in fp32, and
            again after lora_A was changed (not through `.data` once training has begun).

    Raises:
        ValueError: r below 1 or not an integer, lora_dropout outside [0, 1), lora_alpha not finite, an
            unknown init_lora_weights, a dtype that is not floating point, a device that does not exist,
            gradient_correction with a lora_alpha of 0, an init_seed that has no 64 bits.
        TypeError: another argument of a wrong type. numpy's numbers are as good as Python's.

    `impl` (default "auto") chooses the implementation, as in lorafa_linear. With adapter_enabled=False the
    layer is the frozen base layer.
    """

    in_features: int
    out_features: int
    merged: bool
    # Of layers that were pickled before there was a choice.
    gradient_correction: bool = False
    init_seed: int | None = None
    # Why it can have no further adapters and no mixed batch, of classes that compute otherwise.
    adapters_obstacle: str | None = None
    # None: the layer's own adapter, as in all layers that have no other.
    _acting: Acting | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
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
        in_features = checked_size("in_features", in_features)
        out_features = checked_size("out_features", out_features)
        _check_flag("bias", bias)
        _check_dtype("dtype", dtype)
        _check_device(device)
        # Before the weight is made, which may be large.
        options = {
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "use_rslora": use_rslora,
            "init_lora_weights": init_lora_weights,
            "init_seed": init_seed,
            "adapter_dtype": adapter_dtype,
            "gradient_correction": gradient_correction,
        }
        check_adapter_options(**options)
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._init_around(base, **options)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        init_seed: int | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        gradient_correction: bool = False,
    ) -> LoRAFALinear:
        """Build the layer around `linear`, sharing its Parameter objects (which are frozen), hooks, buffers,
        training flag and whatever else was set on it: no copy. to_linear gives all of it back.

        A hook of accelerate (device_map, cpu_offload) goes to the layer, and moves its weight and bias as
        before.

        Arguments and errors as in the class, and those of check_linear.
        """
        cls.check_linear(linear)
        layer = cls.__new__(cls)
        hook = take_hook(linear)
        layer._init_around(
            linear,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            init_seed=init_seed,
            adapter_dtype=adapter_dtype,
            gradient_correction=gradient_correction,
            device=computing_device(hook, linear.weight),
        )
        layer._adopt(linear)
        give_hook(layer, hook, linear)
        return layer

    def _adopt(self, linear: nn.Linear) -> None:
        own = self.__dict__
        self._origin = type(linear)
        for name, value in vars(linear).items():
            if name in ("_parameters", "_buffers", "_modules"):
                for key, entry in value.items():
                    own[name].setdefault(key, entry)
            elif name == "forward":
                continue
            elif name in _OWN:
                # What bears the name of an attribute of ours waits until the layer is a Linear again.
                self._shadowed[name] = value
            else:
                # Hooks, the training flag, and what its author set.
                own[name] = value
        rebind_hooks(self)

    @staticmethod
    def check_linear(linear: nn.Module) -> None:
        """Raise if from_linear cannot stand in for `linear`.

        Raises:
            TypeError: not an nn.Linear, or a subclass whose forward does something else (quantised and
                parallel layers).
            ValueError: a weight that is not a plain floating-point Parameter (a DTensor, a quantised tensor,
                the part of a parameter that one process has), a parametrised layer, a patched forward, or
                the out_proj of nn.MultiheadAttention, whose forward is never called.
        """
        kind = type(linear)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{kind.__name__} is not a torch.nn.Linear")
        if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise ValueError(
                "the out_proj of nn.MultiheadAttention cannot be adapted: its weight is read without "
                "calling its forward"
            )
        if parametrize.is_parametrized(linear):
            raise ValueError(
                "a parametrised layer cannot be adapted, its weight is computed anew in each forward: call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if kind.forward is not nn.Linear.forward or kind.__call__ is not nn.Module.__call__:
            raise TypeError(
                f"{kind.__module__}.{kind.__name__} has a forward of its own: only plain nn.Linear can be "
                "adapted"
            )
        if is_patched(linear) and hook_of(linear) is None:
            raise ValueError(
                "the layer's forward was patched on the instance (not by accelerate alone): adapt the model "
                "before that"
            )
        for name in ("lora_A", "lora_B"):
            if name in linear._parameters or name in linear._buffers or name in linear._modules:
                raise ValueError(f"the layer already has a {name}: remove the other library's adapter first")
        shapes = {"weight": (linear.out_features, linear.in_features), "bias": (linear.out_features,)}
        for name, shape in shapes.items():
            tensor = getattr(linear, name)
            if tensor is None and name == "bias":
                continue
            if isinstance(tensor, Tensor) and (reason := not_plain(tensor)):
                raise ValueError(f"{name} is {reason}")
            plain = isinstance(tensor, nn.Parameter) and not nn.parameter.is_lazy(tensor)
            if not plain or tensor.dtype not in FLOAT_DTYPES:
                what = f"{type(tensor).__name__} of {getattr(tensor, 'dtype', 'no dtype')}"
                raise ValueError(f"{name} is a {what}, expected a floating-point Parameter")
            if full_shape(tensor) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {shape}: if FSDP or DeepSpeed has "
                    "partitioned it, adapt the model before that"
                )

    def _init_around(
        self,
        base: nn.Linear,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | str,
        init_seed: int | None,
        adapter_dtype: torch.dtype,
        gradient_correction: bool,
        device: torch.device | None = None,
    ) -> None:
        r, lora_alpha, lora_dropout = check_adapter_options(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            init_seed=init_seed,
            adapter_dtype=adapter_dtype,
            gradient_correction=gradient_correction,
        )
        nn.Module.__init__(self)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.init_lora_weights = init_lora_weights
        self.init_seed = None if init_seed is None else int(init_seed)
        self.gradient_correction = gradient_correction
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.impl = "auto"
        self.adapter_enabled = True
        self.merged = False
        # A list, so that the kept weight is no Parameter of this module: not in state_dict, not seen by an
        # optimizer.
        self._unmerged: list[nn.Parameter] = []
        self._origin: type[nn.Linear] = nn.Linear
        self._shadowed: dict[str, Any] = {}
        weight = base.weight
        self.weight = weight.requires_grad_(False)
        self.register_parameter("bias", None if base.bias is None else base.bias.requires_grad_(False))
        empty = {"device": weight.device if device is None else device}
        lora_A = torch.empty(r, self.in_features, dtype=weight.dtype, **empty)
        lora_B = torch.empty(self.out_features, r, dtype=adapter_dtype, **empty)
        self.lora_A = nn.Parameter(lora_A, requires_grad=False)
        self.lora_B = nn.Parameter(lora_B)
        self.reset_lora_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters anew: weight and bias as torch.nn.Linear does, lora_A and lora_B (of
        further adapters too) as init_lora_weights says. For a layer that was made on the meta device, after
        to_empty.

        Raises RuntimeError for a merged layer.
        """
        if self.merged:
            raise RuntimeError(
                "the adapter is merged into the weight: call unmerge() before reset_parameters()"
            )
        nn.Linear.reset_parameters(self)
        self.reset_lora_parameters()
        for adapter in self.further_adapters().values():
            adapter.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Initialise lora_A and lora_B anew, as init_lora_weights and init_seed say; lora_A stays frozen
        afterwards. Raises RuntimeError for a sharded lora_A that is to be orthogonal and has no init_seed.
        """
        reset(self, draw_A=True)

    def further_adapters(self) -> dict[str, LoRAFAAdapter]:
        """{name: adapter} of those that add_adapter made, in their order."""
        adapters = self._modules.get("adapters")
        return dict(adapters._modules) if isinstance(adapters, Adapters) else {}

    def adapter(self, name: str | None = None) -> LoRAFALinear | LoRAFAAdapter | None:
        """Return what has r, scaling, lora_A, lora_B and the other options of the adapter `name`, the active
        one for None: the layer itself for "default", a LoRAFAAdapter for another, None where the layer has
        none of that name and is the frozen base layer.
        """
        acting = self._acting
        if name is None and acting is not None:
            name = acting.name
        return self if name is None or name == DEFAULT else self.further_adapters().get(name)

    def add_adapter(
        self,
        name: str,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        init_seed: int | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        gradient_correction: bool = False,
        share_lora_A: bool = False,
    ) -> LoRAFAAdapter:
        """Add another adapter to the layer and return it; which one acts does not change.

        share_lora_A: it has the layer's lora_A, and so its rank; z is then computed once for both in a batch
        that mixes them. The other arguments, and errors, as in the class; ValueError also for a name that is
        taken or that no module can have, and for another rank than the layer's with share_lora_A.
        """
        check_name(name)
        if self.adapters_obstacle:
            raise ValueError(f"the layer {self.adapters_obstacle}, where it has one adapter alone")
        if name == DEFAULT or name in self.further_adapters():
            raise ValueError(f"the layer already has an adapter {name!r}")
        r, lora_alpha, lora_dropout = check_adapter_options(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            init_seed=init_seed,
            adapter_dtype=adapter_dtype,
            gradient_correction=gradient_correction,
        )
        _check_flag("share_lora_A", share_lora_A)
        if share_lora_A and r != self.r:
            raise ValueError(f"share_lora_A=True with r={r}, but the shared lora_A has r={self.r}")
        adapter = LoRAFAAdapter(
            self,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            init_seed=init_seed,
            adapter_dtype=adapter_dtype,
            gradient_correction=gradient_correction,
            share_lora_A=share_lora_A,
        )
        if "adapters" not in self._modules:
            self.adapters = Adapters()
            self.adapters.train(self.training)
        self.adapters.add_module(name, adapter)
        return adapter

    def delete_adapter(self, name: str) -> None:
        """Remove a further adapter; does nothing if the layer has none of that name. Raises ValueError for
        the active one and for the layer's own.
        """
        if name == DEFAULT or self.adapter() is self.adapter(name) is not None:
            raise ValueError(
                f"{name!r} is the layer's own adapter or acts now: unload_adapter(model) removes the layer's "
                "own with the layer, set_adapter(model, other) chooses another"
            )
        if name in self.further_adapters():
            del self.adapters._modules[name]
            if not self.adapters._modules:
                del self._modules["adapters"]

    def set_acting(self, acting: Acting) -> None:
        """Choose what acts from the next forward on; the layer's own adapter alone costs no look at it."""
        self.__dict__["_acting"] = None if acting == Acting() else acting

    @property
    def acting(self) -> Acting:
        """What acts: an adapter, and in a mixed batch the index of its rows."""
        return Acting() if self._acting is None else self._acting

    def adapter_operands(self, adapter: LoRAFALinear | LoRAFAAdapter | None) -> LinearOperands:
        """Return what an operation needs to compute the layer with one of its adapters, or with none."""
        weight, lora_A, bias = self.frozen_operands(adapter)
        if adapter is None:
            return LinearOperands(weight, bias)
        return LinearOperands(
            weight,
            bias,
            lora_A,
            adapter.lora_B,
            adapter.scaling,
            adapter.lora_dropout if self.training else 0.0,
            adapter.gradient_correction,
        )

    def mixes(self) -> bool:
        """Whether the rows of a batch take adapters by an index now."""
        return (
            self._acting is not None
            and self.adapter_enabled
            and mixture_now(self._acting, self.training) is not None
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return y (..., out_features) for input (..., in_features). Raises as lorafa_linear; RuntimeError
        if trained or disabled while merged, or given a mixed batch.
        """
        if self.merged or not self.adapter_enabled:
            return self._base_forward(input)
        if self._acting is not None:
            return self._with_acting(input)
        if is_exported():
            return self._plain_formula(input, self)
        # nn.Module finds a Parameter last of all, after two failed look-ups and a call for each.
        parameters = self._parameters
        try:
            lora_A, lora_B, bias = parameters["lora_A"], parameters["lora_B"], parameters["bias"]
        except KeyError:
            # FSDP1 keeps them as plain attributes.
            lora_A, lora_B, bias = self.lora_A, self.lora_B, self.bias
        weight = self.weight_matrix()
        if lora_A.requires_grad or weight.requires_grad:
            weight, lora_A, bias = self.frozen_operands(self)
        return lorafa_linear(
            input,
            weight,
            lora_A,
            lora_B,
            bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
            gradient_correction=self.gradient_correction,
            impl=self.impl,
        )

    def _base_forward(self, input: Tensor) -> Tensor:
        if self.merged:
            self.check_merged_call()
        return self._base_linear(input)

    def _base_linear(self, input: Tensor) -> Tensor:
        weight, lora_A, bias = self.frozen_operands(self)
        check_frozen(weight, lora_A, bias)
        return F.linear(input, weight, bias)

    def check_merged_call(self) -> None:
        """Raise RuntimeError if this layer, which is merged, is trained or disabled."""
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the adapter is merged into the weight: call unmerge() before training, or eval() for "
                "inference"
            )
        if not self.adapter_enabled:
            raise RuntimeError(
                "the adapter is merged into the weight and cannot be disabled: call unmerge() first"
            )

    def _with_acting(self, input: Tensor) -> Tensor:
        """forward of a layer in which something else than its own adapter acts."""
        if (mixed := mixture_now(self._acting, self.training)) is not None:
            return self._mixed(input, *mixed)
        adapter = self.adapter()
        if adapter is None:
            return self._base_linear(input)
        if is_exported():
            return self._plain_formula(input, adapter)
        weight, lora_A, bias = self.frozen_operands(adapter)
        return lorafa_linear(
            input,
            weight,
            lora_A,
            adapter.lora_B,
            bias,
            scaling=adapter.scaling,
            dropout_p=adapter.lora_dropout if self.training else 0.0,
            gradient_correction=adapter.gradient_correction,
            impl=self.impl,
        )

    @outside_of_compilers
    def _mixed(self, input: Tensor, rows: Rows, names: tuple[str, ...]) -> Tensor:
        if is_exported():
            raise RuntimeError("a mixed batch cannot be exported: leave adapter_index, and choose an adapter")
        found = {number: self.adapter(name) for number, name in enumerate(names)}
        members = {number: self.adapter_operands(a) for number, a in found.items() if a is not None}
        rows.check(input)
        if not members:
            return self._base_linear(input)
        return lorafa_linear_mixed(input, members, rows, impl=self.impl)

    def _plain_formula(self, x: Tensor, adapter: LoRAFALinear | LoRAFAAdapter) -> Tensor:
        """What forward computes, of operations that every exporter knows; the tracer differentiates it."""
        lora_A, lora_B = adapter.lora_A, adapter.lora_B
        check_frozen(self.weight, lora_A, self.bias)
        dtype = x.dtype
        dropped = F.dropout(x, adapter.lora_dropout) if self.training and adapter.lora_dropout else x
        z = F.linear(dropped, lora_A.to(dtype)) * adapter.scaling
        # Nobody differentiates an ONNX graph.
        if adapter.gradient_correction and self.training and not torch.onnx.is_in_onnx_export():
            lora_B = as_corrected(lora_B, lora_A, adapter.scaling)
        return F.linear(x, self.weight_matrix(), self.bias) + F.linear(z, lora_B.to(z.dtype))

    def frozen_operands(
        self, adapter: LoRAFALinear | LoRAFAAdapter | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return weight (out_features, in_features), lora_A of an adapter (the layer's for None) and bias,
        for forward. They require grad only if they were thawed: what FSDP1 shows of a frozen parameter, and
        requires grad, is detached.
        """
        owner = self if adapter is None or adapter is self or adapter.shares_lora_A else adapter
        weight = self.weight_matrix()
        # As in forward.
        try:
            lora_A, bias = owner._parameters["lora_A"], self._parameters["bias"]
        except KeyError:
            lora_A, bias = owner.lora_A, self.bias
        # FSDP1 has all of a module in one flat parameter.
        if lora_A.requires_grad or weight.requires_grad:
            weight = frozen_view(self, "weight", weight)
            lora_A = frozen_view(owner, "lora_A", lora_A)
            bias = frozen_view(self, "bias", bias)
        return weight, lora_A, bias

    def weight_matrix(self) -> Tensor:
        """Return weight as (out_features, in_features), as it is stored here."""
        parameters = self._parameters
        if "weight" not in parameters:
            return self.weight
        # Not get(), past which DeepSpeed's ZeRO-3 could not gather it.
        return parameters["weight"]

    def weight_shape(self) -> tuple[int, int]:
        """The shape that weight is stored in."""
        return self.out_features, self.in_features

    def merged_weight(self) -> Tensor:
        """Return round(weight + scaling · lora_B lora_A) of the active adapter, a new tensor in weight's
        dtype and shape (N, K); computed in fp32 or wider, under autocast too.
        """
        device = self.lora_B.device
        # An inference tensor could never be trained on again.
        with torch.inference_mode(False), torch.no_grad():
            if autocast_enabled(device.type):
                with torch.autocast(device.type, enabled=False):
                    return self._merged_weight(device)
            return self._merged_weight(device)

    def _merged_weight(self, device: torch.device) -> Tensor:
        weight = self._unmerged[0] if self.merged else self.weight
        if (adapter := self.adapter()) is None:
            return weight.detach().to(device, copy=True)
        wide = torch.promote_types(weight.dtype, torch.float32)
        # lora_B acts rounded to weight's dtype in forward, so it is merged as it acts.
        B = adapter.lora_B.to(weight.dtype).to(wide)
        base = weight.to(device=device, dtype=wide)
        return self._plus_product(base, B, adapter.lora_A.to(wide), adapter.scaling).to(weight.dtype)

    def _plus_product(self, weight: Tensor, B: Tensor, A: Tensor, scaling: float) -> Tensor:
        return torch.addmm(weight, B, A, alpha=scaling)

    def check_mergeable(self, name: str = "the layer") -> None:
        """Raise RuntimeError, naming the layer, if it cannot be merged as it is: its adapter is disabled, or
        a parameter is offloaded, partitioned or managed by an engine that would put its own back.
        """
        if not self.adapter_enabled:
            raise RuntimeError(
                f"the adapter of {name} is disabled, and merging would switch it on: leave disable_adapter, "
                "or set adapter_enabled = True, first"
            )
        if self.acting.mixture is not None:
            raise RuntimeError(f"{name} is computing a mixed batch: leave adapter_index before merging")
        self._check_owned(name, "merged")
        weight = "weight" if not self.merged else "the weight that was kept"
        adapter = self.adapter() or self
        for what, tensor in ((weight, self._base()), ("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B)):
            if tensor.is_meta:
                raise RuntimeError(
                    f"{what} of {name} is on the meta device and has no values: if a hook offloads the "
                    "model, remove it first (accelerate.hooks.remove_hook_from_submodules)"
                )

    def _base(self) -> nn.Parameter:
        return self._unmerged[0] if self.merged else self.weight

    def _check_owned(self, name: str, done: str) -> None:
        adapter = self.adapter() or self
        shapes = {
            "weight": (self, self.weight_shape()),
            "lora_A": (
                self if adapter is not self and adapter.shares_lora_A else adapter,
                (adapter.r, self.in_features),
            ),
            "lora_B": (adapter, (self.out_features, adapter.r)),
        }
        for what, (owner, shape) in shapes.items():
            tensor = getattr(owner, what)
            if engine := manager_of(owner, what):
                raise RuntimeError(
                    f"{name} cannot be {done}: its {what} belongs to {engine}, which would overwrite it. "
                    "Save the adapter, load it into a model that is not sharded, and do this there"
                )
            if tuple(tensor.shape) != shape:
                raise RuntimeError(
                    f"{name} cannot be {done}: its {what} has shape {tuple(tensor.shape)}, expected {shape}"
                )

    def merge(self, keep: str = "device", safe_merge: bool = False) -> None:
        """Install the merged weight, keeping the present one for unmerge: keep="device" where it is, "cpu"
        in host memory.

        keep="cpu" moves the kept Parameter's storage, which a module that shares the Parameter would
        notice. Merging a merged layer does nothing. Raises ValueError for another `keep`, and with
        safe_merge=True for a merged weight that is not finite everywhere; RuntimeError as check_mergeable.
        An error changes nothing.
        """
        if keep not in ("device", "cpu"):
            raise ValueError(f'keep must be "device" or "cpu", got {keep!r}')
        _check_flag("safe_merge", safe_merge)
        if self.merged:
            return
        self.check_mergeable()
        merged = nn.Parameter(self.finite_merged_weight() if safe_merge else self.merged_weight(), False)
        kept = self.weight
        if keep == "cpu":
            kept.data = kept.data.to("cpu")
        self._unmerged = [kept]
        self.weight = merged
        self.merged = True

    def kept_where(self) -> str:
        """Where a merged layer keeps the weight that unmerge puts back: "device" or "cpu", as for merge."""
        return "device" if self._base().device == self.weight.device else "cpu"

    def finite_merged_weight(self, name: str = "the layer") -> Tensor:
        """Return merged_weight(). Raises ValueError, naming the layer, if it is not finite everywhere."""
        merged = self.merged_weight()
        if not bool(torch.isfinite(merged).all()):
            raise ValueError(
                f"the merged weight of {name} is not finite everywhere: its adapter or its weight holds NaN "
                "or Inf, or the sum is too large for the weight's dtype"
            )
        return merged

    def unmerge(self) -> None:
        """Put back the weight that merge kept: the same Parameter object with the same bits. Does nothing
        if not merged. Raises RuntimeError where an engine took the merged weight over.
        """
        if not self.merged:
            return
        kept = self._unmerged[0]
        self._check_owned("the layer", "unmerged")
        if self.weight.is_meta and not kept.is_meta:
            raise RuntimeError(
                "the merged weight is on the meta device, where the original weight would lose its values: "
                "remove the hook that offloads it first"
            )
        kept.data = kept.data.to(self.weight.device, self.weight.dtype)
        self._unmerged.clear()
        self.weight = kept
        self.merged = False

    def to_linear(self, merge: bool = True, safe_merge: bool = False) -> nn.Linear:
        """Return a linear layer in this layer's place: with the merged weight, or with the original
        Parameter objects (merge=False).

        It is of the class that from_linear was given, and has its hooks, buffers and other attributes, with
        what happened to them here. Raises RuntimeError as check_unloadable, ValueError as merge.
        """
        _check_flag("merge", merge)
        _check_flag("safe_merge", safe_merge)
        self.check_unloadable(merge=merge)
        if merge:
            merged = self.finite_merged_weight() if safe_merge else self.merged_weight()
            weight = nn.Parameter(merged, requires_grad=False)
        else:
            self.unmerge()
            weight = self.weight
        linear = self._origin.__new__(self._origin)
        nn.Module.__init__(linear)
        parameters = {"weight": weight} | self._parameters
        for name in ("lora_A", "lora_B"):
            del parameters[name]
        parameters["weight"] = weight
        for name, value in self.__dict__.items():
            # A forward of the instance is this class's own, which check_unloadable has seen to.
            if name not in _OWN and name not in ("_parameters", "forward"):
                linear.__dict__[name] = value
        linear.__dict__["_modules"] = {n: m for n, m in self._modules.items() if not isinstance(m, Adapters)}
        linear._parameters.update(parameters)
        linear.__dict__.update(self._shadowed)
        rebind_hooks(linear)
        return linear

    def check_unloadable(self, name: str = "the layer", *, merge: bool) -> None:
        """Raise RuntimeError, naming the layer, if to_linear cannot give back what from_linear took."""
        if merge:
            self.check_mergeable(name)
        self._check_owned(name, "unloaded")
        if is_patched(self):
            raise RuntimeError(
                f"the forward of {name} was patched on the instance (by an offloading hook, for example), "
                "and would be lost in an nn.Linear: remove the patch first"
            )

    def extra_repr(self) -> str:
        """Describe the layer in print(model)."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, scaling={self.scaling:g}"
        )
        text += ", gradient_correction=True" if self.gradient_correction else ""
        return text + (", merged" if self.merged else "")

    def _apply(self, fn, recurse=True):
        # .to(), .cuda(), .half() reach the kept weight as well, unless it was sent to the CPU on purpose.
        if self._unmerged and self._unmerged[0].device == self.weight.device:
            kept = self._unmerged[0]
            kept.data = fn(kept.data)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.merged:
            raise RuntimeError(
                f"{prefix.rstrip('.') or 'this layer'} is merged, so its weight is not the base weight: call "
                "unmerge() before saving"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if self.merged:
            raise RuntimeError(
                f"{prefix.rstrip('.') or 'this layer'} is merged: call unmerge() before loading a state"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def check_seed(init_seed: object) -> None:
    """Raise ValueError unless init_seed is None or an integer that seeds a generator."""
    if init_seed is None:
        return
    seed = as_integer(init_seed)
    if seed is None or not -(2**63) <= seed < 2**64:
        raise ValueError(f"init_seed must be None or an integer of 64 bits, got {shown(init_seed)}")


def is_exported() -> bool:
    """Whether torch.jit.trace or an ONNX exporter reads off the operations of a forward."""
    if is_compiling():
        return torch.onnx.is_in_onnx_export()
    return _is_tracing()


def rebind_hooks(module: nn.Module) -> None:
    """Hooks on loading that are handed their module get `module` from now on; the others know none."""
    for hooks in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
        for key, hook in hooks.items():
            if getattr(hook, "with_module", False):
                hooks[key] = type(hook)(hook.hook, module)


def check_adapter_options(
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    use_rslora: bool,
    init_lora_weights: bool | str,
    init_seed: int | None,
    adapter_dtype: torch.dtype,
    gradient_correction: bool,
) -> tuple[int, float, float]:
    """Return r, lora_alpha and lora_dropout as Python numbers. Raises ValueError or TypeError for an adapter
    option out of its range, naming it.
    """
    rank, alpha, dropout = as_integer(r), as_number(lora_alpha), as_number(lora_dropout)
    if rank is None or rank < 1:
        raise ValueError(f"r must be an integer of at least 1, got {shown(r)}")
    if rank > LARGEST_RANK:
        raise ValueError(f"r must be at most {LARGEST_RANK}, got {shown(r)}")
    if alpha is None:
        raise ValueError(f"lora_alpha must be a finite number, got {shown(lora_alpha)}")
    if dropout is None or not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {shown(lora_dropout)}")
    _check_flag("use_rslora", use_rslora)
    _check_flag("gradient_correction", gradient_correction)
    if gradient_correction and alpha == 0:
        raise ValueError("gradient_correction divides by the scaling: lora_alpha must not be 0")
    # By type as well: 1 equals True.
    if not isinstance(init_lora_weights, (bool, str)) or init_lora_weights not in INITIALISATIONS:
        raise ValueError(
            "init_lora_weights must be True, False, 'gaussian' or 'orthogonal', got "
            f"{shown(init_lora_weights)}"
        )
    check_seed(init_seed)
    if adapter_dtype is None:
        raise TypeError("adapter_dtype must be a torch.dtype, such as torch.float32, got None")
    _check_dtype("adapter_dtype", adapter_dtype)
    return rank, alpha, dropout


def as_integer(value: object) -> int | None:
    """The Python int that an integer of any library is; None for anything else, a bool too."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def as_number(value: object) -> int | float | None:
    """The finite Python int or float that a real number of any library is; None for anything else."""
    if (integer := as_integer(value)) is not None:
        # One that a float cannot hold ends in an OverflowError at the first division.
        return integer if abs(integer) < 2**1023 else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def shown(value: object) -> str:
    """repr for an error message: short, whatever the value is."""
    try:
        text = repr(value)
    except Exception as error:
        # Integers of more than 4,300 digits have none, and objects of users may have none either.
        text = f"a {type(value).__name__} ({type(error).__name__} in its repr)"
    return text if len(text) <= 200 else f"{text[:200]}…"


def checked_size(name: str, value: object) -> int:
    """Return a number of features. Raises TypeError or ValueError, naming it."""
    size = as_integer(value)
    if size is None:
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if not 0 <= size < 2**63:
        raise ValueError(f"{name} must be an integer of at least 0, got {shown(value)}")
    return size


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def _check_dtype(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, got {shown(value)}")
    if value not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {value}")


def _check_device(value: object) -> None:
    if value is None or isinstance(value, torch.device):
        return
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(f"device must be a torch.device, str or int, got {shown(value)}")
    try:
        torch.device(value)
    except (RuntimeError, OverflowError, ValueError) as error:
        raise ValueError(f"device {shown(value)} is not known to torch: {error}") from None
