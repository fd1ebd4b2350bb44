"""RMS norms: transformers' values bit for bit, gradients within the budget, and x, rstd and the weight as
all that is kept.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from accuracy import POOLED_SEEDS, SMALL_OUTPUT, Budget, assert_same, check_budget
from conftest import on_device
from saved import Saved
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.measure import memory
from lorafa_kernels.checks.budget import allowed_error, relative_error
from lorafa_kernels.norm import FORMS, rms_norm

pytestmark = pytest.mark.numerics
H = 40
EPS = 1e-5
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F64, F64)]
forms = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS, ids=lambda dtype: str(dtype)[6:])


def transformers_norm(form: str, weight: torch.Tensor) -> nn.Module:
    """The module of transformers that a form is named after, with this weight, frozen."""
    pytest.importorskip("transformers")
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    kind = {"llama": LlamaRMSNorm, "gemma": GemmaRMSNorm, "t5": T5LayerNorm}[form]
    module = kind(len(weight), eps=EPS)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def exact(x, weight, form):
    """The formula in fp64."""
    x, weight = x.double(), weight.double()
    hat = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return hat * (1 + weight if form == "gemma" else weight)


def draw(form, dtype=F32, weight_dtype=None, shape=(4, 9, H), device="cpu"):
    x = (3 * torch.randn(shape)).to(device, dtype)
    weight = (0.3 * torch.randn(H) + (form != "gemma")).to(device, weight_dtype or dtype)
    return x.requires_grad_(), weight


def value_and_gradient(function, x, dy):
    x = x.detach().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype))
    return y.detach(), dx


def results_of(function, x, dy):
    return dict(zip(("y", "dx"), value_and_gradient(function, x, dy), strict=True))


def results_beside(x, weight, form, dy):
    """y and dx of rms_norm, by the formula in fp64, and by transformers' module."""
    return (
        results_of(lambda x: rms_norm(x, weight, EPS, form), x, dy),
        results_of(lambda x: exact(x, weight, form), x.double(), dy),
        results_of(transformers_norm(form, weight), x, dy),
    )


@forms
@dtypes
def test_values_are_those_of_transformers_bit_for_bit(form, dtype, weight_dtype):
    x, weight = draw(form, dtype, weight_dtype)
    want = transformers_norm(form, weight)(x)
    got = rms_norm(x, weight, EPS, form)
    assert got.dtype == want.dtype and torch.equal(got, want)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS, form), want)
    assert torch.equal(rms_norm(x.detach(), weight, EPS, form), want)


@forms
@dtypes
def test_values_and_gradient_are_within_the_budget(form, dtype, weight_dtype, device):
    x, weight = draw(form, dtype, weight_dtype, device=device)
    dy = torch.randn(x.shape, device=device, dtype=rms_norm(x, weight, EPS, form).dtype)
    got, right, plain = results_beside(x, weight, form, dy)
    for name, value in got.items():
        assert (value.dtype, value.shape) == (plain[name].dtype, plain[name].shape)
        if dtype == F64:
            # rstd is fp32 in all forms, and so is the error.
            error, allowed = (relative_error(t, right[name]) for t in (value, plain[name]))
            assert error <= allowed_error(allowed, F32), name
    if dtype != F64:
        check_budget(got, right, plain)


@forms
def test_gradient_by_finite_differences(form):
    """dx in the direction of a step, and the differences of the formula in fp64 over the step and over half
    of it: how far these two are apart bounds the error of the second. Beside it dx may have the error that
    transformers' dx has, twice, plus the unit roundoff of fp32, in which all forms compute rstd.
    """
    x, weight = draw(form, F64, shape=(8, H))
    dy = torch.randn(8, H, dtype=F64)
    got, right, plain = results_beside(x, weight, form, dy)
    allowed = allowed_error(relative_error(plain["dx"], right["dx"]), F32) * right["dx"].norm()

    def difference(step):
        ends = [(dy * exact(x.detach() + sign * step, weight, form)).sum() for sign in (1, -1)]
        return (ends[0] - ends[1]) / 2

    for _ in range(3):
        # Not one direction of all: along dx, so that no two parts of the sum cancel.
        step = 1e-3 * torch.randn(8, H, dtype=F64).abs() * got["dx"].sign()
        whole, half = difference(step), 2 * difference(step / 2)
        bound = (whole - half).abs() + allowed * step.norm()
        assert ((got["dx"] * step).sum() - half).abs() <= bound
        assert 1000 * bound < half.abs(), "a bound that tells nothing"


