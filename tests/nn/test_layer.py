"""LoRAFALinear as a module: what it shares, what stays frozen, what merge and unmerge give back, what
survives copying.
"""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_same, check_budget
from processes import group
from torch import nn

from lorafa_kernels import LoRAFALinear
from lorafa_kernels.nn.group import operands_of

numerics = pytest.mark.numerics


def snapshot(layer: LoRAFALinear) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


def assert_intact(layer: LoRAFALinear, before: dict[str, torch.Tensor]) -> None:
    """Same values bit for bit, and only lora_B trains."""
    assert dict(layer.named_parameters()).keys() == before.keys()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == (name == "lora_B"), name


@pytest.fixture
def layer() -> LoRAFALinear:
    return LoRAFALinear(12, 10, r=3, lora_alpha=6, init_lora_weights=False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 12)


@numerics
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_base_layer(x, bias, dtype):
    base = nn.Linear(12, 10, bias=bias, dtype=dtype)
    layer = LoRAFALinear.from_linear(base, r=3)
    assert torch.equal(layer(x.to(dtype)), base(x.to(dtype)))


def test_shares_the_parameter_objects():
    base = nn.Linear(12, 10)
    weight, bias = base.weight, base.bias
    layer = LoRAFALinear.from_linear(base, r=3)
    assert layer.weight is weight and layer.bias is bias
    assert not weight.requires_grad and not bias.requires_grad


