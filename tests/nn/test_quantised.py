"""Layers on a quantised base: values beside the dense layer with the weight that it stands for, what they
keep and for how long, copies, states and errors.
"""

from __future__ import annotations

import gc
import io
import sys
from dataclasses import replace

import pytest
import torch
from accuracy import assert_same, check_budget
from conftest import implementation_cases
from saved import DenseWeights, Saved, copied, pickled
from torch import Tensor, nn

from lorafa_kernels import LoRAFALinear, LoRAFALinearGroup, explain
from lorafa_kernels.base.frozen import base_of, quantised
from lorafa_kernels.base.kinds import KINDS
from lorafa_kernels.checks.budget import draw_operands, plain_formula
from lorafa_kernels.linear.quantised import quantised_linear
from lorafa_kernels.nn.quantised import LoRAFAQuantisedLinear, QuantisedLinear

M, K, N, R = 6, 128, 40, 4
kinds = pytest.mark.parametrize("kind", KINDS)


def layers(kind="nf4", *, bias=True, dtype=torch.float32, K=K, **options):
    """A layer on a quantised base, and a dense one with the weight that it stands for, of one adapter."""
    torch.manual_seed(0)
    base = QuantisedLinear.from_linear(nn.Linear(K, N, bias=bias, dtype=dtype), kind)
    dense = LoRAFALinear.from_linear(base.to_linear(), r=R, init_lora_weights=False, **options)
    layer = LoRAFAQuantisedLinear.from_linear(base, r=R, init_lora_weights=False, **options)
    with torch.no_grad():
        dense.lora_A.copy_(layer.lora_A)
        dense.lora_B.copy_(layer.lora_B)
    return layer, dense


def results(layer: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, layer.lora_B), torch.ones_like(y))
    return dict(zip(("y", "dx", "dB"), (y.detach(), *gradients), strict=True))


@pytest.mark.numerics
@kinds
@pytest.mark.parametrize(("device", "impl"), implementation_cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_within_the_budget_of_the_dense_layer(kind, device, impl, dtype):
    # The weight that the codes stand for is the operand; the base computes with it.
    inputs = draw_operands(24, K, 64, R, dtype, device, factor_dtype=torch.float32)
    base = quantised(inputs.weight, kind)
    inputs = replace(inputs, weight=base.dense())
    x, lora_B = (tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.lora_B))
    y = quantised_linear(x, base, inputs.lora_A, lora_B, inputs.bias, scaling=inputs.scaling, impl=impl)
    dx, dB = torch.autograd.grad(y, (x, lora_B), inputs.dy)
    exact, plain = plain_formula(inputs, torch.float64), plain_formula(inputs)
    check_budget({"y": y.detach(), "dx": dx, "dB": dB}, exact, plain)


@pytest.mark.numerics
@kinds
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"gradient_correction": True}], ids=str)
@pytest.mark.parametrize("K", [128, 66])
def test_equal_to_the_dense_layer(kind, options, K):
    """On the CPU both multiply by a weight of the same bits, by the same products."""
    layer, dense = layers(kind, K=K, **options)
    x = torch.randn(2, 3, K)
    assert_same(results(layer, x), results(dense, x))
    layer.lora_B.requires_grad_(False), dense.lora_B.requires_grad_(False)
    x.requires_grad_()
    assert_same(torch.autograd.grad(layer.eval()(x).sum(), x), torch.autograd.grad(dense.eval()(x).sum(), x))
    layer.lora_B.requires_grad_(True), dense.lora_B.requires_grad_(True)
    layer(x.detach()).sum().backward()
    dense(x.detach()).sum().backward()
    assert_same(layer.lora_B.grad, dense.lora_B.grad)
    with torch.no_grad():
        assert_same(layer(x), dense(x))
    layer.adapter_enabled = dense.adapter_enabled = False
    assert_same(layer(x), dense(x))


@pytest.mark.numerics
@kinds
@pytest.mark.parametrize("shape", [(K,), (0, K), (2, 0, K), (3, 2 * K)], ids=str)
def test_inputs_of_other_shapes(kind, shape):
    """The last one is read in every second column."""
    layer, dense = layers(kind)
    x = torch.randn(shape)
    x = x[:, ::2] if shape[-1] != K else x
    assert_same(results(layer, x), results(dense, x))
    assert_same(layer(x), dense(x))