@forms
@dtypes
def test_keeps_x_and_one_number_a_row(form, dtype, weight_dtype):
    x, weight = draw(form, dtype, weight_dtype)
    weight = nn.Parameter(weight, requires_grad=False)
    with Saved() as saved:
        rms_norm(x, weight, EPS, form)
    kept, rstd, by_reference = saved.tensors
    assert kept is x and by_reference is weight
    assert rstd.dtype == F32 and rstd.shape == (4, 9, 1)
    assert rstd.untyped_storage().nbytes() == 4 * 9 * 4


@pytest.mark.parametrize(("device", "form"), [on_device("cuda", "llama"), on_device("cuda", "t5")])
def test_torch_s_own_norm_keeps_the_same_on_a_gpu(device, form):
    x, weight = draw(form, BF16, device=device)
    for enabled in (False, True):
        with Saved() as saved, torch.autocast(device, BF16, enabled=enabled):
            rms_norm(x, weight, EPS, form)
        own = weight.data_ptr()
        sizes = sorted(t.untyped_storage().nbytes() for t in saved.tensors if t.data_ptr() != own)
        assert sizes == [4 * 9 * 4, x.numel() * 2]
        assert any(t.data_ptr() == x.data_ptr() for t in saved.tensors)


@forms
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_needs_no_more_beside_it_than_transformers(form, dtype, device):
    x, weight = draw(form, dtype, shape=(64, H), device=device)
    dy = torch.randn(64, H, device=device, dtype=dtype)

    def peaks(function):
        def backward(y):
            return torch.autograd.grad(y, x, dy)

        backward(function(x))
        kept, in_forward, in_backward = memory.allocations(lambda: function(x), backward, device)
        return kept + in_forward, in_backward

    ours = peaks(lambda x: rms_norm(x, weight, EPS, form))
    theirs = peaks(transformers_norm(form, weight))
    assert all(a <= b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@forms
def test_nothing_is_kept_without_gradients(form):
    x, weight = draw(form)
    with Saved() as saved:
        with torch.no_grad():
            assert rms_norm(x, weight, EPS, form).grad_fn is None
        with torch.inference_mode():
            rms_norm(x, weight, EPS, form)
        assert rms_norm(x.detach(), weight, EPS, form).grad_fn is None
    assert saved.tensors == []


@forms
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_autocast_changes_nothing(form, dtype, device):
    """As in transformers: the formula casts for itself, and the operations in it are none of autocast's."""
    x, weight = draw(form, dtype, F32, device=device)
    dy = torch.randn_like(x, dtype=F32)
    outside = value_and_gradient(lambda x: rms_norm(x, weight, EPS, form), x, dy)
    with torch.autocast(device, BF16):
        inside = value_and_gradient(lambda x: rms_norm(x, weight, EPS, form), x, dy)
        if device == "cpu":
            assert torch.equal(inside[0], transformers_norm(form, weight)(x))
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@forms
@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_checkpointing_gives_the_same_gradient(form, reentrant, device):
    x, weight = draw(form, BF16, device=device)
    dy = torch.randn_like(x)

    def norm(x):
        return rms_norm(x, weight, EPS, form)

    want = value_and_gradient(norm, x, dy)
    # Reentrant checkpointing does not go with autograd.grad.
    y = checkpoint(norm, x, use_reentrant=reentrant)
    y.backward(dy)
    assert torch.equal(y, want[0]) and torch.equal(x.grad, want[1])


@forms
def test_compiles_as_one_graph(form, device):
    x, weight = draw(form, BF16, device=device)
    dy = torch.randn_like(x)
    torch._dynamo.reset()

    def norm(x):
        return rms_norm(x, weight, EPS, form)

    compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((4, 9, H), (7, H)):
        x = (3 * torch.randn(shape, device=device)).bfloat16()
        dy = torch.randn_like(x)
        want = value_and_gradient(norm, x, dy)
        got = value_and_gradient(compiled, x, dy)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@forms
@pytest.mark.parametrize("shape", [(0, H), (3, 0, H), (H,), (1, H)], ids=str)
def test_odd_shapes(form, shape, device):
    budget = Budget()
    elements = torch.Size(shape).numel()
    for _ in range(POOLED_SEEDS if 0 < elements < SMALL_OUTPUT else 1):
        x, weight = draw(form, shape=shape, device=device)
        got, right, plain = results_beside(x, weight, form, torch.randn(shape, device=device))
        assert got["y"].shape == got["dx"].shape == shape
        budget.compare(got, right, plain)
    budget.check()


@forms
def test_other_strides(form, device):
    """x or dy transposed, sliced or expanded gives what their contiguous copies give; neither is written."""
    x, weight = draw(form, shape=(H, 12), device=device)
    x = x.detach().t()
    wide = torch.randn(12, 2 * H, device=device)
    for dy in (
        wide[:, ::2],
        torch.randn(H, device=device).expand(12, H),
        torch.randn(H, 12, device=device).t(),
    ):
        before = [x.clone(), dy.clone()]
        got = results_of(lambda x: rms_norm(x, weight, EPS, form), x, dy)
        _, right, plain = results_beside(x.contiguous(), weight, form, dy.contiguous())
        check_budget(got, right, plain)
        assert_same([x, dy], before)


@forms
def test_runs_twice_on_one_graph_and_every_time_the_same(form, device):
    x, weight = draw(form, BF16, device=device)
    y = rms_norm(x, weight, EPS, form)
    dy = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2))
    again = value_and_gradient(lambda x: rms_norm(x, weight, EPS, form), x, dy)
    assert torch.equal(first, second) and torch.equal(first, again[1]) and torch.equal(y, again[0])


