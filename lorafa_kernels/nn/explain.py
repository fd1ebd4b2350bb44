"""explain: which implementation a LoRA-FA layer runs with, in which steps, and why.

Nothing is decided here: plan/choice.py chooses implementation and plan, plan/config.py the block sizes.
A step is one kernel launch or matrix product of linear/fused.py, linear/library.py or linear/reference.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch

from ..base.reading import readable
from ..linear.library import SUMMED_IN_PLACE
from ..operands import FLOAT_DTYPES
from ..plan.choice import Choice, choose, choose_mixed, choose_plan, planned_device
from ..plan.config import DeviceLimits, KernelConfig
from ..plan.make import Plan
from ..plan.pin import pinned
from ..plan.recipe import Problem, describe, grad_makes_dz, kernel_configs, launches
from .adapters import LoRAFAAdapter
from .linear import LoRAFALinear
from .quantised import Quantised, dtype_of

Adapted = LoRAFALinear | LoRAFAAdapter
DEFAULT_M = 2048


class Step(NamedTuple):
    """One launch of a Triton kernel, or one call of PyTorch: its name, and what it computes."""

    call: str
    formula: str


@dataclass(frozen=True)
class Explanation:
    """What runs for x (M, K), weight (N, K) and rank R, and why. str() of it is a text to read, in ASCII.

    impl: "triton", "torch" or "reference"; "linear" for a layer whose adapter is merged or switched off.
    reason: why this implementation. device, dtype: those of x. forward, backward: the steps, in the order in
    which they run. dropout_p: the layer's dropout probability while it is in training mode, else 0.

    Only where impl is "triton" (else None and empty): limits, the properties of the device that block sizes
    depend on; plans, by operation ("forward", and "backward" or "backward_input"), each with the
    configuration of every kernel that it calls.
    """

    impl: str
    reason: str
    device: torch.device
    dtype: torch.dtype
    M: int
    N: int
    K: int
    R: int
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    limits: DeviceLimits | None = None
    plans: Mapping[str, Planned] = field(default_factory=dict, hash=False)
    dropout_p: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"M={self.M} N={self.N} K={self.K} R={self.R}, {_name(self.dtype)} on {self.device}",
            "symbols: " + (_SYMBOLS if self.impl != "linear" else _SYMBOLS_OF_LINEAR),
            f"implementation: {self.impl} ({self.reason})",
        ]
        if self.dropout_p:
            lines.append(
                f"dropout: p={self.dropout_p:g}; the mask keep is not stored: forward and backward make it "
                "from a seed of 8 bytes"
            )
        for title, steps in (("forward", self.forward), ("backward", self.backward)):
            lines.append(f"{title}:")
            lines += [f"  {number}. {_step_text(step)}" for number, step in enumerate(steps, 1)]
            for op, planned in self.plans.items():
                if op.startswith(title):
                    lines += [f"  {line}" for line in describe_plan(op, planned)]
        if any("PDL" in line for line in lines):
            lines.append("PDL: the product starts while the kernel before it still runs (dependent launch)")
        if any(one.plan.kernels.beside for one in self.plans.values()):
            lines.append(
                "dB beside dx: the kernel of dB, which nothing waits for, runs while that of dx does; in a "
                "group one for each member"
            )
        if self.limits is not None:
            lines.append(f"kernels: {describe_limits(self.limits)}")
        return "\n".join(lines).encode("ascii", "backslashreplace").decode("ascii")


@dataclass(frozen=True)
class Planned:
    """A plan, and the configuration of each kernel that it calls: the one in the plan, else the default."""

    plan: Plan
    configs: Mapping[str, KernelConfig] = field(hash=False)


_SYMBOLS = "x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R); s: scaling; dx, dB: gradients of x, lora_B"
_SYMBOLS_OF_LINEAR = "x (M, K), weight (N, K); dx: gradient of x"
# The calls that are Triton kernels; the others are PyTorch's.
_KERNELS = ("dequantise", "shrink", "shrink_sum", "expand", "expand_codes", "recompute", "grad", "grad_sum")
_KERNELS += ("mixed_shrink", "mixed_expand", "mixed_grad")
# Of a mixed batch, by mixed/fused.py.
_MIXED_LAUNCHES = {
    "forward": (
        Step("mixed_shrink", "z = s_i * (x @ lora_A_i.T), rows sorted by adapter"),
        Step("mixed_expand", "y = x @ weight.T + z @ lora_B_i.T + bias, rows sorted by adapter"),
    ),
    "dB": (Step("mixed_grad", "dB_i = dy.T @ z, the rows of each adapter in order"),),
    "dx": (
        Step("mixed_shrink", "dz = s_i * (dy @ lora_B_i), rows sorted by adapter"),
        Step("mixed_expand", "dx = dy @ weight + dz @ lora_A_i, rows sorted by adapter"),
    ),
}

_PRODUCTS = {
    "reference": {
        "forward": (
            Step("matmul", "z = s * (x @ lora_A.T), in fp32 or wider"),
            Step("matmul", "t = x @ weight.T, in fp32 or wider"),
            Step("matmul", "y = t + z @ lora_B.T + bias, in fp32 or wider"),
        ),
        "dx": (
            Step("matmul", "dz = s * (dy @ lora_B), in fp32 or wider"),
            Step("matmul", "t = dy @ weight, in fp32 or wider"),
            Step("matmul", "dx = t + dz @ lora_A, in fp32 or wider"),
        ),
        "dB": (Step("matmul", "dB = dy.T @ z, in fp32 or wider"),),
    },
    "linear": {
        "forward": (Step("linear", "y = x @ weight.T + bias"),),
        "dx": (Step("mm", "dx = dy @ weight"),),
    },
}


# Dropout: (formula without it, formula with it).
_WITH_DROPOUT = (
    ("s * (x @ lora_A.T)", "s/(1 - p) * ((x * keep) @ lora_A.T)"),
    ("dz @ lora_A", "keep/(1 - p) * (dz @ lora_A)"),
)


def explain(
    layer_or_shapes: LoRAFALinear | Sequence[int],
    *,
    M: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Explanation:
    """Say which implementation and plan runs for a layer or for shapes, and why.

    Args:
        layer_or_shapes: a LoRAFALinear, also one without data on the meta device; or (M, N, K, R): rows of x,
            out_features, in_features and rank.
        M: for a layer, the rows of x (the product of its leading dimensions). Default: 2048.
        device: where x is. Default: the layer's; for shapes a GPU if there is one, else the CPU.
        dtype: dtype of x, under autocast that of autocast. Default: that of the layer's weight; for shapes
            bf16 on a GPU and fp32 elsewhere.
        impl: "auto", "triton", "torch" or "reference". Default: the layer's; "auto" for shapes.

    The steps are those of the layer by itself; of one with several adapters those of the active one, and
    within adapter_index those of a mixed batch, with R the largest rank. Inside a block that apply_lorafa
    fused (`blocks` of its report) the block's own steps run instead. Dropout is included while the layer is
    in training mode. Backward is for the gradients of x and lora_B, or of x alone if the layer's lora_B is
    frozen; a model's first layer, whose x needs no gradient, runs fewer steps.

    Raises:
        TypeError: neither a LoRAFALinear nor shapes; a size that is no integer; M together with shapes; a
            dtype that is not fp32, bf16, fp16 or fp64.
        ValueError: not four sizes, or one out of range; an unknown impl; a device that is not there.
        RuntimeError: impl="triton" where it cannot run; the layer's forward raises the same.
    """
    layer = layer_or_shapes if isinstance(layer_or_shapes, LoRAFALinear) else None
    adapters: list[Adapted] = []
    if layer is not None:
        adapters = _adapters(layer)
        R = max((adapter.r for adapter in adapters), default=layer.r)
        sizes = (DEFAULT_M if M is None else M, layer.out_features, layer.in_features, R)
        device = layer.weight.device if device is None else device
        dtype = _dtype_of(layer) if dtype is None else dtype
        impl = layer.impl if impl is None else impl
    else:
        sizes = _sizes_of(layer_or_shapes)
        if M is not None:
            raise TypeError(f"M={M!r} with shapes {sizes}, whose first entry is M: pass M with a layer only")
        impl = "auto" if impl is None else impl
    _check_sizes(*sizes)
    device = _device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype is {dtype!r}, expected one of {', '.join(map(str, FLOAT_DTYPES))}")
    frozen_B = bool(adapters) and not any(adapter.lora_B.requires_grad for adapter in adapters)
    ops = ("forward", "backward_input" if frozen_B else "backward")
    asked = impl
    impl, reason = _implementation(layer, asked, device, dtype, ops)
    dropout_p = 0.0
    if layer is not None and layer.training and impl != "linear":
        dropout_p = max(adapter.lora_dropout for adapter in adapters)
    M, N, K, R = sizes
    if layer is not None and impl != "linear" and layer.mixes():
        steps = _for_layer(layer, dtype, asked, *_mixed_steps(asked, device, dtype, frozen_B))
        limits = planned_device(device).limits if impl == "triton" else None
        return Explanation(impl, reason, device, dtype, *sizes, *steps, limits, dropout_p=dropout_p)
    library = _library_products(device, dtype, N, K, R, dropout_p > 0)
    products = _PRODUCTS.get(impl, library)
    steps = {"forward": products["forward"], "backward_input": products["dx"]}
    steps["backward"] = products["dx"] + products.get("dB", ())
    limits, plans = None, {}
    if impl == "triton":
        limits = planned_device(device).limits
        bias = layer is None or layer.bias is not None
        codes = readable(layer.base(), dtype) if isinstance(layer, Quantised) else ""
        for op in ops:
            forward = op == "forward"
            of_codes = codes if forward else ""
            problem = Problem(op, dtype, M, N, K, R, bias and forward, dropout_p > 0, codes=of_codes)
            if planned := _planned(asked, problem, device, limits):
                plans[op] = planned
                steps[op] = _plan_steps(planned.plan, problem, limits, library)
    forward, backward = (steps[op] for op in ops)
    if dropout_p:
        forward, backward = (tuple(_with_dropout(step) for step in steps) for steps in (forward, backward))
    forward, backward = _for_layer(layer, dtype, asked, forward, backward)
    return Explanation(impl, reason, device, dtype, *sizes, forward, backward, limits, plans, dropout_p)


def _adapters(layer: LoRAFALinear) -> list[Adapted]:
    """The adapters of a layer that act: the active one, or those of a mixed batch, without what it lacks."""
    names = layer.acting.mixture[1] if layer.mixes() else [None]
    found = [layer.adapter(name) for name in names]
    return [adapter for adapter in found if adapter is not None]


def describe_plan(op: str, planned: Planned) -> list[str]:
    """Describe in lines an operation's plan, its source, the predicted times and the block sizes."""
    plan = planned.plan
    lines = [
        f"plan: {describe(plan.recipe, op)}",
        f"source: {plan.source} ({plan.reason})",
    ]
    if plan.predicted:
        times = "; ".join(f"{name} {us:.1f} us" for name, us in plan.predicted)
        lines.append(f"predicted: {times}")
    if plan.main_loop:
        share, words = plan.main_loop
        lines.append(f"expand's main loop: at {share:.2f} of the library's rate ({words})")
    lines += [f"{name} blocks: {_describe_config(config)}" for name, config in planned.configs.items()]
    return lines


