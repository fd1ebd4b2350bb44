"""Fused blocks of models on quantised bases: where they are placed, what they keep, when they give way."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_same, check_budget
from saved import Saved, copied, pickled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafa_kernels import (
    LoRAFAConfig,
    apply_lorafa,
    disable_adapter,
    lorafa_parameters,
    merge_adapter,
    quantize_base,
    unload_adapter,
    unmerge_adapter,
)
from lorafa_kernels.base.kinds import KINDS
from lorafa_kernels.model.placing.members import Member
from lorafa_kernels.nn.quantised import LoRAFAQuantisedLinear, QuantisedLinear

pytestmark = pytest.mark.numerics
HIDDEN, INNER, ROWS = 64, 128, (2, 9)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, n) for n in (HIDDEN, 32, 32))
        self.o = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(torch.sigmoid(q) + torch.cat([k, v], -1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def model(kind: str = "nf4", *, fuse: bool = True, skip=(), **options) -> nn.Module:
    """Attention and an MLP, adapted; before and after them others, so that x needs a gradient."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), Attention(), MLP())
    quantize_base(made, kind, skip=skip)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "init_seed": 1}
    return apply_lorafa(made, LoRAFAConfig(**config | options), fuse=fuse)


def x_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*ROWS, HIDDEN, generator=torch.Generator().manual_seed(4)).to(dtype)


