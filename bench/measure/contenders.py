"""Who is measured: this library and everything that one would use instead, under names that every table
carries.

A contender is built on given operands and yields y = module(x); autograd gives dx, and the gradients of what
it trains.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafa_kernels import LoRAFALinear
from lorafa_kernels.base.bnb import to_params4bit
from lorafa_kernels.base.frozen import quantised
from lorafa_kernels.checks.budget import Operands
from lorafa_kernels.nn.quantised import LoRAFAQuantisedLinear, QuantisedLinear
from lorafa_kernels.plan.choice import triton_obstacle

from .cases import DTYPES, Case, unknown

# The mask_dtype of a mask that is made from a seed (philox.py).
SEEDED = "seed"


@dataclass
class Layer:
    """y (M, N) = module(x), x (M, K); lora_B (N, R) and lora_A (R, K) if it trains them."""

    module: Callable[[Tensor], Tensor]
    lora_B: Tensor | None = None
    lora_A: Tensor | None = None


def adamw(adapted: nn.Module, rank: int, lr: float) -> torch.optim.Optimizer | None:
    """Return AdamW on what is trained, or None if nothing is."""
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0) if trained else None


# Where a contender of models.py has a row: memory of a block, docs/memory.md, blocks.py, training.
SCOPES = ("block", "family", "time", "training")


@dataclass(frozen=True)
class Contender:
    """Who is measured, on a layer or on a model.

    build: of a layer, (operands, case) -> Layer; of a model (models.py), (model, linears, rank) -> what
    optimizer(…, rank, lr) takes, the model adapted in place. needs: packages. needs_gpu: whether its kernels
    run on nothing else. triton: whether they are this library's. adapted: whether there is an adapter at all.
    compiled: by torch.compile. without_dropout: why it has none. mask_dtype: of the tensor on which it calls
    torch's dropout, that of x ("dtype") or of lora_B ("adapter"), or SEEDED. scopes: where a
    contender of models has a row. base: the kind of quantised weight that a layer has, whose values are what
    it is held against.
    """

    key: str
    title: str
    build: Callable
    needs: tuple[str, ...] = ()
    needs_gpu: bool = False
    triton: bool = False
    adapted: bool = True
    compiled: bool = False
    without_dropout: str = ""
    mask_dtype: str = "dtype"
    scopes: tuple[str, ...] = SCOPES
    base: str = ""
    optimizer: Callable[[nn.Module, int, float], torch.optim.Optimizer | None] = adamw

    def obstacle(self, device: str, case: Case | None = None) -> str | None:
        """Say what keeps it from running there, a layer's on this case, or None if nothing does."""
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if self.needs_gpu and device != "cuda":
            return "its kernels need a GPU"
        if self.triton and device == "cpu":
            return "needs a GPU: on a CPU the kernels run in Triton's interpreter, whose times mean nothing"
        if self.triton:
            return triton_obstacle(torch.device(device), DTYPES[case.dtype])
        if case and case.dropout and self.without_dropout:
            return self.without_dropout
        if self.compiled and not torch._dynamo.is_dynamo_supported():
            return "torch.compile does not support this Python"
        if self.compiled and device == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
            return "torch.compile needs a C++ compiler on a CPU"
        return None


def frozen_linear(operands: Operands) -> nn.Linear:
    """Return an nn.Linear around the operands' weight (N, K) and bias, which need no gradient."""
    N, K = operands.weight.shape
    linear = nn.Linear(K, N, bias=operands.bias is not None, device="meta")
    linear.weight = nn.Parameter(operands.weight, requires_grad=False)
    if operands.bias is not None:
        linear.bias = nn.Parameter(operands.bias, requires_grad=False)
    return linear


def _factor(operands: Operands, name: str, case: Case, trained: bool) -> Tensor:
    # A copy: contenders share the base and the input, and nothing else.
    return getattr(operands, name).to(DTYPES[case.adapter if trained else case.dtype], copy=True)