def describe_limits(limits: DeviceLimits) -> str:
    """Say in words which default block sizes the kernels take on a device."""
    if limits.family == "interpreter":
        return "default block sizes of Triton's interpreter"
    return (
        f"default block sizes of {limits.family} ({limits.arch}, {limits.shared_memory // 1024} KiB of "
        f"shared memory per block, {limits.num_sms} multiprocessors)"
    )


def _step_text(step: Step) -> str:
    return f"{step.call}{' (Triton)' if step.call in _KERNELS else ''}: {step.formula}"


def _implementation(
    layer: LoRAFALinear | None,
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    ops: tuple[str, str],
) -> tuple[str, str]:
    if layer is not None and layer.merged:
        return "linear", "the adapter is merged into the weight: call unmerge() before training"
    if layer is not None and not layer.adapter_enabled:
        return "linear", "the adapter is switched off: adapter_enabled is False"
    if layer is not None and not _adapters(layer):
        return "linear", f"the layer has no adapter {layer.acting.name!r}, which is active"
    if layer is not None and layer.mixes():
        choice = _mixed_choice(impl, device, dtype)
        return choice.impl, choice.reason
    # Where one operation is pinned to the Triton kernels, "triton" is the layer's implementation.
    choices = [choose(impl, device, dtype, _pinned_kernels(impl, op)) for op in ops]
    choice = next((one for one in choices if one.impl == "triton"), choices[0])
    if device.type == "meta":
        return choice.impl, f"{choice.reason}; pass device= to see what runs on another device"
    return choice.impl, choice.reason