def step(module: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    torch.manual_seed(7)
    y = module(x_of() if x is None else x)
    y.float().square().mean().backward()
    found = [y.detach(), *(p.grad for p in lorafa_parameters(module))]
    module.zero_grad()
    return found


def nodes(module: nn.Module, x: Tensor | None = None) -> list[str]:
    """Names of the autograd nodes of this library that forward makes."""
    found, seen = [], set()
    todo = [module(x_of() if x is None else x).grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Quantised" in type(node).__name__:
            found.append(type(node).__name__.removesuffix("Backward"))
        todo += [other for other, _ in node.next_functions]
    return sorted(found)


BLOCKS = [
    "QuantisedGatedMLPFunction",
    "QuantisedGroupFunction",
    "QuantisedLinearFunction",
    "QuantisedLinearFunction",
]
ALONE = 8 * ["QuantisedLinearFunction"]


@pytest.mark.parametrize("kind", KINDS)
def test_are_placed_and_compute_what_the_layers_do(kind):
    fused, alone = model(kind), model(kind, fuse=False)
    assert [(b.kind, b.layers) for b in fused.lorafa_report.blocks if b.fused] == [
        ("shared input", ("q", "k", "v")),
        ("MLP", ("gate", "up", "down")),
    ]
    assert nodes(fused) == BLOCKS and nodes(alone) == ALONE
    assert list(fused.state_dict()) == list(alone.state_dict())
    alone.load_state_dict(fused.state_dict())
    got, plain = step(fused), step(alone)
    with torch.no_grad():
        assert_same(fused(x_of()), alone(x_of()))
    exact = step(alone.double(), x_of().double())
    named = [{"y": y, "dB": torch.cat([dB.reshape(-1) for dB in dBs])} for y, *dBs in (got, exact, plain)]
    check_budget(*named)


def test_keep_less_than_the_layers_and_no_weight():
    kept = {}
    for fuse in (True, False):
        module = model(fuse=fuse)
        own = {id(p) for p in module.parameters()}
        with Saved() as saved:
            module(x_of())
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in saved.tensors
            if id(t) not in own
        }
        kept[fuse] = sum(storages.values())
        shapes = [tuple(t.shape) for t in saved.tensors if id(t) not in own]
        assert (INNER, HIDDEN) not in shapes and (HIDDEN, INNER) not in shapes
    # act(gate), and act(gate) · up or what silu's backward reads of it.
    rows = ROWS[0] * ROWS[1]
    assert kept[False] - kept[True] == rows * INNER * 4


@pytest.mark.parametrize("change", [copied, pickled])
def test_copies_have_blocks_of_their_own(change):
    module = model()
    other = change(module)
    assert nodes(other) == BLOCKS and isinstance(other[1].q, Member)
    assert_same(step(other), step(module))
    alone = change(module[1].q)
    assert_same(alone(x_of()), module[1].q(x_of()))


def test_the_dtype_moves():
    module, alone = model(), model(fuse=False)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        x = x_of(dtype)
        assert nodes(module.to(dtype), x) == BLOCKS
        with torch.no_grad():
            assert_same(module(x), alone.to(dtype)(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert nodes(module) == BLOCKS


def test_dropout_is_drawn_again_by_a_checkpoint():
    module = model(lora_dropout=0.3)
    assert nodes(module) == BLOCKS
    want = step(module)
    again = copied(module)
    whole = again.forward
    again.forward = lambda x: checkpoint(whole, x, use_reentrant=False)
    assert_same(step(again), want)
    assert not torch.equal(step(module.eval())[0], want[0])


def test_are_taken_out_again():
    module = model()
    with torch.no_grad():
        want = module(x_of())
    merge_adapter(module)
    module.eval()
    merged = module(x_of())
    unmerge_adapter(module)
    module.train()
    assert nodes(module) == BLOCKS
    with torch.no_grad():
        assert_same(module(x_of()), want)
    module.eval()
    assert_same(unload_adapter(copied(module))(x_of()), merged)
    unload_adapter(module, merge=False)
    assert [type(m) for m in (module[1], module[2], module[1].q)] == [Attention, MLP, QuantisedLinear]
    assert module[1].q.__dict__.keys() == QuantisedLinear.from_linear(nn.Linear(4, 4), "nf4").__dict__.keys()


def _hook(module):
    module[1].k.register_forward_hook(lambda *_: None)
    module[2].up.register_forward_hook(lambda *_: None)


def _disable(module):
    module[1].v.adapter_enabled = module[2].down.adapter_enabled = False


def _compute_wider(module):
    module[1].q.compute_dtype = module[2].gate.compute_dtype = torch.float64


def _impl(module):
    module[1].q.impl = module[2].gate.impl = "reference"


@pytest.mark.parametrize("change", [_hook, _disable, _compute_wider, _impl])
def test_give_way(change):
    module, alone = model(), model(fuse=False)
    change(module), change(alone)
    counts = [nodes(one) for one in (module, alone)]
    assert counts[0] == counts[1]
    assert_same(step(module), step(alone))


def test_give_way_where_a_parameter_is_elsewhere():
    module = model()
    module[1].v.absmax = nn.Parameter(module[1].v.absmax.to("meta"), requires_grad=False)
    assert module[1].v.base().tensors[1].is_meta
    with pytest.raises(ValueError, match="absmax is on meta"):
        module(x_of())


def test_an_mlp_gives_way_where_its_layers_compute_in_another_dtype_than_x_has():
    module = model()
    for layer in module.modules():
        if isinstance(layer, LoRAFAQuantisedLinear):
            layer.compute_dtype = torch.bfloat16
    names = nodes(module)
    assert names.count("QuantisedGroupFunction") == 1 and "QuantisedGatedMLPFunction" not in names
    with torch.autocast("cpu", torch.bfloat16):
        assert nodes(module) == BLOCKS
    alone = model(fuse=False)
    for layer in alone.modules():
        if isinstance(layer, LoRAFAQuantisedLinear):
            layer.compute_dtype = torch.bfloat16
    with torch.no_grad():
        assert_same(module(x_of()), alone(x_of()))


def test_the_adapter_is_disabled():
    module = model()
    with disable_adapter(module):
        assert "QuantisedGroupFunction" not in nodes(module)
    assert nodes(module) == BLOCKS


def reasons(module: nn.Module) -> list[str]:
    return [str(block) for block in module.lorafa_report.blocks if not block.fused]


def test_mixed_layers_stay_alone_and_the_report_says_why():
    module = model(skip=["k", "up"])
    assert [reason for reason in reasons(module) if "is quantised" in reason] == [
        "Attention, shared input: q is quantised, and k is not",
        "MLP, MLP: gate is quantised, and up is not",
        "MLP, shared input: gate is quantised, and up is not",
    ]
    alone = model(skip=["k", "up"], fuse=False)
    assert_same(step(module), step(alone))


def test_layers_of_different_compute_dtypes_stay_alone_and_the_report_says_why():
    torch.manual_seed(0)
    made = quantize_base(nn.Sequential(Attention()), "nf4")
    made[0].k.compute_dtype = torch.bfloat16
    apply_lorafa(made, LoRAFAConfig(r=4, target_modules=["q", "k", "v"]))
    assert reasons(made)[-1:] == ["Attention, shared input: q and k compute in different dtypes"]


def test_an_mlp_with_layers_without_an_adapter_is_one_node():
    module = model(target_modules=["gate", "down"])
    assert [type(module[2].up), type(module[2].gate)] == [QuantisedLinear, LoRAFAQuantisedLinear]
    assert any(block.fused and block.kind == "MLP" for block in module.lorafa_report.blocks)
    alone = model(target_modules=["gate", "down"], fuse=False)
    with torch.no_grad():
        assert_same(module(x_of()), alone(x_of()))
    x = x_of().requires_grad_()
    assert "QuantisedGatedMLPFunction" in nodes(module, x)


def test_quantise_after_placing_is_refused():
    made = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), Attention(), MLP())
    apply_lorafa(made, LoRAFAConfig(r=4, target_modules="all-linear"))
    state = copy.deepcopy(made.state_dict())
    with pytest.raises(ValueError, match="call quantize_base before apply_lorafa"):
        quantize_base(made, "nf4")
    assert_same(dict(made.state_dict()), dict(state))
