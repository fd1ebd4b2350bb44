"""lorafa_gated_mlp: the gated MLP of a Transformer, down(act(gate(x)) · up(x)): check the arguments, apply
autocast's casts, flatten, draw the seeds of dropout, and call the autograd node.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..group.operands import LinearOperands, check_kinds, checked_member, inverses_of, member_fits
from ..operands import as_rows, draw_seed, shaped_as
from ..plan.choice import check_impl
from . import ops
from .activation import check_activation


def lorafa_gated_mlp(
    x: Tensor,
    gate: LinearOperands,
    up: LinearOperands,
    down: LinearOperands,
    *,
    activation: str = "silu",
    impl: str = "auto",
) -> Tensor:
    """Apply a gated MLP of linear layers with LoRA-FA adapters: y = down(act(gate(x)) · up(x)).

    Gradients flow to x and to each lora_B only. Each layer as lorafa_linear computes it; the product with the
    activation is rounded once, or by PyTorch's own operators (impl="torch") twice.

    Args:
        x: (..., K), fp32, bf16, fp16 or fp64. Any strides.
        gate, up: weights (I, K) of one dtype and device. down: weight (N, I). Any of the three without lora_A
            and lora_B is a plain frozen linear layer. Dropout masks are drawn for each on its own.
        activation: "silu", "gelu" (by erf) or "gelu_tanh".
        impl: "auto", "triton", "torch" or "reference"; plan/choice.py has the rule of "auto".

    Returns:
        y: (..., N), in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: an unknown activation; shapes that do not fit; one of lora_A and lora_B without the other;
            and what lorafa_linear raises it for.
        TypeError: a layer that is no LinearOperands; and what lorafa_linear raises it for.
        RuntimeError: as lorafa_linear.
    """
    check_impl(impl)
    check_activation(activation)
    x, (gate, up, down) = _checked(x, gate, up, down)
    rows = as_rows(x, gate.weight.shape[1])

    layers = gate, up, down
    weights, biases, lora_As, lora_Bs, scalings, dropout_ps, _ = map(list, zip(*layers, strict=True))
    dropout_ps = [0.0 if B is None else p for p, B in zip(dropout_ps, lora_Bs, strict=True)]
    seeds = draw_seed(x.device, 3) if any(dropout_ps) else None
    if torch.is_grad_enabled() and (
        x.requires_grad or any(B is not None and B.requires_grad for B in lora_Bs)
    ):
        inverses = inverses_of(layers)
        tensors = *weights, *lora_Bs, *biases, *lora_As, *inverses
        y = ops.LoRAFAGatedMLPFunction.apply(rows, seeds, scalings, dropout_ps, activation, impl, *tensors)
    else:
        y = ops.gated_mlp(
            rows, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, activation, impl
        )
    return shaped_as(y, x)


def _checked(
    x: Tensor, gate: LinearOperands, up: LinearOperands, down: LinearOperands
) -> tuple[Tensor, list[LinearOperands]]:
    """Return x in the dtype to compute in, and the layers with their numbers as floats, after all checks."""
    if (
        member_fits(x, gate)
        and member_fits(x, up)
        and gate.weight.shape == up.weight.shape
        and member_fits(x, down, gate.weight.shape[0])
    ):
        return x, [gate, up, down]
    checked = []
    for name, member in (("gate", gate), ("up", up), ("down", down)):
        try:
            check_kinds(x, member)
            weight = member.weight
            if name == "down":
                check_down(weight, gate.weight)
                # Stands for h: no rows, and the columns, dtype and device that the checks look at.
                _, member = checked_member(x.new_empty((0, weight.shape[1])), member)
            else:
                check_up(weight, gate.weight)
                x, member = checked_member(x, member)
            checked.append(member)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None
    return x, checked


def check_up(weight: Tensor, gate: Tensor) -> None:
    """Raise ValueError unless the weight of up, or what stands for it, is like that of gate."""
    for what in ("shape", "dtype", "device"):
        got, expected = getattr(weight, what), getattr(gate, what)
        if got != expected:
            raise ValueError(
                f"weight has {what} {_words(got)}, that of gate has {_words(expected)}: both must be the same"
            )


def check_down(weight: Tensor, gate: Tensor) -> None:
    """Raise ValueError unless down takes what gate returns."""
    columns = gate.shape[0]
    if weight.shape[1] != columns:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (N, {columns}): gate has {columns} outputs"
        )


def _words(value: object) -> str:
    return str(tuple(value)) if isinstance(value, tuple) else str(value)