def _mixed_choice(impl: str, device: torch.device, dtype: torch.dtype, op: str | None = None) -> Choice:
    """Of an operation of a mixed batch, or of the first that is "triton", if one is."""
    pin = pinned() if impl == "auto" else None
    ops = ("forward", "backward") if op is None else (op,)
    choices = [choose_mixed(impl, one, device, dtype, pin) for one in ops]
    return next((one for one in choices if one.impl == "triton"), choices[0])


def _planned(impl: str, problem: Problem, device: torch.device, limits: DeviceLimits) -> Planned | None:
    """The plan of an operation, or None where it runs without one."""
    p = problem
    if choose(impl, device, p.dtype, _pinned_kernels(impl, p.op)).impl != "triton":
        return None
    plan = choose_plan(
        impl, p.op, device, p.dtype, p.M, p.N, p.K, p.R, p.bias, p.dropout, pinned(), codes=p.codes
    )
    return Planned(plan, kernel_configs(plan.recipe, replace(p, M=max(1, p.M)), limits))


def _pinned_kernels(impl: str, op: str) -> bool:
    pin = pinned() if impl in ("auto", "triton") else None
    return pin is not None and pin.needs_kernels(op)


def _library_products(
    device: torch.device, dtype: torch.dtype, N: int, K: int, R: int, dropout: bool
) -> dict[str, tuple[Step, ...]]:
    """The products of linear/library.py, in its order."""
    in_place = device.type == "cpu" and dtype in SUMMED_IN_PLACE
    scaled = "addmm" if device.type == "cpu" else "addmm_"
    y = Step("linear", "y = z @ lora_B.T + bias"), Step("addmm_", "y += x @ weight.T")
    if in_place and R <= K:
        y = Step("linear", "y = x @ weight.T + bias"), Step("addmm_", "y += z @ lora_B.T")
    dx = Step("mm", "dx = dz @ lora_A"), Step("addmm_", "dx += dy @ weight")
    if dropout:
        dx = Step("mm", "dx = dy @ weight"), Step("mm", "dx += dz @ lora_A, a chunk of rows at a time")
    elif in_place and R <= N:
        dx = Step("mm", "dx = dy @ weight"), Step("addmm_", "dx += dz @ lora_A")
    return {
        "forward": (Step("addmm_" if dropout else scaled, "z = s * (x @ lora_A.T)"), *y),
        "dx": (Step(scaled, "dz = s * (dy @ lora_B)"), *dx),
        "dB": (Step("mm", "dB = dy.T @ z"),),
    }