@forms
def test_the_caller_may_write_into_the_output_but_not_into_x(form):
    x, weight = draw(form)
    _, want = value_and_gradient(lambda x: rms_norm(x, weight, EPS, form) * 2, x, torch.ones_like(x))
    _, got = value_and_gradient(lambda x: rms_norm(x, weight, EPS, form).mul_(2), x, torch.ones_like(x))
    assert torch.equal(got, want)
    hidden = x * 1
    y = rms_norm(hidden, weight, EPS, form)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@forms
def test_double_backward_is_refused(form):
    """Even where dy is a constant: dx depends on x."""
    x, weight = draw(form)
    y = rms_norm(x, weight, EPS, form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


@forms
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_what_is_not_finite_is_passed_on_in_its_row(form, bad):
    x, weight = draw(form, shape=(3, H))
    x = x.detach().index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(bad))
    y, dx = value_and_gradient(lambda x: rms_norm(x, weight, EPS, form), x, torch.ones_like(x))
    theirs, their_dx = value_and_gradient(transformers_norm(form, weight), x, torch.ones_like(x))
    assert torch.equal(y.isfinite(), theirs.isfinite())
    assert torch.equal(dx.isfinite().all(-1), their_dx.isfinite().all(-1))
    assert torch.equal(dx.isfinite().all(-1), torch.tensor([True, False, True]))


X, W = torch.zeros(3, H), torch.ones(H)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, W, EPS, "lama"), ValueError, "unknown form 'lama'.*llama, gemma, t5"),
        ((X, W[None], EPS, "llama"), ValueError, r"weight has shape \(1, 40\), expected \(H,\)"),
        ((X[:, 1:], W, EPS, "llama"), ValueError, r"x has shape \(3, 39\), expected \(\.\.\., 40\)"),
        ((X[0, 0], W, EPS, "llama"), ValueError, r"x has shape \(\)"),
        ((X, W.clone().requires_grad_(), EPS, "t5"), ValueError, r"weight requires grad.*requires_grad_\(F"),
        ((X, W.to("meta"), EPS, "gemma"), ValueError, "weight is on meta, x on cpu"),
        ((X.long(), W, EPS, "gemma"), TypeError, "x has dtype torch.int64"),
        ((X, W.to(torch.complex64), EPS, "gemma"), TypeError, "weight has dtype torch.complex64"),
        ((X, W, -1.0, "gemma"), ValueError, "eps must be finite"),
        ((X, W, float("nan"), "gemma"), ValueError, "eps must be finite"),
    ],
    ids=["form", "weight", "x", "scalar", "thawed", "device", "integer", "complex", "negative", "nan"],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        rms_norm(*arguments)
