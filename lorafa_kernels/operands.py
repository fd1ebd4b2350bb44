"""What every operation asks of its operands, and what it makes of them before it calls an operator: checks,
autocast's casts, rows of a matrix, the seed of dropout.
"""

from __future__ import annotations

import math
import numbers
import sys

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Numbers reach the kernels as fp32.
LARGEST_NUMBER = torch.finfo(torch.float32).max
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
# For one type of device or more; asked for each call.
any_autocast = torch._C._is_any_autocast_enabled


def fit(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    gradient_correction: bool,
    columns: int | None = None,
) -> bool:
    """Whether the operands of one layer pass all checks of this module as they are, x needs no cast, and
    there is neither dropout nor a correction of the gradient, as nearly always.

    columns: those of what the layer reads, where that is made of x, in its dtype and on its device. What this
    does not vouch for goes through the checks one by one, which name what is wrong.
    """
    if not (
        type(x) in _PLAIN_TENSORS
        and type(weight) in _PLAIN_TENSORS
        and type(lora_A) in _PLAIN_TENSORS
        and type(lora_B) in _PLAIN_TENSORS
        and type(scaling) is float
        and type(dropout_p) is float
        and dropout_p == 0.0
        and gradient_correction is False
        and -LARGEST_NUMBER <= scaling <= LARGEST_NUMBER
    ):
        return False
    try:
        N, K = of_weight = weight.shape
        R, of_A = lora_A.shape
        if columns is None:
            columns = x.shape[-1]
        elif x.is_nested:
            return False
        if columns != K or of_A != K or R < 1 or lora_B.shape != (N, R):
            return False
    except (RuntimeError, ValueError, IndexError):
        # Of a nested tensor, which has no shape, and of one that has another number of dimensions.
        return False
    dtype, strided = x.dtype, torch.strided
    if bias is not None and not (
        type(bias) in _PLAIN_TENSORS
        and bias.dtype is dtype
        and bias.device == x.device
        and bias.layout is strided
        and not bias.requires_grad
        and bias.shape == of_weight[:1]
    ):
        return False
    return (
        dtype is weight.dtype is lora_A.dtype
        and dtype in FLOAT_DTYPES
        and (lora_B.dtype is dtype or lora_B.dtype is torch.float32)
        and (
            (x.is_cpu and weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu)
            or x.device == weight.device == lora_A.device == lora_B.device
        )
        and strided is x.layout is weight.layout is lora_A.layout is lora_B.layout
        and not (weight.requires_grad or lora_A.requires_grad or any_autocast())
    )


def check_tensors(
    x: Tensor, weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None
) -> None:
    """Raise TypeError, naming it, for an operand that is no dense tensor, or one that stands for others."""
    strided = torch.strided
    if (
        type(x) in _PLAIN_TENSORS
        and x.layout is strided
        and not x.is_nested
        and type(weight) in _PLAIN_TENSORS
        and weight.layout is strided
        and type(lora_A) in _PLAIN_TENSORS
        and lora_A.layout is strided
        and type(lora_B) in _PLAIN_TENSORS
        and lora_B.layout is strided
        and (bias is None or (type(bias) in _PLAIN_TENSORS and bias.layout is strided))
        and not (weight.is_nested or lora_A.is_nested or lora_B.is_nested)
    ):
        return
    check_tensor("x", x, frozen=False)
    check_tensor("weight", weight)
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if tensor is not None or name != "bias":
            check_tensor(name, tensor, frozen=name != "lora_B")


def check_tensor(name: str, tensor: Tensor, frozen: bool = True) -> None:
    """Raise TypeError, naming it, unless this is a dense tensor; a frozen one of no class that holds other
    tensors: those are quantised or sharded weights.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor: pad it, or pass the tensor of all its rows")
    if type(tensor) not in _PLAIN_TENSORS:
        distributed = sys.modules.get("torch.distributed.tensor")
        if distributed is not None and isinstance(tensor, distributed.DTensor):
            raise TypeError(
                f"{name} is a DTensor, of which this process holds a part: call the layer through the module "
                "that fully_shard wrapped, which gathers it (what is computed as one layer, a "
                "LoRAFALinearGroup or a gated MLP, must be wrapped as one). To split a layer over processes, "
                "use the styles of lorafa_kernels.integrations.parallel"
            )
        if frozen and hasattr(tensor, "__tensor_flatten__"):
            raise TypeError(
                f"{name} is a {type(tensor).__name__}, a tensor made of others (a quantised or sharded "
                "weight): these are not supported, pass a plain tensor"
            )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}, expected a dense tensor: {name}.to_dense()")


def check_shapes(
    x: Tensor, weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None
) -> None:
    """Raise ValueError, naming it and the shape expected, for an operand that does not fit, or lies on
    another device than x. lora_A and lora_B are both None for a layer without an adapter.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (..., {K}) for weight {tuple(weight.shape)}"
        )
    if lora_A is not None:
        if lora_A.dim() != 2 or lora_A.shape[1] != K or lora_A.shape[0] < 1:
            raise ValueError(f"lora_A has shape {tuple(lora_A.shape)}, expected (R, {K}) with R at least 1")
        R = lora_A.shape[0]
        if lora_B.shape != (N, R):
            raise ValueError(f"lora_B has shape {tuple(lora_B.shape)}, expected ({N}, {R})")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({N},)")
    device = x.device
    if (
        weight.device == device
        and (lora_A is None or lora_A.device == lora_B.device == device)
        and (bias is None or bias.device == device)
    ):
        return
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, x on {device}: all must be on one device")