@pytest.mark.numerics
@kinds
def test_a_frozen_layer_is_the_dense_one(kind):
    layer = QuantisedLinear.from_linear(nn.Linear(K, N), kind)
    dense = layer.to_linear()
    x = torch.randn(3, 5, K, requires_grad=True)
    with Saved() as saved:
        y = layer(x)
    assert_same(y, dense(x))
    assert [id(tensor) for tensor in saved.tensors] == [id(layer.get_parameter(n)) for n in KINDS[kind].names]
    assert_same(torch.autograd.grad(y.sum(), x), torch.autograd.grad(dense(x).sum(), x))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_keeps_z_and_the_codes_and_scales_themselves(kind, dtype, autocast):
    layer, _ = layers(kind, dtype=dtype)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Saved() as saved:
        y = layer(x)
    z, *objects = saved.tensors
    assert z.shape == (M, R) and z.untyped_storage().nbytes() == z.nbytes
    own = (layer.lora_A, layer.lora_B, *(layer.get_parameter(name) for name in KINDS[kind].names))
    assert [id(tensor) for tensor in objects] == [id(parameter) for parameter in own]
    y.float().sum().backward()
    layer.lora_B.requires_grad_(False)
    with Saved() as saved:
        layer(x.detach())
    assert saved.tensors == []


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_dense_weight_at_a_time(checkpointed):
    """Over forward and backward of a whole Llama layer, and none after either."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from lorafa_kernels import LoRAFAConfig, apply_lorafa, quantize_base
    from lorafa_kernels.dispatch import only_looked_on

    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=11,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    quantize_base(model, "nf4")
    apply_lorafa(model, LoRAFAConfig(r=3, target_modules="all-linear"))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    # None is that of the chunks which dequantise computes, (N·K/64, 64).
    shapes = {(128, 128), (64, 128), (320, 128), (128, 320)}
    ids = torch.randint(0, 11, (2, 37))
    with DenseWeights(shapes) as mode, only_looked_on(operators=False):
        loss = model(ids, labels=ids).loss
        assert mode.most == 1
        loss.backward()
        assert mode.most == 1
        gc.collect()
        torch.empty(1)
        assert not mode.alive
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("lora_B"))


def test_two_dense_weights_are_counted():
    with DenseWeights({(4, 5)}) as mode:
        kept = [torch.empty(4, 5) for _ in range(2)]
    assert mode.most == len(kept)


@pytest.mark.numerics
@kinds
def test_copies_compute_the_same(kind):
    layer, _ = layers(kind)
    x = torch.randn(M, K)
    for other in (copied(layer), pickled(layer)):
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        assert_same(results(other, x), results(layer, x))
        assert repr(other) == repr(layer)
    base = QuantisedLinear.from_linear(nn.Linear(K, N), kind)
    assert_same(copied(base)(x), base(x))
    assert_same(pickled(base)(x), base(x))


@kinds
def test_state_goes_round(kind):
    layer, _ = layers(kind)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other, _ = layers(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert set(layer.state_dict()) == {"lora_A", "lora_B", "bias", *KINDS[kind].names}
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(dict(other.named_parameters()), dict(layer.named_parameters()))
    other.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(M, K)
    assert_same(other(x), layer(x))


@kinds
def test_scales_survive_every_cast(kind):
    layer, _ = layers(kind)
    before = {name: layer.get_parameter(name).clone() for name in KINDS[kind].names}
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)):
        layer = cast(layer)
        assert_same(
            {name: layer.get_parameter(name).data for name in before}, {n: p.data for n, p in before.items()}
        )
        dtype = layer.lora_A.dtype
        assert layer.dense_dtype == dtype
        assert layer(torch.randn(2, K, dtype=dtype)).dtype == dtype
    # What was rounded in between is the adapter alone.
    assert_same(layer.float().base().dense(), layers(kind)[0].base().dense())


def test_moves_and_has_no_values_on_meta():
    layer, _ = layers()
    layer.to("meta")
    assert layer.weight.is_meta and layer.absmax.is_meta
    assert layer(torch.randn(2, K, device="meta")).shape == (2, N)


@kinds
def test_codes_and_scales_cannot_be_trained(kind):
    layer, _ = layers(kind)
    with pytest.raises(RuntimeError, match=f"the {kind} base of this layer cannot be trained"):
        layer.requires_grad_(True)
    layer.requires_grad_(False)
    for name in KINDS[kind].names:
        with pytest.raises(RuntimeError, match="floating point"):
            layer.get_parameter(name).requires_grad_(True)
    with pytest.raises(RuntimeError, match="floating point"):
        nn.Sequential(layer).requires_grad_(True)


@pytest.mark.numerics
@kinds
@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_merge_to_a_dense_weight_and_back(kind, keep):
    layer, dense = layers(kind)
    x = torch.randn(M, K)
    before, parameters = layer(x), dict(layer.named_parameters())
    layer.merge(keep=keep)
    dense.merge()
    assert_same(layer.eval()(x), dense.eval()(x))
    assert list(layer._parameters) == list(parameters)
    assert_same(copied(layer)(x), dense(x))
    assert_same(layer.merged_weight(), dense.merged_weight())
    with pytest.raises(RuntimeError, match="call unmerge"):
        layer.train()(x)
    with pytest.raises(RuntimeError, match="is merged"):
        layer.state_dict()
    layer.unmerge()
    assert all(layer.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert_same(layer(x), before)


@pytest.mark.numerics
@kinds
def test_merge_quantised_again(kind):
    layer, _ = layers(kind)
    x = torch.randn(M, K)
    before, merged = layer(x), layer.merged_weight()
    again = quantised(merged, kind)
    layer.merge(requantize=True)
    assert_same([layer.get_parameter(name).data for name in KINDS[kind].names], list(again.tensors))
    with torch.no_grad():
        assert_same(layer.eval()(x), nn.functional.linear(x, again.dense(), layer.bias))
    error = (again.dense() - merged).norm() / merged.norm()
    assert_same(torch.tensor(layer.requantised_error()), error)
    assert 0 < error < 0.2
    layer.unmerge()
    assert_same(layer(x), before)


def test_merging_is_checked():
    layer, _ = layers()
    layer.adapter_enabled = False
    with pytest.raises(RuntimeError, match="is disabled"):
        layer.merge()
    layer.adapter_enabled = True
    for options in ({"requantize": 1}, {"safe_merge": None}):
        with pytest.raises(TypeError, match=next(iter(options))):
            layer.merge(**options)
    with torch.no_grad():
        layer.lora_B[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged


@kinds
def test_to_linear_gives_back_what_was_taken(kind):
    base = QuantisedLinear.from_linear(nn.Linear(K, N), kind)
    base.mark = "kept"
    calls = []
    base.register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(base.named_parameters())
    layer = LoRAFAQuantisedLinear.from_linear(base, r=R, init_lora_weights=False)
    merged = layer.merged_weight()
    back = layer.to_linear(merge=False)
    assert type(back) is QuantisedLinear and back.mark == "kept"
    assert all(back.get_parameter(name) is parameter for name, parameter in parameters.items())
    back(torch.randn(2, K))
    assert calls == [1]
    dense = layer.to_linear()
    assert type(dense) is nn.Linear and dense.mark == "kept" and not hasattr(dense, "quantised_kind")
    assert_same(dense.weight.data, merged)
    again = layer.to_linear(requantize=True)
    assert type(again) is QuantisedLinear
    assert_same(list(again.base().tensors), list(quantised(merged, kind).tensors))
    dense(torch.randn(2, K))
    assert calls == [1, 1]


@pytest.mark.numerics
def test_a_group_of_quantised_and_dense_members_computes_one_by_one():
    quantised_layer, dense = layers()
    plain = QuantisedLinear.from_linear(nn.Linear(K, 8), "int8")
    group = LoRAFALinearGroup({"q": quantised_layer, "k": dense, "v": plain})
    x = torch.randn(M, K)
    assert_same(group(x), (quantised_layer(x), dense(x), plain(x)))
    made = LoRAFALinearGroup.from_linears(
        [QuantisedLinear.from_linear(nn.Linear(K, 8), "nf4") for _ in range(2)], r=2
    )
    assert [type(member) for member in made.members] == 2 * [LoRAFAQuantisedLinear]
    with pytest.raises(ValueError, match="has dtype"):
        LoRAFALinearGroup({"q": quantised_layer, "k": nn.Linear(K, N, dtype=torch.float64)})


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["nf4-nested", "int8"])
def test_compiled_in_one_graph_that_keeps_no_dense_weight(kind):
    layer, _ = layers(kind)
    x = torch.randn(M, K, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    with Saved() as saved:
        y = compiled(x)
    assert all(tensor.numel() < N * K or tensor is layer.weight for tensor in saved.tensors)
    y.sum().backward()
    got = {"y": y.detach(), "dx": x.grad, "dB": layer.lora_B.grad}
    assert_same(got, results(layer, x))


@pytest.mark.parametrize("name", ["quantised_forward", "quantised_backward", "quantised_backward_input"])
def test_operators(name):
    layer, _ = layers("nf4-nested")
    base, dy, z = layer.base(), torch.randn(M, N), torch.randn(M, R)
    parts = (list(base.tensors), base.kind.name, base.shape, base.dtype)
    factors = (layer.lora_A, layer.lora_B.detach())
    arguments = {
        "quantised_forward": (torch.randn(M, K), *parts, *factors, layer.bias, 0.5, "auto"),
        "quantised_backward": (dy, z, *parts, *factors, 0.5, "auto"),
        "quantised_backward_input": (dy, *parts, *factors, 0.5, "auto"),
    }[name]
    torch.library.opcheck(getattr(torch.ops.lorafa_kernels, name).default, arguments)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_flops_are_those_of_the_dense_layer(kind):
    counting = pytest.importorskip("torch.utils.flop_counter")
    layer, dense = layers(kind)
    counts = []
    for one in (layer, dense):
        x = torch.randn(M, K, requires_grad=True)
        with counting.FlopCounterMode(display=False) as counter:
            one(x).sum().backward()
            one.lora_B.requires_grad_(False)
            one(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    base = QuantisedLinear.from_linear(nn.Linear(K, N), kind)
    with counting.FlopCounterMode(display=False) as counter:
        base(torch.randn(M, K, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * M * N * K


def test_explain_names_the_dequantisation():
    layer, _ = layers()
    found = explain(layer)
    for steps in (found.forward, found.backward):
        assert steps[0] == ("plain PyTorch", "weight from nf4 to float32, into a temporary")
    assert found.dtype == torch.float32
    layer.compute_dtype = torch.bfloat16
    assert explain(layer).dtype == torch.bfloat16


def test_frozen_operators():
    base = quantised(torch.randn(N, K), "int8")
    parts = (list(base.tensors), base.kind.name, base.shape, base.dtype)
    torch.library.opcheck(torch.ops.lorafa_kernels.frozen_product.default, (torch.randn(M, K), *parts, None))
    torch.library.opcheck(torch.ops.lorafa_kernels.frozen_gradient.default, (torch.randn(M, N), *parts))


def test_wrong_calls_say_what_would_be_right():
    layer, _ = layers()
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), expected \(..., 128\)"):
        layer(torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"weight has dtype torch.float32, x torch.bfloat16"):
        layer(torch.randn(2, K).bfloat16())
    with pytest.raises(TypeError, match="expected one of"):
        layer(torch.ones(2, K, dtype=torch.int64))
    layer.lora_A.requires_grad_(True)
    with pytest.raises(ValueError, match="lora_A requires grad"):
        layer(torch.randn(2, K))
    layer.lora_A.requires_grad_(False)
    layer.absmax = nn.Parameter(layer.absmax[:, :1].clone(), requires_grad=False)
    with pytest.raises(ValueError, match=r"absmax has shape \(40, 1\), expected \(40, 2\)"):
        layer(torch.randn(2, K))
    with pytest.raises(RuntimeError, match="double backward"):
        other, _ = layers()
        x = torch.randn(2, K, requires_grad=True)
        (dx,) = torch.autograd.grad(other(x).sum(), x, create_graph=True)
        dx.sum().backward()


def test_wrong_states_are_refused():
    layer, _ = layers()
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"absmax has dtype torch.float32, expected torch.int32"):
        layer.load_state_dict(state | {"absmax": state["absmax"].view(torch.float32)})
    with pytest.raises(RuntimeError, match="size mismatch for absmax"):
        layer.load_state_dict(state | {"absmax": state["absmax"][:, :1]})


def test_wrong_layers_are_refused():
    with pytest.raises(ValueError, match="no quantiser"):
        QuantisedLinear.from_linear(nn.Linear(4, 4), "nf3")
    with pytest.raises(TypeError, match=r"not a torch.nn.Linear"):
        QuantisedLinear.from_linear(nn.Identity(), "nf4")
    with pytest.raises(ValueError, match="meta device"):
        QuantisedLinear.from_linear(nn.Linear(4, 4, device="meta"), "nf4")
    with pytest.raises(TypeError, match="not a QuantisedLinear"):
        LoRAFAQuantisedLinear.from_linear(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="made from"):
        QuantisedLinear(4, 4)
    with pytest.raises(TypeError, match="made from"):
        LoRAFAQuantisedLinear(4, 4)
    base = quantised(torch.randn(4, 64), "nf4")
    wrong = base_of("nf4", (base.tensors[0], base.tensors[1][:3]), base.shape, base.dtype)
    with pytest.raises(ValueError, match="absmax has shape"):
        QuantisedLinear.from_base(wrong)
    for layer in (QuantisedLinear.from_base(base, nn.Parameter(torch.zeros(4))), layers()[0]):
        with pytest.raises(RuntimeError, match="no initialisation"):
            layer.reset_parameters()


def test_linear4bit_without_bitsandbytes(monkeypatch):
    from lorafa_kernels.base import bnb

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        bnb.to_params4bit(quantised(torch.randn(4, 64), "nf4"), nn.Linear(64, 4))