def test_dtypes_and_shapes():
    layer = LoRAFALinear(12, 10, r=3, dtype=torch.bfloat16)
    described = {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()}
    assert described == {
        "weight": ((10, 12), torch.bfloat16),
        "bias": ((10,), torch.bfloat16),
        "lora_A": ((3, 12), torch.bfloat16),
        "lora_B": ((10, 3), torch.float32),
    }
    same = LoRAFALinear(12, 10, r=3, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    assert same.lora_B.dtype == torch.bfloat16


def test_scaling():
    assert LoRAFALinear(4, 4, r=8, lora_alpha=16).scaling == 2.0
    assert LoRAFALinear(4, 4, r=16, lora_alpha=16, use_rslora=True).scaling == 4.0


@numerics
def test_initialisations():
    torch.manual_seed(0)
    default = LoRAFALinear(400, 10, r=4)
    bound = 1 / math.sqrt(400)
    assert default.lora_A.abs().max() <= bound and default.lora_A.abs().max() > 0.9 * bound
    assert default.lora_B.count_nonzero() == 0
    gaussian = LoRAFALinear(4000, 10, r=4, init_lora_weights="gaussian")
    # 16,000 draws: the sample deviation is within 4 standard errors, σ/√(2n), of 1/r.
    assert abs(gaussian.lora_A.std().item() - 0.25) < 4 * 0.25 / math.sqrt(2 * 16000)
    assert gaussian.lora_B.count_nonzero() == 0
    assert LoRAFALinear(40, 10, r=4, init_lora_weights=False).lora_B.count_nonzero() == 40


@numerics
def test_training_moves_lora_B_alone(layer, x):
    before = snapshot(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(layer.lora_B, before["lora_B"])
    for name in ("weight", "bias", "lora_A"):
        assert torch.equal(getattr(layer, name), before[name]), name


@pytest.mark.parametrize("name", ["weight", "bias", "lora_A"])
def test_thawed_parameter_is_an_error_that_names_it(layer, x, name):
    layer.eval()
    for merged, enabled in ((False, True), (True, True), (False, False)):
        layer.adapter_enabled = enabled
        if merged:
            layer.merge()
        getattr(layer, name).requires_grad_(True)
        with pytest.raises(ValueError, match=rf"^{name} requires grad.*{name}\.requires_grad_\(False\)"):
            layer(x)
        getattr(layer, name).requires_grad_(False)
        layer(x)
        layer.unmerge()


def test_train_eval_and_casts_keep_everything_frozen(layer, x):
    before = snapshot(layer)
    layer.eval()
    layer(x)
    layer.train()
    layer.to("cpu").float().double().float()
    layer.zero_grad()
    assert_intact(layer, before)


@numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_merge_and_unmerge(dtype, keep):
    """Merged, the weight and y are those of the formula; unmerged, all is what it was."""
    layer = LoRAFALinear(24, 20, r=3, init_lora_weights=False, dtype=dtype).eval()
    x = torch.randn(16, 24, dtype=dtype)
    before, weight = snapshot(layer), layer.weight
    apart = layer(x)
    layer.merge(keep)
    layer.merge(keep)
    assert layer.merged and layer.weight is not weight and not layer.weight.requires_grad
    assert not torch.equal(layer.weight, before["weight"])

    def formula(to):
        base, bias, A, B = (before[name].to(dtype).to(to) for name in ("weight", "bias", "lora_A", "lora_B"))
        y = F.linear(x.to(to), base, bias) + layer.scaling * F.linear(F.linear(x.to(to), A), B)
        return {"weight": base + layer.scaling * (B @ A), "y": y}

    check_budget({"weight": layer.weight, "y": layer(x)}, formula(torch.float64), formula(dtype))
    layer.unmerge()
    layer.unmerge()
    assert layer.weight is weight
    assert_intact(layer, before)
    assert_same(layer(x), apart)


@numerics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_B_is_merged_as_it_acts(dtype):
    """fp32 lora_B acts rounded to the dtype of the weight, and is merged so. With lora_A the identity and the
    weight zero there is one more rounding, that of s · lora_B, and so no bound but equality.
    """
    layer = LoRAFALinear(16, 16, r=16, lora_alpha=24, dtype=dtype).eval()
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(16))
        layer.lora_B.normal_()
    acting = layer.lora_B.detach().to(dtype).float()
    want = (1.5 * acting).to(dtype)
    assert layer.scaling == 1.5 and not torch.equal(want, (1.5 * layer.lora_B).to(dtype))
    assert_same(layer.merged_weight(), want)
    layer.merge()
    assert_same(layer.weight.detach(), want)
    assert_same(layer.to_linear().weight.detach(), want)


def test_merged_layer_neither_trains_nor_saves(layer, x):
    layer.merge()
    with pytest.raises(RuntimeError, match=r"unmerge\(\) before training"):
        layer(x)
    with pytest.raises(RuntimeError, match=r"unmerge\(\) before saving"):
        layer.state_dict()
    with pytest.raises(RuntimeError, match=r"proj is merged.*unmerge\(\) before saving"):
        nn.ModuleDict({"proj": layer}).state_dict()
    with pytest.raises(RuntimeError, match=r"unmerge\(\) before loading"):
        layer.load_state_dict({})
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    with pytest.raises(ValueError, match="keep"):
        LoRAFALinear(4, 4).merge("disk")


@numerics
def test_kept_weight_follows_casts(layer, x):
    weight = layer.weight
    layer.merge()
    layer.to(torch.float64)
    assert weight.dtype == torch.float64
    layer.unmerge()
    assert layer.weight is weight
    layer(x.double())
    # A weight that was sent away is out of reach of a cast, and catches up when it comes back.
    layer.merge(keep="cpu")
    weight.data = weight.data.float()
    layer.unmerge()
    assert layer.weight is weight and weight.dtype == torch.float64


@numerics
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_lose_nothing(layer, x, how, merged):
    layer.eval()
    before = snapshot(layer)
    apart = layer(x)
    if merged:
        layer.merge()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.merged == merged
    assert torch.equal(other(x), layer(x))
    other.unmerge()
    assert_intact(other, before)
    assert torch.equal(other(x), apart)
    assert other.weight.data_ptr() != layer.weight.data_ptr()


@numerics
def test_state_dict_round_trip(layer, x):
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "lora_A", "lora_B"]
    other = LoRAFALinear(12, 10, r=3, lora_alpha=6)
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(other(x), layer(x))
    assert_intact(other, snapshot(layer))
    # A checkpoint of the plain base layer fits as well, and leaves the adapter alone.
    adapter = other.lora_B.detach().clone()
    base = nn.Linear(12, 10)
    missing = other.load_state_dict(base.state_dict(), strict=False)
    assert missing.missing_keys == ["lora_A", "lora_B"] and torch.equal(other.lora_B, adapter)