def check_frozen(weight: Tensor, lora_A: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError, naming it, if one of the frozen operands requires grad."""
    if not (weight.requires_grad or lora_A.requires_grad or (bias is not None and bias.requires_grad)):
        return
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but LoRA-FA keeps it frozen and would give it no gradient: call "
                f"{name}.requires_grad_(False). For a whole model: model.requires_grad_(False), then "
                "requires_grad_(True) on what lorafa_parameters(model) lists"
            )


def checked_scaling(scaling: float) -> float:
    """Return scaling as a float. Raises TypeError for what is no real number, ValueError for one that is not
    finite, or not in fp32.
    """
    if type(scaling) is not float:
        scaling = real_number("scaling", scaling)
    if not -LARGEST_NUMBER <= scaling <= LARGEST_NUMBER:
        raise ValueError(f"scaling must be a finite number, at most {LARGEST_NUMBER:.4g}, got {scaling}")
    return scaling


def checked_dropout(dropout_p: float, scaling: float = 1.0) -> float:
    """Return dropout_p as a float. Raises TypeError for what is no real number, ValueError unless it is in
    [0, 1) and leaves scaling/(1 − dropout_p) in fp32.
    """
    if type(dropout_p) is not float:
        dropout_p = real_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p and abs(scaling / (1 - dropout_p)) > LARGEST_NUMBER:
        raise ValueError(
            f"scaling / (1 - dropout_p) must be at most {LARGEST_NUMBER:.4g}, got {scaling} / "
            f"(1 - {dropout_p})"
        )
    return dropout_p


def check_correction(gradient_correction: bool, scaling: float) -> None:
    """Raise TypeError unless gradient_correction is a bool, ValueError where it would divide by a scaling of
    0.
    """
    if gradient_correction is False:
        return
    if gradient_correction is not True:
        raise TypeError(f"gradient_correction must be True or False, got {gradient_correction!r:.80}")
    if scaling == 0:
        raise ValueError(
            "gradient_correction divides by scaling², and scaling is 0: take another, or do without"
        )


def real_number(name: str, value: object) -> float:
    """Return `value` as a float. Raises TypeError, naming it, for what is no real number (a bool, a tensor
    and a string are none), ValueError for one beyond every float.
    """
    if isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        shown = f"a {type(value).__name__}" if isinstance(value, Tensor) else f"{value!r:.80}"
        raise TypeError(f"{name} must be a real number, got {shown}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, got one too large for a float") from None


def draw_seed(device: torch.device, count: int = 1) -> Tensor:
    """Draw the seeds of `count` dropout masks from the device's default generator: int64 of shape (count,).

    torch.manual_seed reproduces them, activation checkpointing replays them, a CUDA graph draws others in
    each replay; they are never read by the host.
    """
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device)


def as_rows(x: Tensor, K: int) -> Tensor:
    """Return x (..., K) as a matrix (M, K): itself, a view, or a copy where its strides allow none."""
    if x.dim() == 2:
        return x
    return x.reshape(-1, K) if K else x.reshape(math.prod(x.shape[:-1]), 0)


def shaped_as(y: Tensor, x: Tensor) -> Tensor:
    """Return y (M, N) as (..., N), with the leading dimensions of x (..., K)."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for this type of device; torch has no answer for tensors without data."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
    """Return x in the dtype to compute in, after checking that the other dtypes can go with it."""
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}, expected one of {_names(FLOAT_DTYPES)}")
    device_type = x.device.type
    # As torch's own linear: autocast leaves fp64 alone.
    autocast = autocast_enabled(device_type) and x.dtype != torch.float64
    if autocast:
        x = x.to(torch.get_autocast_dtype(device_type))
    dtype = x.dtype
    base_fits = weight.dtype == lora_A.dtype == dtype and (bias is None or bias.dtype == dtype)
    if base_fits and lora_B.dtype in (dtype, torch.float32):
        return x
    exact = FLOAT_DTYPES if autocast else (dtype,)
    factor = FLOAT_DTYPES if autocast else (dtype, torch.float32)
    for name, tensor, allowed in (
        ("weight", weight, exact),
        ("bias", bias, exact),
        ("lora_A", lora_A, factor),
        ("lora_B", lora_B, factor),
    ):
        if tensor is not None and tensor.dtype not in allowed:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, x {dtype}: expected {_names(dict.fromkeys(allowed))}"
            )
    return x


def _names(dtypes) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
