"""Which implementation and plan run, and why: the one place that decides it.

The rule of impl="auto": "triton" for fp32, bf16 and fp16 tensors on a GPU that Triton supports (NVIDIA from
sm_80 on, AMD), else "torch". There each operation runs with the plan that plan/make.py gives it: the fused
kernels, or the library's products where those are faster. An implementation asked for by name runs or raises;
it is never replaced by another: impl="triton" takes plans of the fused kernels alone.

In a mixed batch "auto" is "torch" on every device: its kernels were never timed on a GPU. impl="triton" and a
pinned plan "fused" take them.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass

import torch

from .config import KernelConfig
from .kernels import MixedConfigs, mixed_configs
from .make import Plan, config_of_frozen, make_plan
from .pin import Pin, forget_environment, pinned
from .recipe import NAMES, Device, Problem
from .tables import forget

IMPLEMENTATIONS = ("triton", "torch", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
UNTIMED = (
    "rows take several adapters, and the Triton kernels for that were never timed on a GPU: "
    'impl="triton" takes them'
)


@dataclass(frozen=True)
class Decision:
    """The implementation that runs an operation and, of the Triton kernels, the plan; None where the sizes
    are not known.
    """

    impl: str
    plan: Plan | None = None

    @property
    def takes_kernels(self) -> bool:
        """Whether a Triton kernel is launched."""
        plan = self.plan
        return plan is not None and (plan.name == "fused" or plan.takes_grad_kernel)


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and the reason in words."""

    impl: str
    reason: str

    @functools.cached_property
    def without_plan(self) -> Decision:
        return Decision(self.impl)


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is "auto" or an implementation's name."""
    if not isinstance(impl, str) or (impl != "auto" and impl not in IMPLEMENTATIONS):
        names = ", ".join(repr(name) for name in ("auto", *IMPLEMENTATIONS))
        raise ValueError(f"impl={impl!r} is not known: expected one of {names}")


@functools.lru_cache(maxsize=256)
def choose(impl: str, device: torch.device, dtype: torch.dtype, pinned_kernels: bool = False) -> Choice:
    """Decide which implementation runs for x of `dtype` on `device`.

    pinned_kernels: a plan that needs the Triton kernels is pinned for the operation. It concerns impl="auto"
    alone. Raises ValueError for an unknown `impl`, and RuntimeError that says what is missing where
    impl="triton" or the pinned kernels cannot run.
    """
    check_impl(impl)
    if impl in ("torch", "reference"):
        return Choice(impl, f'asked for: impl="{impl}"')
    if impl == "triton":
        if obstacle := triton_obstacle(device, dtype):
            raise RuntimeError(f'impl="triton" cannot run: {obstacle}')
        return Choice("triton", 'asked for: impl="triton"')
    if pinned_kernels:
        if obstacle := triton_obstacle(device, dtype):
            raise RuntimeError(f"the pinned plan cannot run: {obstacle}")
        return Choice("triton", "the pinned plan needs the Triton kernels")
    if device.type == "cpu":
        return Choice("torch", 'x is on the CPU, and impl="auto" takes the Triton kernels on a GPU only')
    if obstacle := triton_obstacle(device, dtype):
        return Choice("torch", obstacle)
    return Choice("triton", f"Triton supports {_device_name(device)}")


def choose_mixed(impl: str, op: str, device: torch.device, dtype: torch.dtype, pin: Pin | None) -> Choice:
    """Decide which implementation runs for operation `op` of a mixed batch. Raises as choose()."""
    pinned_kernels = impl == "auto" and pin is not None and pin.name_for(op) == "fused"
    if impl == "auto" and not pinned_kernels:
        return Choice("torch", UNTIMED)
    return choose(impl, device, dtype, pinned_kernels)


@functools.lru_cache(maxsize=4096)
def plan_mixed(
    op: str, device: torch.device, dtype: torch.dtype, N: int, K: int, R: int, dropout: bool
) -> MixedConfigs:
    """Return the configurations of the kernels where choose_mixed() gives "triton"; sizes as in Problem, R
    the largest rank.
    """
    problem = Problem(op, dtype, 1, N, K, R, dropout=dropout)
    return mixed_configs(problem, planned_device(device).limits)


