"""The gated MLP on quantised bases: the numbers of the dense one with the weights that the bases stand for,
what is kept and for how long, and errors.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from accuracy import Budget, assert_same
from conftest import implementation_cases
from kernel_plans import grid
from saved import DenseWeights, Saved
from torch import Tensor, nn

from lorafa_kernels import LoRAFASwiGLU
from lorafa_kernels.base.frozen import QuantisedBase, quantised
from lorafa_kernels.base.kinds import KINDS
from lorafa_kernels.checks.blocks import BlockOperands, draw_block, plain_block
from lorafa_kernels.dispatch import only_looked_on
from lorafa_kernels.mlp.api import lorafa_gated_mlp
from lorafa_kernels.mlp.quantised import quantised_gated_mlp
from lorafa_kernels.nn.quantised import LoRAFAQuantisedLinear, QuantisedLinear

pytestmark = pytest.mark.numerics
implementations = pytest.mark.parametrize(("device", "impl"), implementation_cases())
M, INTERMEDIATE, K, R = 34, 128, 64, 8
MIXED = ("nf4", "int8", "nf4-nested")


def draw(
    dtype: torch.dtype, device: str, kinds: tuple[str, ...] = MIXED, seed: int = 0
) -> tuple[BlockOperands, list[QuantisedBase]]:
    """An MLP with the weights that bases stand for, which are its operands, and the bases."""
    block = draw_block("mlp", M, INTERMEDIATE, K, R, dtype, device, seed)
    bases = [quantised(m.weight, kinds[i % len(kinds)]) for i, m in enumerate(block.layers)]
    layers = [m._replace(weight=base.dense()) for m, base in zip(block.layers, bases, strict=True)]
    return replace(block, layers=layers), bases


def run(
    block: BlockOperands, weights, compute=quantised_gated_mlp, trained=(True,) * 3, need_dx=True, **options
) -> dict[str, Tensor]:
    """y, dx and the dB of the block with these weights or bases."""
    x = block.x.detach().requires_grad_(need_dx)
    layers = [
        m._replace(weight=w, lora_B=None if m.lora_B is None else m.lora_B.detach().requires_grad_(need))
        for m, w, need in zip(block.layers, weights, trained, strict=True)
    ]
    y = compute(x, *layers, **options)
    leaves = {"dx": x} | {f"dB{i}": m.lora_B for i, m in enumerate(layers) if m.lora_B is not None}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(y, list(leaves.values()), block.dys[0])
    return {"y": y.detach()} | dict(zip(leaves, found, strict=True))


def dense(block: BlockOperands, **options) -> dict[str, Tensor]:
    return run(block, [layer.weight for layer in block.layers], lorafa_gated_mlp, **options)


@grid(
    ("device,impl", implementation_cases()),
    ("dtype", [torch.float32, torch.bfloat16]),
    ("kind", [*KINDS]),
    each_once=True,
)
def test_within_the_budget_of_the_dense_mlp(device, impl, dtype, kind):
    block, bases = draw(dtype, device, (kind,))
    got = run(block, bases, impl=impl)
    dBs = [got.pop(f"dB{i}").reshape(-1) for i in range(3)]
    got["dB"] = torch.cat(dBs)
    budget = Budget()
    exact, plainly = plain_block("mlp", block, torch.float64), plain_block("mlp", block)
    budget.compare({name: tensor.reshape(exact[name].shape) for name, tensor in got.items()}, exact, plainly)
    budget.check()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("change", ["", "dropout", "corrected", "plain"])
def test_the_bits_of_the_dense_mlp(impl, activation, change):
    """Both multiply by weights of the same bits, for all gradients and for every part of them."""
    block, bases = draw(torch.float32, "cpu")
    if change == "dropout":
        block.layers = [m._replace(dropout_p=p) for m, p in zip(block.layers, (0.3, 0.0, 0.5), strict=True)]
    elif change == "corrected":
        block.layers = [m._replace(gradient_correction=True) for m in block.layers]
    elif change == "plain":
        block.layers[1] = block.layers[1]._replace(lora_A=None, lora_B=None)
    for need_dx in (True, False):
        for trained in [(True,) * 3, (False, False, True), (True, False, False)] + [(False,) * 3] * need_dx:
            how = {"impl": impl, "activation": activation, "trained": trained, "need_dx": need_dx}
            torch.manual_seed(3)
            want = dense(block, **how)
            torch.manual_seed(3)
            assert_same(run(block, bases, **how), want)


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_keeps_what_the_dense_mlp_keeps(device, impl, dtype):
    """g, u and z beside the objects themselves, with codes and scales in the place of the weights."""
    block, bases = draw(dtype, device)
    for trained, need_dx in (((True,) * 3, True), ((False, False, True), False), ((True,) * 3, False)):
        kept = []
        for weights, compute in ((bases, quantised_gated_mlp), (None, lorafa_gated_mlp)):
            weights = weights or [layer.weight for layer in block.layers]
            with Saved() as saved:
                run(block, weights, compute, trained, need_dx, impl=impl)
            codes = {id(t): i for i, base in enumerate(bases) for t in base.tensors}
            dense_weights = {id(layer.weight) for layer in block.layers}
            own = [t for t in saved.tensors if id(t) not in codes and id(t) not in dense_weights]
            of_weights = {codes[id(t)] for t in saved.tensors if id(t) in codes}
            if compute is lorafa_gated_mlp:
                of_weights = {i for i, w in enumerate(weights) if any(w is t for t in saved.tensors)}
            kept.append(([(t.shape, t.dtype, t.untyped_storage().nbytes()) for t in own], of_weights))
        assert kept[0] == kept[1]


@implementations
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_one_dense_weight_at_a_time(device, impl, dropout_p):
    """Of K = 128, where no chunk that dequantise computes has the shape of a weight."""
    block = draw_block("mlp", M, 192, 128, R, torch.float32, device)
    block.layers = [layer._replace(dropout_p=dropout_p) for layer in block.layers]
    bases = [quantised(layer.weight, "nf4") for layer in block.layers]
    interpreted = impl == "triton" and device == "cpu"
    with DenseWeights({(192, 128), (128, 192)}, interpreted) as mode, only_looked_on(operators=False):
        assert len(run(block, bases, impl=impl)) == 5
        assert mode.most == 1
        gc.collect()
        torch.empty(1)
        assert not mode.alive


def layers_on(kind: str, **options) -> list[QuantisedLinear]:
    torch.manual_seed(0)
    shapes = ((K, INTERMEDIATE), (K, INTERMEDIATE), (INTERMEDIATE, K))
    return [QuantisedLinear.from_linear(nn.Linear(*shape, **options), kind) for shape in shapes]


def by_layers(mlp: LoRAFASwiGLU, x: Tensor) -> Tensor:
    return mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def test_the_module_is_one_node_and_gives_way():
    mlp = LoRAFASwiGLU.from_linears(
        *layers_on("nf4"), r=2, init_lora_weights=False, adapt=["gate_proj", "down_proj"]
    )
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    assert type(gate) is type(down) is LoRAFAQuantisedLinear and type(up) is QuantisedLinear
    x = torch.randn(2, M, K)

    def is_one_node() -> bool:
        y = mlp(x)
        assert_same(y, by_layers(mlp, x))
        return "GatedMLP" in str(y.grad_fn.next_functions)

    assert is_one_node()
    gate.adapter_enabled = False
    assert is_one_node()
    gate.adapter_enabled = True
    for layer in (gate, up, down):
        layer.compute_dtype = torch.float32
    assert is_one_node()
    for layer in (gate, up, down):
        layer.compute_dtype = torch.float64
    assert not is_one_node()
    for layer in (gate, up):
        layer.compute_dtype = None
    down.compute_dtype = torch.float32
    assert not is_one_node()
    down.compute_dtype = None
    mlp.eval()
    for options in ({}, {"requantize": True}):
        gate.merge(**options)
        with torch.no_grad():
            assert_same(mlp(x), by_layers(mlp, x))
        gate.unmerge()
    mixed = LoRAFASwiGLU.from_linears(layers_on("nf4")[0].to_linear(), up, down, r=2)
    assert "GatedMLP" not in str(mixed(x).grad_fn.next_functions)
    assert_same(mixed(x), by_layers(mixed, x))


@pytest.mark.slow
def test_compiled_in_one_graph_that_keeps_no_dense_weight():
    mlp = LoRAFASwiGLU.from_linears(*layers_on("nf4"), r=4, init_lora_weights=False)
    compiled = torch.compile(mlp, fullgraph=True)
    x = torch.randn(M, K, requires_grad=True)
    with Saved() as saved:
        y = compiled(x)
    assert all(t.numel() <= M * INTERMEDIATE for t in saved.tensors if t.dtype != torch.uint8)
    y.square().sum().backward()
    got = [y.detach(), x.grad.clone(), *(p.grad.clone() for p in mlp.parameters() if p.requires_grad)]
    x.grad = None
    mlp.zero_grad()
    y = mlp(x)
    y.square().sum().backward()
    assert_same(got, [y.detach(), x.grad, *(p.grad for p in mlp.parameters() if p.requires_grad)])


def test_wrong_calls_say_what_would_be_right():
    block, bases = draw(torch.float32, "cpu")
    gate, up, down = (m._replace(weight=base) for m, base in zip(block.layers, bases, strict=True))

    def refused(error, text, *layers, **options):
        with pytest.raises(error, match=text):
            quantised_gated_mlp(block.x, *layers, **options)

    refused(ValueError, "activation='relu' is not known", gate, up, down, activation="relu")
    refused(TypeError, "down: weight is a Tensor, expected a QuantisedBase", gate, up, block.layers[2])
    refused(ValueError, r"up: weight has shape \(64, 128\), that of gate has \(128, 64\)", gate, down, down)
    refused(ValueError, r"down: weight has shape \(128, 64\), expected \(N, 128\)", gate, up, gate)
    wide = quantised(torch.randn(K, INTERMEDIATE, dtype=torch.float64), "nf4")
    refused(ValueError, "down: weight has dtype torch.float64", gate, up, down._replace(weight=wide))
    with pytest.raises(TypeError, match=r"gate: weight has dtype torch.float32, x torch.bfloat16"):
        quantised_gated_mlp(block.x.bfloat16(), gate, up, down)
