"""Whatever the public functions are called with, they compute or raise a ValueError or a TypeError that names
the argument: no AttributeError of a None, no message of PyTorch's dispatcher, and no numbers from nonsense.
"""

from __future__ import annotations

import decimal
import fractions
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafa_kernels import lorafa_linear
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.mlp.api import lorafa_gated_mlp
from lorafa_kernels.norm import rms_norm

M, K, N, R = 4, 6, 6, 2
SHAPES = {"x": (M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "bias": (N,)}


class Wrapper(Tensor):
    """Stands for a quantised weight: a tensor that is made of others."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} of a Wrapper")


def quantised(shape):
    return torch.quantize_per_tensor(torch.zeros(shape), 1.0, 0, torch.qint8)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # What stands for a tensor of this shape, and the words of the answer.
    NO_TENSORS = {
        "list": (lambda shape: [[0.0]], "must be a torch.Tensor, got list"),
        "numpy": (np.zeros, "must be a torch.Tensor, got ndarray"),
        "number": (lambda shape: 1.0, "must be a torch.Tensor, got float"),
        "string": (lambda shape: "x", "must be a torch.Tensor, got str"),
        "sparse": (lambda shape: torch.zeros(shape).to_sparse(), "has layout torch.sparse_coo"),
        "csr": (lambda shape: torch.zeros(shape).to_sparse_csr(), "has layout torch.sparse_csr"),
        "mkldnn": (lambda shape: torch.zeros(shape).to_mkldnn(), "has layout torch._mkldnn"),
        "nested": (
            lambda shape: torch.nested.nested_tensor([torch.zeros(2, K), torch.zeros(1, K)]),
            "is a nested tensor",
        ),
        "jagged": (
            lambda shape: torch.nested.nested_tensor(
                [torch.zeros(2, K), torch.zeros(1, K)], layout=torch.jagged
            ),
            "is a nested tensor",
        ),
        "quantised": (quantised, "has dtype torch.qint8"),
    }


def operands(**changes) -> dict:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()} | changes


def call_layer(**changes):
    return lorafa_linear(**operands(**changes))


def call_group(share_A=False, impl="auto", **changes):
    given = operands(**changes)
    x = given.pop("x")
    good = LinearOperands(*(torch.zeros(SHAPES[n]) for n in ("weight", "bias", "lora_A", "lora_B")))
    return lorafa_linear_group(x, [good, LinearOperands(**given)], share_A=share_A, impl=impl)


def call_mlp(activation="silu", impl="auto", **changes):
    given = operands(**changes)
    x = given.pop("x")
    good = LinearOperands(*(torch.zeros(SHAPES[n]) for n in ("weight", "bias", "lora_A", "lora_B")))
    return lorafa_gated_mlp(x, good, good, LinearOperands(**given), activation=activation, impl=impl)


CALLS = {"layer": call_layer, "group": call_group, "mlp": call_mlp}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def exists(kind: str, name: str) -> bool:
    return not (name == "bias" and kind in ("csr", "nested", "jagged"))


@calls
@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in SHAPES for k in NO_TENSORS if exists(k, n)], ids=str
)
def test_operands_that_are_no_dense_tensors(call, name, kind):
    make, words = NO_TENSORS[kind]
    # Of a weight that is not of the others' dtype a group says that.
    with pytest.raises((TypeError, ValueError), match=f"{name} {words}"):
        call(**{name: make(SHAPES[name])})


@pytest.mark.parametrize("name", ["weight", "lora_A", "bias"])
@calls
def test_frozen_operands_that_are_made_of_other_tensors(call, name):
    with pytest.raises(TypeError, match=f"{name} is a Wrapper, a tensor made of others"):
        call(**{name: Wrapper(torch.zeros(SHAPES[name]))})


def test_sharded_operands(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name, shape in SHAPES.items():
            sharded = distribute_tensor(torch.zeros(shape), mesh, [Replicate()])
            with pytest.raises(TypeError, match=f"{name} is a DTensor"):
                call_layer(**{name: sharded})
    finally:
        distributed.destroy_process_group()


NO_NUMBERS = ["2", None, 1j, True, torch.tensor(1.0), decimal.Decimal(1), [1.0], math.sin]
BEYOND = [math.nan, math.inf, -math.inf, 10**400, 1e39, -1e300, fractions.Fraction(10**400)]


@calls
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["scaling", "dropout_p"])
def test_numbers_that_are_none(call, name, value):
    with pytest.raises(TypeError, match=f"{name} must be a real number"):
        call(**{name: value})


@calls
@pytest.mark.parametrize("value", BEYOND, ids=lambda value: f"{value!s:.10}")
def test_scaling_beyond_fp32(call, value):
    with pytest.raises(ValueError, match="scaling must be a finite number"):
        call(scaling=value)


@calls
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9, 1.0, 2, 10**400])
def test_dropout_out_of_range(call, value):
    with pytest.raises(ValueError, match="dropout_p must be"):
        call(dropout_p=value)


@calls
def test_scaling_and_dropout_beyond_fp32_together(call):
    with pytest.raises(ValueError, match=r"scaling / \(1 - dropout_p\) must be at most"):
        call(scaling=1e38, dropout_p=0.999)


@calls
@pytest.mark.parametrize(
    "number", [2, np.float32(2), np.int64(2), np.float64(2), fractions.Fraction(2)], ids=repr
)
def test_numbers_of_other_kinds_are_numbers(call, number):
    filled = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    got, expected = call(**filled, scaling=number), call(**filled, scaling=2.0)
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    assert all(torch.equal(*pair) for pair in pairs)


@calls
@pytest.mark.parametrize("impl", [None, 3, ["auto"], np.array(["auto", "torch"]), torch.zeros(2)], ids=repr)
def test_implementations_that_are_no_names(call, impl):
    with pytest.raises(ValueError, match="is not known"):
        call(impl=impl)


NO_MEMBERS = {
    "none": (None, TypeError, "members must be a list"),
    "generator": ((m for m in ()), TypeError, "members must be a list"),
    "empty": ([], ValueError, "members is empty"),
    "of-tensors": ([torch.zeros(2, K)], TypeError, "member 0: expected LinearOperands, got Tensor"),
    "of-tuples": ([(torch.zeros(2, K), None)], TypeError, "member 0: expected LinearOperands, got tuple"),
    "no-weight": ([LinearOperands(None)], TypeError, "member 0: weight must be a torch.Tensor, got NoneType"),
}


@pytest.mark.parametrize(("members", "error", "words"), NO_MEMBERS.values(), ids=NO_MEMBERS)
def test_members_that_are_none(members, error, words):
    with pytest.raises(error, match=words):
        lorafa_linear_group(torch.zeros(M, K), members)


def test_other_arguments():
    with pytest.raises(TypeError, match="share_A must be a bool, got str"):
        call_group(share_A="yes")
    for activation in ("tanh", None, ["silu"]):
        with pytest.raises(ValueError, match=r"activation=.* is not known"):
            call_mlp(activation=activation)
    with pytest.raises(TypeError, match="gate: expected LinearOperands, got Tensor"):
        lorafa_gated_mlp(torch.zeros(M, K), torch.zeros(N, K), torch.zeros(N, K), torch.zeros(N, K))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["up", "down"])
def test_layers_of_an_mlp_of_mixed_dtypes(name, dtype):
    layers = {part: LinearOperands(torch.zeros(N, K)) for part in ("gate", "up", "down")}
    layers[name] = LinearOperands(torch.zeros(N, K, dtype=dtype))
    with pytest.raises((ValueError, TypeError), match=f"{name}: weight has dtype {dtype}"):
        lorafa_gated_mlp(torch.zeros(M, K), **layers)


NORMS = {
    "eps-string": (dict(eps="1e-6"), TypeError, "eps must be a real number"),
    "eps-none": (dict(eps=None), TypeError, "eps must be a real number"),
    "eps-complex": (dict(eps=1j), TypeError, "eps must be a real number"),
    "eps-tensor": (dict(eps=torch.tensor(1e-6)), TypeError, "eps must be a real number, got a Tensor"),
    "eps-nan": (dict(eps=math.nan), ValueError, "eps must be finite"),
    "eps-negative": (dict(eps=-1.0), ValueError, "eps must be finite"),
    "eps-beyond": (dict(eps=1e300), ValueError, "eps must be finite"),
    "form": (dict(form=None), ValueError, "unknown form None"),
    "x-list": (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
    "x-sparse": (dict(x=torch.zeros(M, K).to_sparse()), TypeError, "x has layout torch.sparse_coo"),
    "weight-none": (dict(weight=None), TypeError, "weight must be a torch.Tensor, got NoneType"),
    "weight-wrapper": (dict(weight=Wrapper(torch.zeros(K))), TypeError, "weight is a Wrapper"),
}


@pytest.mark.parametrize(("changes", "error", "words"), NORMS.values(), ids=NORMS)
def test_norms(changes, error, words):
    good = dict(x=torch.zeros(M, K), weight=torch.ones(K), eps=1e-6, form="llama")
    with pytest.raises(error, match=words):
        rms_norm(**{**good, **changes})
    assert rms_norm(**{**good, "eps": np.float32(1e-6)}).shape == (M, K)


def tensors(draw_shape):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64, torch.bool)
    kinds = (
        lambda t: t,
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
        lambda t: t.requires_grad_() if t.is_floating_point() else t,
    )
    return st.builds(
        lambda shape, dtype, kind: kind(torch.zeros(shape, dtype=dtype)),
        draw_shape,
        st.sampled_from(dtypes),
        st.sampled_from(kinds),
    )


junk = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.complex_numbers(),
    st.floats(),
    st.integers(-(2**70), 2**70),
    st.booleans(),
    tensors(st.lists(st.integers(0, 7), max_size=3)),
)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(CALLS)),
    st.dictionaries(st.sampled_from([*SHAPES, "scaling", "dropout_p", "impl"]), junk, min_size=1, max_size=3),
)
def test_anything_else(call, changes):
    """A wrong call is answered by an error that names one of the arguments that were changed."""
    try:
        CALLS[call](**changes)
    except (ValueError, TypeError) as error:
        # A wrong shape or dtype shows in comparison: the other one of the two may be named as well.
        names = [*SHAPES, "scaling", "dropout_p", "impl"]
        assert any(name in str(error) for name in names), str(error)