def build_lorafa(operands: Operands, case: Case, impl: str = "auto") -> Layer:
    layer = LoRAFALinear.from_linear(
        frozen_linear(operands),
        r=case.R,
        lora_alpha=case.R * operands.scaling,
        lora_dropout=case.dropout,
        adapter_dtype=DTYPES[case.adapter],
    )
    layer.impl = impl
    with torch.no_grad():
        layer.lora_A.copy_(operands.lora_A)
        layer.lora_B.copy_(operands.lora_B)
    return Layer(layer, layer.lora_B)


def build_lorafa_nf4(operands: Operands, case: Case) -> Layer:
    layer = LoRAFAQuantisedLinear.from_linear(
        QuantisedLinear.from_linear(frozen_linear(operands), "nf4"),
        r=case.R,
        lora_alpha=case.R * operands.scaling,
        lora_dropout=case.dropout,
        adapter_dtype=DTYPES[case.adapter],
    )
    with torch.no_grad():
        layer.lora_A.copy_(operands.lora_A)
        layer.lora_B.copy_(operands.lora_B)
    return Layer(layer, layer.lora_B)


class EagerLoRA(nn.Module):
    """The formula around an nn.Linear as people write it, with lora_A trained or frozen (LoRA-FA). With A
    frozen and no dropout autograd keeps x Aᵀ and not x.
    """

    def __init__(
        self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float, train_A: bool, dropout=0.0
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(lora_A, requires_grad=train_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    @property
    def weight(self) -> nn.Parameter:
        # T5's MLP asks its last layer for the dtype.
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(self.dropout(x), self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return self.base(x) + self.scaling * low_rank


def build_eager(operands: Operands, case: Case, train_A: bool = False) -> Layer:
    factors = (_factor(operands, "lora_A", case, train_A), _factor(operands, "lora_B", case, True))
    module = EagerLoRA(frozen_linear(operands), *factors, operands.scaling, train_A, case.dropout)
    return Layer(module, module.lora_B, module.lora_A if train_A else None)


def build_compiled(operands: Operands, case: Case) -> Layer:
    layer = build_eager(operands, case)
    torch._dynamo.reset()
    return Layer(torch.compile(layer.module, dynamic=False), layer.lora_B)


class _ProductThenAdd(torch.autograd.Function):
    """y = x weightᵀ + bias, then y += s z lora_Bᵀ in place, and likewise for dx: the arrangement of Unsloth,
    with A frozen.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, scaling):
        factor = lora_B.to(x.dtype)
        z = F.linear(x, lora_A)
        y = F.linear(x, weight, bias).addmm_(z, factor.t(), alpha=scaling)
        ctx.save_for_backward(z, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        z, weight, lora_A, lora_B = ctx.saved_tensors
        dB = torch.empty_like(lora_B, dtype=dy.dtype).addmm_(dy.t(), z, beta=0, alpha=ctx.scaling)
        dx = dy.mm(weight).addmm_(dy.mm(lora_B.to(dy.dtype)), lora_A, alpha=ctx.scaling)
        return dx, None, None, dB.to(lora_B.dtype), None, None


class ProductThenAdd(nn.Module):
    """A module, as what it is compared with."""

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(lora_A, requires_grad=False)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        base = self.base
        return _ProductThenAdd.apply(x, base.weight, self.lora_A, self.lora_B, base.bias, self.scaling)


def build_addmm(operands: Operands, case: Case) -> Layer:
    factors = (_factor(operands, "lora_A", case, False), _factor(operands, "lora_B", case, True))
    module = ProductThenAdd(frozen_linear(operands), *factors, operands.scaling)
    return Layer(module, module.lora_B)


def linear4bit(operands: Operands) -> nn.Module:
    """Return bitsandbytes' Linear4bit with the codes of this library's NF4."""
    from bitsandbytes.nn import Linear4bit

    dense = frozen_linear(operands)
    layer = Linear4bit(dense.in_features, dense.out_features, bias=False, device="meta", quant_type="nf4")
    layer.weight = to_params4bit(quantised(operands.weight, "nf4"), layer)
    layer.quant_state, layer.bias = layer.weight.quant_state, dense.bias
    layer.compute_dtype, layer.compute_type_is_set = operands.weight.dtype, True
    return layer


def build_peft(operands: Operands, case: Case, train_A: bool = False, nf4: bool = False) -> Layer:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=case.R, lora_alpha=case.R * operands.scaling, lora_dropout=case.dropout, target_modules=["proj"]
    )
    base = nn.Sequential()
    base.add_module("proj", linear4bit(operands) if nf4 else frozen_linear(operands))
    base.is_loaded_in_4bit = nf4
    # True makes 16-bit adapters fp32, and is PEFT's default.
    get_peft_model(base, config, autocast_adapter_dtype=case.adapter != case.dtype)
    layer = base.proj
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    lora_A.requires_grad_(train_A)
    with torch.no_grad():
        lora_A.copy_(operands.lora_A)
        lora_B.copy_(operands.lora_B)
    return Layer(layer, lora_B, lora_A if train_A else None)


FROZEN, LORAFA = "frozen", "lorafa"
NO_DROPOUT = "this arrangement has no dropout"
NOT_DRAWN_AGAIN = "its dropout mask cannot be drawn again, so its values cannot be checked"
_OURS = {"mask_dtype": SEEDED}
_PEFT = {"needs": ("peft",), "mask_dtype": "adapter"}
_ALL = (
    Contender(FROZEN, "frozen nn.Linear", lambda o, case: Layer(frozen_linear(o)), adapted=False),
    Contender(LORAFA, "lorafa_kernels", build_lorafa, **_OURS),
    Contender("triton", "lorafa_kernels, Triton", partial(build_lorafa, impl="triton"), triton=True, **_OURS),
    Contender(
        "library", "lorafa_kernels, library products (d′)", partial(build_lorafa, impl="torch"), **_OURS
    ),
    Contender("eager-lorafa", "eager LoRA-FA", build_eager),
    Contender("eager-lora", "eager LoRA", partial(build_eager, train_A=True)),
    Contender("addmm", "product, then addmm_ (as Unsloth)", build_addmm, without_dropout=NO_DROPOUT),
    Contender(
        "compiled-lorafa",
        "torch.compile of eager LoRA-FA",
        build_compiled,
        compiled=True,
        without_dropout=NOT_DRAWN_AGAIN,
    ),
    Contender("peft-lorafa", "PEFT, A frozen", build_peft, **_PEFT),
    Contender("peft-lora", "PEFT LoRA", partial(build_peft, train_A=True), **_PEFT),
)
CONTENDERS = {contender.key: contender for contender in _ALL}
# Measured where they are named: their weight is another one than that of the others.
_ON_NF4 = (
    Contender("lorafa-nf4", "lorafa_kernels on NF4", build_lorafa_nf4, base="nf4", **_OURS),
    Contender(
        "peft-nf4",
        "PEFT on bitsandbytes' NF4, A frozen",
        partial(build_peft, nf4=True),
        base="nf4",
        needs=("peft", "bitsandbytes"),
        mask_dtype="adapter",
    ),
)
BY_NAME = {contender.key: contender for contender in _ON_NF4}
TITLES = {contender.key: contender.title for contender in (*_ALL, *_ON_NF4)}
# Rows of these get a ratio to every other contender, the others one to the frozen linear.
OURS = (LORAFA, "triton", "library")


def layer_contenders(keys: Iterable[str] | None = None) -> dict[str, Contender]:
    """Return the contenders of these keys; by default all but those of BY_NAME. Raises ValueError for an
    unknown key, listing the known ones.
    """
    if keys is None:
        return dict(CONTENDERS)
    known = CONTENDERS | BY_NAME
    for key in keys:
        if key not in known:
            raise unknown("contender", key, known)
    return {key: known[key] for key in known if key in keys}


def gradients(layer: Layer, y: Tensor, operands: Operands, keep_graph: bool = False) -> tuple[Tensor, ...]:
    """Return dx (M, K), then dB (N, R) and dA (R, K) where the layer trains them."""
    trained = [factor for factor in (layer.lora_B, layer.lora_A) if factor is not None]
    return torch.autograd.grad(y, (operands.x, *trained), operands.dy, retain_graph=keep_graph)


def compute(layer: Layer, operands: Operands) -> dict[str, Tensor]:
    """Return y, dx, and dB and dA where the layer trains them."""
    y = layer.module(operands.x)
    return dict(zip(("y", "dx", "dB", "dA"), (y.detach(), *gradients(layer, y, operands)), strict=False))