def choose_plan(
    impl: str,
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    R: int,
    bias: bool,
    dropout: bool = False,
    pin: Pin | None = None,
    widths: tuple[int, ...] = (),
    makers: int = 1,
    codes: str = "",
) -> Plan:
    """Decide with which plan operation `op` runs where choose() gives "triton"; sizes and what follows them
    as in Problem.

    M is rounded to 16 steps an octave first, so that rows of ever new number find their plan made. Raises
    RuntimeError, saying what is missing, for a pinned plan that cannot run.
    """
    shift = max(0, M.bit_length() - 5)
    rounded = ((M + (1 << shift) - 1) >> shift) << shift
    return _plan(impl, op, device, dtype, rounded, N, K, R, bias, dropout, pin, widths, makers, codes)


def choose_frozen(
    device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, bias: bool, codes: str
) -> KernelConfig | None:
    """Decide how a layer without an adapter computes y on a quantised base of kind `codes`: by the kernel
    that reads codes, in this configuration, or None. Sizes as in Problem.
    """
    pin = pinned()
    recipe = pin.recipe("forward") if pin is not None else None
    by_name = recipe is not None and recipe.kernels.expand is not None and recipe.kernels.expand.reads_codes
    if choose("auto", device, dtype, by_name).impl != "triton":
        return None
    return _frozen(device, dtype, M, N, K, bias, codes, pin)


@functools.lru_cache(maxsize=4096)
def _frozen(device, dtype, M, N, K, bias, codes, pin) -> KernelConfig | None:
    return config_of_frozen(
        Problem("forward", dtype, M, N, K, 0, bias, codes=codes), planned_device(device), pin
    )


def forget_plans() -> None:
    """Decide anew: after another table was written or the environment changed."""
    choose.cache_clear()
    _plan.cache_clear()
    plan_mixed.cache_clear()
    _frozen.cache_clear()
    planned_device.cache_clear()
    forget()
    forget_environment()


@functools.lru_cache(maxsize=4096)
def _plan(impl, op, device, dtype, M, N, K, R, bias, dropout, pin, widths, makers, codes) -> Plan:
    names = ("fused",) if impl == "triton" else NAMES
    problem = Problem(op, dtype, M, N, K, R, bias, dropout, widths, makers, codes)
    return make_plan(problem, planned_device(device), pin=pin, names=names)


@functools.lru_cache(maxsize=64)
def planned_device(device: torch.device) -> Device:
    """Return what plans depend on for a device on which the Triton kernels run. Imports Triton."""
    tile = importlib.import_module("..kernels.tile", __package__)
    version = importlib.import_module("triton").__version__
    name = "Triton's interpreter" if device.type == "cpu" else _device_name(device)
    return Device(name, tile.device_limits(device), version)


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what keeps the Triton kernels from running for this device and dtype, or None if nothing does."""
    try:
        import triton
    except Exception as error:  # a broken installation raises more than ImportError
        return (
            f"triton is not installed or cannot be imported ({error}): pip install 'lorafa-kernels[triton]'"
        )
    if not hasattr(triton, "knobs"):
        return f"triton {getattr(triton, '__version__', '')} is too old, the kernels need 3.6 or newer"
    if dtype not in KERNEL_DTYPES:
        return f"the kernels compute in fp32, bf16 and fp16, not {dtype}"
    if device.type == "cpu":
        if triton.knobs.runtime.interpret:
            return None
        return (
            "x is on the CPU and Triton's interpreter is off (set TRITON_INTERPRET=1 before importing triton)"
        )
    if device.type != "cuda":
        return f"the kernels run on NVIDIA and AMD GPUs, not on {device.type} devices"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{_device_name(device)} has compute capability {major}.{minor}, the kernels need 8.0 or newer"
    return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