def _mixed_steps(
    impl: str, device: torch.device, dtype: torch.dtype, frozen_B: bool
) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """The steps of forward and of backward of a mixed batch."""
    products = _mixed_products(device, dtype)
    forward, backward = (
        _MIXED_LAUNCHES if _mixed_choice(impl, device, dtype, op).impl == "triton" else products
        for op in ("forward", "backward")
    )
    # The order of each: dB comes first of the kernels, and last of the products.
    names = ("dB", "dx") if backward is _MIXED_LAUNCHES else ("dx", "dB")
    return forward["forward"], tuple(
        step for name in names if name == "dx" or not frozen_B for step in backward[name]
    )


def _mixed_products(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Step, ...]]:
    """The products of mixed/library.py, in its order; i is the adapter of a row."""
    own, all_rows = "on the rows of each adapter", "for all rows at once where lora_A is shared"
    if device.type == "cpu" and dtype in SUMMED_IN_PLACE:
        y = Step("linear", "y = x @ weight.T + bias"), Step("addmm_", f"y += z @ lora_B_i.T, {own}")
        dx = Step("mm", "dx = dy @ weight"), Step("addmm_", f"dx += dz @ lora_A_i, {all_rows}")
    else:
        y = Step("linear", f"y = z @ lora_B_i.T + bias, {own}"), Step("addmm_", "y += x @ weight.T")
        dx = Step("mm", f"dx = dz @ lora_A_i, {all_rows}"), Step("addmm_", "dx += dy @ weight")
    return {
        "forward": (Step("mm", f"z = s_i * (x @ lora_A_i.T), {all_rows}"), *y),
        "dx": (Step("mm", f"dz = s_i * (dy @ lora_B_i), {own}"), *dx),
        "dB": (Step("mm", f"dB_i = dy.T @ z, {own}"),),
    }