@numerics
@pytest.mark.parametrize("merge", [True, False])
def test_to_linear(layer, x, merge):
    layer.eval()
    weight = layer.weight
    calls = []
    layer.register_forward_hook(lambda module, args, y: calls.append(type(module)))
    linear = layer.to_linear(merge)
    y = linear(x)
    assert calls == [nn.Linear]
    assert type(linear) is nn.Linear and linear.bias is layer.bias and not linear.training
    assert (linear.in_features, linear.out_features) == (12, 10)
    if merge:
        assert_same(linear.weight.detach(), layer.merged_weight())
        assert layer.weight is weight and not layer.merged
        layer.merge()
        assert_same(y, layer(x))
    else:
        assert linear.weight is weight


def test_hooks_and_training_flag_move_over(x):
    base = nn.Linear(12, 10).eval()
    calls = []
    handle = base.register_forward_hook(lambda module, args, y: calls.append(type(module)))
    layer = LoRAFALinear.from_linear(base, r=3)
    assert not layer.training
    layer(x)
    assert calls == [LoRAFALinear]
    handle.remove()
    layer(x)
    assert calls == [LoRAFALinear]


@numerics
def test_disabled_adapter_is_the_base_layer(layer, x):
    base = nn.functional.linear(x, layer.weight, layer.bias)
    with_adapter = layer(x)
    layer.adapter_enabled = False
    assert torch.equal(layer(x), base) and not torch.equal(with_adapter, base)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None and layer.lora_B.grad is None


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def patched() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x
    return linear


def integer_weight() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return linear


UNSUITABLE = {
    "not-a-linear": (lambda: nn.Conv1d(4, 4, 1), TypeError, "Conv1d is not a torch.nn.Linear"),
    "own-forward": (lambda: Scaled(4, 4), TypeError, "Scaled has a forward of its own"),
    "mha": (lambda: nn.MultiheadAttention(4, 1).out_proj, ValueError, "MultiheadAttention"),
    "parametrised": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        ValueError,
        "parametrised",
    ),
    "patched": (patched, ValueError, "patched"),
    "lazy": (lambda: nn.LazyLinear(4), ValueError, "weight is a"),
    "integer": (integer_weight, ValueError, "weight is a Parameter of torch.int8"),
}


@pytest.mark.parametrize(("make", "error", "words"), UNSUITABLE.values(), ids=UNSUITABLE)
def test_unsuitable_linears(make, error, words):
    linear = make()
    frozen = [p.requires_grad for p in linear.parameters()]
    with pytest.raises(error, match=words):
        LoRAFALinear.from_linear(linear)
    assert [p.requires_grad for p in linear.parameters()] == frozen, "a refused layer is not touched"


def test_subclasses_with_the_plain_forward_are_fine(x):
    class Named(nn.Linear):
        pass

    assert LoRAFALinear.from_linear(Named(12, 10), r=2)(x).shape == (5, 10)


def test_repr():
    text = repr(LoRAFALinear(12, 10, r=3, lora_alpha=6))
    assert "in_features=12, out_features=10, bias=True, r=3, scaling=2" in text


def test_parameters_are_read_where_an_engine_gathers_them():
    """DeepSpeed's ZeRO-3 gathers a parameter as its dict is asked for it, in [] alone."""

    class Gathering(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

        def get(self, name, default=None):
            raise AssertionError("nothing is gathered here")

    read = []
    layer = LoRAFALinear(6, 4, r=2)
    layer._parameters = Gathering(layer._parameters)
    layer(torch.randn(3, 6)).sum().backward()
    assert set(read) >= {"weight", "bias", "lora_A", "lora_B"}
    del read[:]
    operands_of(layer)
    assert set(read) >= {"weight", "bias", "lora_A", "lora_B"}


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_fsdp1_that_ignores_the_frozen_lora_A(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    layer = LoRAFALinear(6, 4, r=2, init_lora_weights=False)
    x = torch.randn(3, 6)
    layer(x).sum().backward()
    want = layer.lora_B.grad.clone()
    layer.zero_grad()
    with group(0, 1, tmp_path):
        options = {
            "use_orig_params": True,
            "device_id": torch.device("cpu"),
            "ignored_states": [layer.lora_A],
        }
        wrapped = FullyShardedDataParallel(layer, **options)
        wrapped(x).sum().backward()
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            assert_same(layer.lora_B.grad, want)
