"""Which implementation runs, and why: the one place that decides it.

The rule of impl="auto": "triton" for fp32, bf16 and fp16 tensors on a GPU that Triton supports (NVIDIA from
sm_80 on, AMD), else "torch". An implementation asked for by name runs or raises; it is never replaced by
another.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

IMPLEMENTATIONS = ("triton", "torch", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and the reason in words."""

    impl: str
    reason: str


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is "auto" or an implementation's name."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        names = ", ".join(repr(name) for name in ("auto", *IMPLEMENTATIONS))
        raise ValueError(f"impl={impl!r} is not known: expected one of {names}")


@functools.lru_cache(maxsize=256)
def choose(impl: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Decide which implementation runs for x of `dtype` on `device`.

    Raises ValueError for an unknown `impl`, and RuntimeError that says what is missing where impl="triton"
    cannot run.
    """
    check_impl(impl)
    if impl in ("torch", "reference"):
        return Choice(impl, "asked for by name")
    if impl == "triton":
        if obstacle := triton_obstacle(device, dtype):
            raise RuntimeError(f'impl="triton" cannot run: {obstacle}')
        return Choice("triton", "asked for by name")
    if device.type == "cpu":
        return Choice("torch", "x is on the CPU, where Triton kernels only run under its interpreter")
    if obstacle := triton_obstacle(device, dtype):
        return Choice("torch", obstacle)
    return Choice("triton", f"Triton supports {_device_name(device)}")


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what keeps the Triton kernels from running for this device and dtype, or None if nothing does."""
    try:
        import triton
    except Exception as error:  # a broken installation raises more than ImportError
        return (
            f"triton is not installed or cannot be imported ({error}): pip install 'lorafa-kernels[triton]'"
        )
    if not hasattr(triton, "knobs"):
        return f"triton {getattr(triton, '__version__', '')} is too old, the kernels need 3.6"
    if dtype not in KERNEL_DTYPES:
        return f"the kernels compute in fp32, bf16 and fp16, not {dtype}"
    if device.type == "cpu":
        if triton.knobs.runtime.interpret:
            return None
        return (
            "x is on the CPU and Triton's interpreter is off (set TRITON_INTERPRET=1 before the first import)"
        )
    if device.type != "cuda":
        return f"the kernels run on NVIDIA and AMD GPUs, not on {device.type} devices"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{_device_name(device)} has compute capability {major}.{minor}, the kernels need 8.0"
    return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
