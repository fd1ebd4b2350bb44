"""LoRAFALinear: what stands where an nn.Linear was."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..functional import FLOAT_DTYPES, check_frozen, lorafa_linear

INITIALISATIONS = (True, False, "gaussian")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


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
            layer); "gaussian", lora_A from N(0, 1/r²) and zero lora_B; False, both Kaiming-uniform.
        adapter_dtype: dtype of lora_B.

    Raises:
        ValueError: r below 1, lora_dropout outside [0, 1), lora_alpha not finite, an unknown
            init_lora_weights.

    `impl` (default "auto") chooses the implementation, as in lorafa_linear. With adapter_enabled=False the
    layer is the frozen base layer.
    """

    in_features: int
    out_features: int
    merged: bool

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
        device=None,
        dtype=None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._init_around(base, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)

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
        adapter_dtype: torch.dtype = torch.float32,
    ) -> LoRAFALinear:
        """Build the layer around `linear`, sharing its Parameter objects (which are frozen), hooks and
        training flag: no copy. Other attributes that were set on `linear` stay behind.

        Arguments and errors as in the class, and those of check_linear.
        """
        cls.check_linear(linear)
        layer = cls.__new__(cls)
        layer._init_around(linear, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)
        for hooks in _HOOKS:
            setattr(layer, hooks, getattr(linear, hooks))
        return layer.train(linear.training)

    @staticmethod
    def check_linear(linear: nn.Module) -> None:
        """Raise if from_linear cannot stand in for `linear`.

        Raises:
            TypeError: not an nn.Linear, or a subclass whose forward does something else (quantised and
                parallel layers).
            ValueError: a weight that is not a plain floating-point Parameter, a parametrised layer, a
                patched forward, or the out_proj of nn.MultiheadAttention, whose forward is never called.
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
                "a parametrised layer cannot be adapted: its weight is computed anew in each forward"
            )
        if kind.forward is not nn.Linear.forward:
            raise TypeError(
                f"{kind.__module__}.{kind.__name__} has a forward of its own: only plain nn.Linear can be "
                "adapted"
            )
        if "forward" in vars(linear):
            raise ValueError(
                "the layer's forward was patched on the instance (by an offloading hook, say): adapt the "
                "model before that"
            )
        for name in ("weight", "bias"):
            tensor = getattr(linear, name)
            if tensor is None and name == "bias":
                continue
            plain = isinstance(tensor, nn.Parameter) and not nn.parameter.is_lazy(tensor)
            if not plain or tensor.dtype not in FLOAT_DTYPES:
                what = f"{type(tensor).__name__} of {getattr(tensor, 'dtype', 'no dtype')}"
                raise ValueError(f"{name} is a {what}, expected a floating-point Parameter")

    def _init_around(
        self,
        base: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | str,
        adapter_dtype: torch.dtype,
    ) -> None:
        check_adapter_options(r, lora_alpha, lora_dropout, init_lora_weights)
        if adapter_dtype not in FLOAT_DTYPES:
            raise ValueError(f"adapter_dtype must be a floating-point dtype, got {adapter_dtype}")
        nn.Module.__init__(self)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.init_lora_weights = init_lora_weights
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.impl = "auto"
        self.adapter_enabled = True
        self.merged = False
        # A list, so that the kept weight is no Parameter of this module: not in state_dict, not seen by an
        # optimizer.
        self._unmerged: list[nn.Parameter] = []
        weight = base.weight
        self.weight = weight.requires_grad_(False)
        self.bias = None if base.bias is None else base.bias.requires_grad_(False)
        empty = {"device": weight.device}
        lora_A = torch.empty(r, self.in_features, dtype=weight.dtype, **empty)
        lora_B = torch.empty(self.out_features, r, dtype=adapter_dtype, **empty)
        self.lora_A = nn.Parameter(lora_A, requires_grad=False)
        self.lora_B = nn.Parameter(lora_B)
        self.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Initialise lora_A and lora_B anew, as init_lora_weights says; lora_A stays frozen afterwards."""
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., out_features) for x (..., in_features). Raises as lorafa_linear; RuntimeError if
        trained while merged.
        """
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the adapter is merged into the weight: call unmerge() before training, or eval()"
            )
        if self.merged or not self.adapter_enabled:
            check_frozen(self.weight, self.lora_A, self.bias)
            return F.linear(x, self.weight, self.bias)
        return lorafa_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
            impl=self.impl,
        )

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return round(weight + scaling · lora_B lora_A) (N, K), a new tensor in weight's dtype; computed
        in fp32 or wider.
        """
        weight = self._unmerged[0] if self.merged else self.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        device = self.lora_B.device
        # lora_B acts rounded to weight's dtype in forward, so it is merged as it acts.
        B = self.lora_B.to(weight.dtype).to(wide)
        base = weight.to(device=device, dtype=wide)
        return torch.addmm(base, B, self.lora_A.to(wide), alpha=self.scaling).to(weight.dtype)

    def merge(self, keep: str = "device") -> None:
        """Install the merged weight, keeping the present one for unmerge: keep="device" where it is, "cpu"
        in host memory.

        keep="cpu" moves the kept Parameter's storage, which a module that shares the Parameter would
        notice. Merging a merged layer does nothing. Raises ValueError for another `keep`.
        """
        if keep not in ("device", "cpu"):
            raise ValueError(f'keep must be "device" or "cpu", got {keep!r}')
        if self.merged:
            return
        merged = nn.Parameter(self.merged_weight(), requires_grad=False)
        kept = self.weight
        if keep == "cpu":
            kept.data = kept.data.to("cpu")
        self._unmerged = [kept]
        self.weight = merged
        self.merged = True

    def unmerge(self) -> None:
        """Put back the weight that merge kept: the same Parameter object with the same bits. Does nothing
        if not merged.
        """
        if not self.merged:
            return
        kept = self._unmerged.pop()
        kept.data = kept.data.to(self.weight.device, self.weight.dtype)
        self.weight = kept
        self.merged = False

    def to_linear(self, merge: bool = True) -> nn.Linear:
        """Return an nn.Linear in this layer's place: with the merged weight, or with the original Parameter
        objects (merge=False).
        """
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        if merge:
            linear.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        else:
            self.unmerge()
            linear.weight = self.weight
        linear.bias = self.bias
        for hooks in _HOOKS:
            setattr(linear, hooks, getattr(self, hooks))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer in print(model)."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, scaling={self.scaling:g}"
        )
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
                f"{prefix.rstrip('.') or 'this layer'} is merged, its weight is not the base weight: call "
                "unmerge() before saving"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if self.merged:
            raise RuntimeError(
                f"{prefix.rstrip('.') or 'this layer'} is merged: call unmerge() before loading a state"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def check_adapter_options(
    r: int, lora_alpha: float, lora_dropout: float, init_lora_weights: bool | str
) -> None:
    """Raise ValueError for an adapter option out of its range, naming it."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r must be an integer of at least 1, got {r!r}")
    if not _is_real(lora_alpha) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be finite, got {lora_alpha!r}")
    if not _is_real(lora_dropout) or not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout!r}")
    # By type as well: 1 equals True.
    if not isinstance(init_lora_weights, (bool, str)) or init_lora_weights not in INITIALISATIONS:
        raise ValueError(f"init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}")


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