def _plan_steps(
    plan: Plan, problem: Problem, limits: DeviceLimits, products: dict[str, tuple[Step, ...]]
) -> tuple[Step, ...]:
    """The steps of a plan: of the kernels' launches in order, or of the library's products."""
    if plan.name == "library" and problem.op == "forward":
        return products["forward"]
    if plan.name == "library" and not (problem.op == "backward" and plan.kernels.one_pass):
        return products["dx"] + (products["dB"] if problem.op == "backward" else ())
    problem = replace(problem, M=max(1, problem.M))
    names = launches(plan.recipe, problem, limits)
    configs = kernel_configs(plan.recipe, problem, limits)
    forward = problem.op == "forward"
    both = grad_makes_dz(problem, configs)
    made = {
        "shrink": "z = s * (x @ lora_A.T)" if forward else "dz = s * (dy @ lora_B)",
        "shrink_sum": f"{'z' if forward else 'dz'} = sum of the parts that shrink made, in a fixed order",
        "expand": "y = x @ weight.T + z @ lora_B.T + bias" if forward else "dx = dy @ weight + dz @ lora_A",
        "expand_codes": f"y = x @ weight.T + z @ lora_B.T + bias, weight from {problem.codes} in the product",
        "recompute": "y = x @ weight.T + z @ lora_B.T + bias and z = s * (x @ lora_A.T)"
        if forward
        else "dx = dy @ weight + dz @ lora_A, where dz = s * (dy @ lora_B)",
        "grad": "partial sums of dz = s * (dy @ lora_B) and dB = dy.T @ z; reads dy once"
        if both
        else "dB = dy.T @ z",
        "grad_sum": f"{'dz and dB' if both else 'dB'} = sums of the parts that grad made, in a fixed order",
    }
    steps = tuple(Step(name, made[name]) for name in names)
    return steps + products["dx"][1:] if plan.name == "library" else steps


def _for_layer(
    layer: LoRAFALinear | None,
    dtype: torch.dtype,
    impl: str,
    forward: tuple[Step, ...],
    backward: tuple[Step, ...],
) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Adapt the steps to a layer without a bias, with a weight in another dtype than x, or whose dB is
    corrected.
    """
    if layer is not None and layer.bias is None:
        forward = tuple(Step(call, formula.replace(" + bias", "")) for call, formula in forward)
    if isinstance(layer, Quantised):
        by = "dequantise" if layer.base().by_kernel(dtype, impl) else "plain PyTorch"
        made = Step(by, f"weight from {layer.quantised_kind} to {_name(dtype)}, into a temporary")
        reads = any(step.call == "expand_codes" for step in forward)
        forward, backward = forward if reads else (made, *forward), (made, *backward)
    elif layer is not None and layer.weight.dtype != dtype:
        cast = Step("cast", f"weight from {_name(layer.weight.dtype)} to {_name(dtype)}, into a temporary")
        forward, backward = (cast, *forward), (cast, *backward)
    corrected = layer is not None and any(adapter.gradient_correction for adapter in _adapters(layer))
    if corrected and any(step.formula.startswith("dB") for step in backward):
        backward = (
            *backward,
            Step("addmm_", "dB = dB @ inverse(lora_A @ lora_A.T) / s^2, the inverse made once"),
        )
    return forward, backward


def _dtype_of(layer: LoRAFALinear) -> torch.dtype:
    """What a layer computes in outside of autocast."""
    return getattr(layer, "compute_dtype", None) or dtype_of(layer)


def _with_dropout(step: Step) -> Step:
    formula = step.formula
    for without, with_dropout in _WITH_DROPOUT:
        formula = formula.replace(without, with_dropout)
    return Step(step.call, formula)


def _sizes_of(shapes: object) -> tuple[int, int, int, int]:
    if not isinstance(shapes, (tuple, list)):
        raise TypeError(
            f"expected a LoRAFALinear or the sizes (M, N, K, R), got {type(shapes).__name__}. For a model, "
            "pass one of its LoRAFALinear layers"
        )
    if len(shapes) != 4:
        raise ValueError(f"got {len(shapes)} sizes {tuple(shapes)}, expected four: (M, N, K, R)")
    return tuple(shapes)


def _check_sizes(M: int, N: int, K: int, R: int) -> None:
    for name, size, least in (("M", M, 0), ("N", N, 0), ("K", K, 0), ("R", R, 1)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} is {size!r}, expected an integer")
        if size < least:
            raise ValueError(f"{name} is {size}, expected at least {least}")


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected one such as 'cpu' or 'cuda:0'") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device {device} is not there: torch sees {count} GPUs")
    return device


def _describe_config(config: KernelConfig) -> str:
    values = ((item, getattr(config, item.name)) for item in fields(config))
    return " ".join(f"{item.name}={value}" for item, value in values if value and value != item.default)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
