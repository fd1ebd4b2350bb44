"""Several adapters on one base: each acts as if it were alone, by itself and in a batch with the others."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import threading
import warnings
from collections import Counter

import pytest
import torch
from accuracy import assert_same
from conftest import DEVICES, on_device
from saved import Saved, copied, pickled
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafa_kernels import (
    LoRAFAConfig,
    LoRAFALinear,
    LoRAFALinearGroup,
    LoRAFASwiGLU,
    adapter_index,
    adapter_names,
    add_adapter,
    apply_lorafa,
    delete_adapter,
    disable_adapter,
    explain,
    load_adapter,
    lorafa_parameters,
    lorafa_state_dict,
    merge_adapter,
    quantize_base,
    save_adapter,
    set_adapter,
    unload_adapter,
    unmerge_adapter,
)
from lorafa_kernels.checks.budget import relative_error, unit_roundoff
from lorafa_kernels.integrations.checkpoints import adapted
from lorafa_kernels.mixed import ops
from lorafa_kernels.model.names import layers_of, lorafa_layers
from lorafa_kernels.model.placing import fused as placed_mlps
from lorafa_kernels.model.placing import members as placed_groups
from lorafa_kernels.nn import linear as linear_layers

pytestmark = pytest.mark.numerics
B, S = 6, 5
INDEX = ["default", "b", "c", None, "default", "b"]


class Block(nn.Module):
    """q and k share an input and are one fused group, gate, up and down a fused MLP."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.mlp = MLP()

    def forward(self, x):
        x = x + self.o(torch.tanh(self.q(x)) * self.k(x))
        return x + self.mlp(x)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 7)
        self.reentrant: bool | None = None

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


ALL = ["q", "k", "o", "gate", "up", "down"]
CONFIG = LoRAFAConfig(r=4, target_modules=ALL, init_lora_weights=False, init_seed=1)


def build(share=True, dropout=0.0, dtype=torch.float32) -> Net:
    """Adapters "default", "b" in all layers and "c" in some, with a lora_A of its own."""
    torch.manual_seed(0)
    adapter_dtype = torch.promote_types(dtype, torch.float32)
    options = {"lora_dropout": dropout, "init_lora_weights": False, "adapter_dtype": adapter_dtype}
    model = apply_lorafa(Net().to(dtype), LoRAFAConfig(r=4, target_modules=ALL, init_seed=1, **options))
    add_adapter(model, "b", LoRAFAConfig(r=4, lora_alpha=12, init_seed=2, **options), share_lora_A=share)
    add_adapter(model, "c", LoRAFAConfig(r=3, target_modules=["q", "up", "down"], init_seed=3, **options))
    return model


WIDE = torch.float64


def batch(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(B, S, 16, generator=torch.Generator().manual_seed(5)).to(dtype)


def trained(model) -> list[nn.Parameter]:
    return [p for name in adapter_names(model) for p in lorafa_parameters(model, name)]


def gradients(model, y) -> list[torch.Tensor]:
    return list(torch.autograd.grad(y.square().sum(), trained(model), allow_unused=True))


def test_names_keys_and_numbers():
    alone = apply_lorafa(Net(), CONFIG)
    model = build()
    assert adapter_names(model) == ("default", "b", "c")
    new = [key for key in model.state_dict() if key not in alone.state_dict()]
    # b shares lora_A, c has its own, and is in some layers only.
    assert {key.split("adapters.")[1] for key in new} == {"b.lora_B", "c.lora_A", "c.lora_B"}
    assert [key for key in model.state_dict() if key not in new] == list(alone.state_dict())
    assert len(lorafa_parameters(model)) == len(lorafa_parameters(model, "b")) == 12
    assert len(lorafa_parameters(model, "c")) == 6
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.endswith("lora_B"))
    layer = model.blocks[0].q
    assert layer.adapter("b").lora_A is layer.lora_A and layer.adapter("c").lora_A is not layer.lora_A
    assert model.blocks[0].k.adapter("c") is None


def test_a_model_with_one_adapter_is_as_before():
    """Also after others came and went, and batches were mixed."""
    torch.manual_seed(0)
    alone = apply_lorafa(Net(), CONFIG)
    model = copied(alone)
    add_adapter(model, "b", CONFIG)
    with adapter_index(model, ["b"] * B):
        model(batch())
    delete_adapter(model, "b")
    assert list(model.state_dict()) == list(alone.state_dict())
    assert {n: vars(m).keys() - {"_acting"} for n, m in model.named_modules()} == {
        n: vars(m).keys() for n, m in alone.named_modules()
    }
    kept = []
    for one in (alone, model):
        with Saved() as saved:
            y = one(batch())
        kept.append(([tuple(t.shape) for t in saved.tensors], y.detach(), gradients(one, y)))
    assert kept[0][0] == kept[1][0]
    assert_same(kept[1][1:], kept[0][1:])


@pytest.mark.parametrize("share", [True, False], ids=["shared-A", "own-A"])
def test_set_adapter_computes_with_it(share):
    """As a model that has this adapter alone."""
    model = build(share, dtype=WIDE)
    for name in ("default", "b", "c"):
        alone = alone_with(model, name)
        set_adapter(model, name)
        y, want = model(batch(WIDE)), alone(batch(WIDE))
        want_gradients = torch.autograd.grad(want.square().sum(), lorafa_parameters(alone))
        close(y, want)
        assert lorafa_parameters(model) == lorafa_parameters(model, name)
        got = torch.autograd.grad(y.square().sum(), lorafa_parameters(model))
        for one, exact in zip(got, want_gradients, strict=True):
            close(one, exact)
    with disable_adapter(model):
        close(model(batch(WIDE)), alone_with(model, None)(batch(WIDE)))


def alone_with(model, name: str | None) -> nn.Module:
    """A model that has one adapter of `model` as its own, or none."""
    state = {k: v for k, v in model.state_dict().items() if "lora_" not in k}
    base = Net().to(model.head.weight.dtype)
    base.load_state_dict(state)
    if name is None:
        return base
    holders = layers_of(model, name)
    some = next(iter(holders.values()))
    alone = apply_lorafa(
        base,
        LoRAFAConfig(
            r=some.r,
            lora_alpha=some.lora_alpha,
            target_modules=list(holders),
            lora_dropout=some.lora_dropout,
            adapter_dtype=some.lora_B.dtype,
        ),
    )
    for where, layer in lorafa_layers(alone).items():
        with torch.no_grad():
            layer.lora_A.copy_(holders[where].lora_A)
            layer.lora_B.copy_(holders[where].lora_B)
    return alone.train(model.training)


@pytest.mark.parametrize("share", [True, False], ids=["shared-A", "own-A"])
def test_mixed_batch_against_separate_runs(share):
    """Each sample's y, and the gradients of each adapter, as a run of those samples alone gives them."""
    model = build(share, dtype=WIDE)
    with adapter_index(model, INDEX):
        y = model(batch(WIDE))
    found = dict(zip(adapter_names(model), _by_adapter(model, gradients(model, y)), strict=True))
    for name in (*adapter_names(model), None):
        own = torch.tensor([entry == name for entry in INDEX])
        alone = alone_with(model, name)
        want = alone(batch(WIDE))
        close(y[own], want[own])
        if name is not None:
            loss = want[own].square().sum()
            for got, exact in zip(
                found[name], torch.autograd.grad(loss, lorafa_parameters(alone)), strict=True
            ):
                close(got, exact)


def _by_adapter(model, values):
    values = iter(values)
    return [[next(values) for _ in lorafa_parameters(model, name)] for name in adapter_names(model)]


def close(got, want):
    """The same in fp64 but for the order of sums: closer than fp32 could tell."""
    assert got.dtype == want.dtype == torch.float64 and got.shape == want.shape
    assert relative_error(got, want) <= unit_roundoff(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_a_mixed_batch_keeps(dtype):
    """For each layer one z and the index that all share, beside what the model itself keeps."""
    model = build(dtype=dtype)
    layer = model.blocks[0].q
    x = batch(dtype).requires_grad_()
    with adapter_index(model, INDEX), Saved() as saved:
        y = layer(x)
    own = {id(p) for p in model.parameters()}
    z, index = (t for t in saved.tensors if id(t) not in own)
    assert (z.shape, z.dtype, index.shape, index.dtype) == ((B * S, 4), dtype, (B,), torch.int32)
    with adapter_index(model, INDEX), Saved() as saved:
        model(x)
    indices = {t.data_ptr() for t in saved.tensors if t.dtype == torch.int32}
    assert len(indices) == 1
    assert y.dtype == dtype


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
@pytest.mark.parametrize("thread", [False, True], ids=["same-thread", "other-thread"])
def test_checkpointing_meets_the_same_index(reentrant, inside, thread):
    """Forward runs again within backward, which may be in a thread of its own, with and without dropout."""
    for dropout in (0.0, 0.3):
        model = build(dtype=WIDE, dropout=dropout)
        x = batch(WIDE).requires_grad_()

        def run(index, reentrant, inside, model=model, x=x):
            model.reentrant = reentrant
            model.zero_grad()
            x.grad = None
            torch.manual_seed(3)
            with adapter_index(model, index) if index else contextlib.nullcontext():
                y = model(x)
                if inside:
                    backward(y)
            if not inside:
                backward(y)
            return [y.detach(), x.grad, *(p.grad for p in trained(model))]

        def backward(y):
            if not thread:
                y.square().sum().backward()
                return
            other = threading.Thread(target=lambda: y.square().sum().backward())
            other.start()
            other.join()

        # A batch, the next with another index, and then one adapter, whose forward runs again as well.
        for index in (INDEX, INDEX[::-1], None):
            got, want = run(index, reentrant, inside), run(index, None, True)
            for one, exact in zip(got, want, strict=True):
                if exact is None:
                    assert one is None
                else:
                    close(one, exact)


def test_two_indices_in_one_backward():
    """Gradients of two mixed batches whose checkpoints run again in one backward."""
    model = build(dtype=WIDE)
    x = batch(WIDE).requires_grad_()

    def run(reentrant):
        model.reentrant = reentrant
        model.zero_grad()
        ys = []
        for index in (INDEX, INDEX[::-1]):
            with adapter_index(model, index):
                ys.append(model(x))
        sum(y.square().sum() for y in ys).backward()
        return [p.grad for p in trained(model)]

    want = run(None)
    for reentrant in (True, False):
        for got, exact in zip(run(reentrant), want, strict=True):
            close(got, exact)


def test_an_unknown_index_within_backward_is_an_error():
    """A part of the model was called, whose outputs nothing watches."""
    model = build()
    block, x = model.blocks[0], batch().requires_grad_()
    with adapter_index(model, INDEX):
        y = checkpoint(block, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="runs again within backward"):
        y.sum().backward()


@pytest.mark.slow
def test_compiled_layers_take_the_index():
    model = build(dtype=WIDE)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for index in (None, INDEX, INDEX[::-1], None):
        if index is None:
            close(compiled(batch(WIDE)), model(batch(WIDE)))
            continue
        with adapter_index(model, index):
            y, want = compiled(batch(WIDE)), model(batch(WIDE))
        close(y, want)
        for got, exact in zip(gradients(model, y), gradients(model, want), strict=True):
            close(got, exact)
    set_adapter(model, "b")
    close(compiled(batch(WIDE)), model(batch(WIDE)))
    torch._dynamo.reset()


def test_fused_blocks_give_way_to_a_mixed_batch_alone(monkeypatch):
    model = build()
    fused = [block for block in model.lorafa_report.blocks if block.fused]
    assert {block.kind for block in fused} == {"MLP", "shared input"}
    called = []

    def watch(module, name):
        true = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **kwargs: called.append(name) or true(*args, **kwargs)
        )

    watch(placed_mlps, "lorafa_gated_mlp")
    watch(placed_groups, "lorafa_linear_group")
    watch(linear_layers, "lorafa_linear_mixed")

    def calls():
        called.clear()
        model(batch())
        return Counter(called)

    blocks = {"lorafa_gated_mlp": 2, "lorafa_linear_group": 2}
    assert calls() == blocks
    with adapter_index(model, INDEX):
        assert calls() == {"lorafa_linear_mixed": 12}
    assert calls() == blocks
    set_adapter(model, "b")
    assert calls() == blocks


def test_blocks_of_their_own_take_further_adapters_and_an_index():
    torch.manual_seed(0)
    options = {"r": 3, "init_lora_weights": False}
    group = LoRAFALinearGroup.from_linears(
        {"q": nn.Linear(16, 16), "k": nn.Linear(16, 8)}, share_A=True, **options
    )
    mlp = LoRAFASwiGLU(16, 24, **options)
    model = nn.ModuleDict({"group": group, "mlp": mlp})
    add_adapter(model, "b", LoRAFAConfig(r=2, init_lora_weights=False))
    model.to(WIDE)
    x = batch(WIDE)

    def compute():
        return [*group(x), mlp(x)]

    alone = {}
    for name in ("default", "b"):
        set_adapter(model, name)
        alone[name] = compute()
        for layer, y in zip(group.members, alone[name], strict=False):
            close(layer(x), y)
    close(mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)), alone["b"][2])
    with adapter_index(model, ["default", "b"] * 3):
        mixed = compute()
    for y, one, other in zip(mixed, alone["default"], alone["b"], strict=True):
        close(y[::2], one[::2])
        close(y[1::2], other[1::2])


def test_merging_takes_the_active_adapter():
    model = build(dtype=WIDE).eval()
    for name in ("default", "b", "c"):
        set_adapter(model, name)
        want = model(batch(WIDE))
        before = {n: p.clone() for n, p in model.named_parameters()}
        merge_adapter(model)
        close(model(batch(WIDE)), want)
        with pytest.raises(RuntimeError, match="merged"):
            set_adapter(model, "default")
        with pytest.raises(RuntimeError, match="merged"), adapter_index(model, INDEX):
            pass
        unmerge_adapter(model)
        assert_same(dict(model.named_parameters()), before)
        unloaded = unload_adapter(copied(model))
        close(unloaded(batch(WIDE)), want)
        assert list(unloaded.state_dict()) == list(Net().state_dict())
    with adapter_index(model, INDEX), pytest.raises(RuntimeError, match="mixed batch"):
        merge_adapter(model)


def test_an_index_that_inference_met_first_serves_training():
    model = build(dtype=WIDE)
    with adapter_index(model, INDEX):
        with torch.inference_mode():
            want = model(batch(WIDE))
        y = model(batch(WIDE))
    close(y, want.clone())
    assert all(g.isfinite().all() for g in gradients(model, y))


def test_disabled_within_a_mixed_batch_is_the_base():
    model = build()
    with adapter_index(model, INDEX), disable_adapter(model):
        y = model(batch())
    assert_same(y.detach(), alone_with(model, None)(batch()).detach())


def test_contexts_nest_and_end_with_an_error():
    model = build(dtype=WIDE)
    with adapter_index(model, ["b"] * B):
        with adapter_index(model, ["default"] * B):
            inner = model(batch(WIDE))
        outer = model(batch(WIDE))
        with pytest.raises(KeyError), adapter_index(model, INDEX):
            raise KeyError
        assert_same(model(batch(WIDE)).detach(), outer.detach())
    close(inner, model(batch(WIDE)))
    set_adapter(model, "b")
    close(outer, model(batch(WIDE)))
    assert not model._forward_hooks


@pytest.mark.parametrize("copy_of", [copied, pickled, copy.deepcopy])
def test_copies_have_adapters_of_their_own(copy_of):
    model = build()
    set_adapter(model, "b")
    other = copy_of(model)
    layer = other.blocks[0].q
    assert layer.adapter().layer is layer and layer.adapter("b").lora_A is layer.lora_A
    assert_same(other(batch()).detach(), model(batch()).detach())
    with torch.no_grad():
        layer.adapter("b").lora_B.zero_()
    assert model.blocks[0].q.adapter("b").lora_B.any()


def test_to_and_state_dict_reach_all_adapters():
    model, other = build(), build()
    for parameter in trained(other):
        nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    assert_same(dict(other.named_parameters()), dict(model.named_parameters()))
    model.to(torch.float64)
    assert {p.dtype for p in trained(model)} == {torch.float64}
    assert model.blocks[0].q.adapter("b").lora_A is model.blocks[0].q.lora_A
    model.eval()
    assert not model.blocks[0].q.adapter("b").training


def test_files_of_each_adapter_reload_here_and_in_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT reads the files")
    model = build(dtype=WIDE).eval()
    for parameter in trained(model):
        # In fp32, as loading gives it back.
        parameter.data = parameter.data.float()
    with adapter_index(model, INDEX):
        mixed = model(batch(WIDE))
    with warnings.catch_warnings():
        # All lora_B require grad, and none of them is missing in a file.
        warnings.simplefilter("error")
        for name in adapter_names(model):
            save_adapter(model, tmp_path / name, adapter=name)
    loaded = alone_with(model, None).eval()
    load_adapter(loaded, tmp_path / "default")
    for name in ("b", "c"):
        load_adapter(loaded, tmp_path / name, adapter=name)
        assert_same(lorafa_state_dict(loaded, name), lorafa_state_dict(model, name))
    assert adapter_names(loaded) == adapter_names(model)
    with adapter_index(loaded, INDEX):
        assert_same(loaded(batch(WIDE)).detach(), mixed.detach())
    theirs = peft.PeftModel.from_pretrained(
        alone_with(model, None), str(tmp_path / "default"), adapter_name="first"
    )
    for name in ("b", "c"):
        theirs.load_adapter(str(tmp_path / name), adapter_name=name)
    theirs.eval()
    named = {"default": "first", None: "__base__"}
    y = theirs(batch(WIDE), adapter_names=[named.get(entry, entry) for entry in INDEX])
    close(mixed, y)
    # A file without a name is that of the active adapter.
    set_adapter(model, "c")
    save_adapter(model, tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        tmp_path / "c/adapter_model.safetensors"
    ).read_bytes()


def test_loading_into_adapters_that_are_there(tmp_path):
    model = build()
    save_adapter(model, tmp_path / "b", adapter="b")
    save_adapter(model, tmp_path / "c", adapter="c")
    want = {name: lorafa_state_dict(model, name) for name in ("b", "c")}
    want = {name: {k: v.clone() for k, v in state.items()} for name, state in want.items()}
    with torch.no_grad():
        for name in ("b", "c"):
            for parameter in lorafa_parameters(model, name):
                parameter.zero_()
    for name in ("b", "c"):
        load_adapter(model, tmp_path / name, adapter=name)
        assert_same(lorafa_state_dict(model, name), want[name])
    with torch.no_grad():
        model.blocks[0].q.lora_A.mul_(2)
    before = copied(model).state_dict()
    with pytest.raises(ValueError, match="default, b share"):
        load_adapter(model, tmp_path / "b", adapter="b")
    with pytest.raises(ValueError, match="r=3 in the file"):
        load_adapter(model, tmp_path / "c", adapter="default")
    with pytest.raises(ValueError, match="first adapter"):
        load_adapter(alone_with(model, None), tmp_path / "b", adapter="b")
    assert_same(model.state_dict(), before)
    load_adapter(model, tmp_path / "b", adapter="d")
    assert adapter_names(model) == ("default", "b", "c", "d")


def test_a_trainer_s_checkpoint_would_lose_what_others_train():
    """It is the file of the active adapter."""
    model = build()
    with pytest.raises(ValueError, match=r"adapters\.b\.lora_B.* be missing in the checkpoint"):
        adapted(model, "this")
    for name in ("b", "c"):
        for parameter in lorafa_parameters(model, name):
            parameter.requires_grad_(False)
    assert adapted(model, "this") is model


def test_peft_writes_what_is_added(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT writes the file")
    model = build(dtype=WIDE)
    config = peft.LoraConfig(r=5, target_modules=["q", "down"], init_lora_weights=False)
    theirs = peft.get_peft_model(alone_with(model, None), config).eval()
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path, adapter="theirs").eval()
    set_adapter(model, "theirs")
    close(model(batch(WIDE)), theirs(batch(WIDE)))


WRONG_INDEX = {
    "too-large": (torch.tensor([0, 1, 2, 3, 0, 0]), ValueError, r"index\[3\] is 3"),
    "too-small": ([0, 0, 0, 0, 0, -2], ValueError, r"index\[5\] is -2"),
    "dtype": (torch.zeros(B), ValueError, "float32"),
    "shape": (torch.zeros(B, S, dtype=torch.long), ValueError, "shape"),
    "device": (torch.zeros(B, dtype=torch.long, device="meta"), ValueError, "index is on meta"),
    "name": (["b", "x", "b", "b", "b", "b"], ValueError, "no adapter 'x'"),
    "a-string": ("b", TypeError, "str"),
}


@pytest.mark.parametrize("case", WRONG_INDEX)
def test_a_wrong_index_is_told_before_anything_is_computed(monkeypatch, case):
    index, kind, text = WRONG_INDEX[case]
    model = build()
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    monkeypatch.setattr(ops.library, "forward", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(kind, match=text), adapter_index(model, index):
        model(batch())
    assert {name: vars(module) for name, module in model.named_modules()} == before


def test_wrong_lengths_and_implementations(monkeypatch):
    model = build(dtype=WIDE)
    monkeypatch.setattr(ops.library, "forward", lambda *_: pytest.fail("something was computed"))
    with adapter_index(model, INDEX[:-1]), pytest.raises(ValueError, match="5 entries"):
        model(batch(WIDE))
    for layer in lorafa_layers(model).values():
        layer.impl = "triton"
    with adapter_index(model, INDEX), pytest.raises(RuntimeError, match='impl="triton" cannot run'):
        model(batch(WIDE))


def test_wrong_adapters():
    model = build()
    before = model.state_dict().keys(), adapter_names(model)
    wrong = {
        "already has": lambda: add_adapter(model, "b", CONFIG),
        "already has an adapter 'default'": lambda: add_adapter(model, "default", CONFIG),
        "cannot be called": lambda: add_adapter(model, "a.b", CONFIG),
        "an attribute of": lambda: add_adapter(model, "forward", CONFIG),
        "or __base__": lambda: add_adapter(model, "__base__", CONFIG),
        "shared lora_A has r=4": lambda: add_adapter(model, "d", LoRAFAConfig(r=5), share_lora_A=True),
        "is not adapted": lambda: add_adapter(model, "d", LoRAFAConfig(target_modules=["head"])),
        "matches no module": lambda: add_adapter(model, "d", LoRAFAConfig(target_modules=["nothing"])),
        "modules_to_save": lambda: add_adapter(model, "d", LoRAFAConfig(modules_to_save=["head"])),
        "no adapter 'x'": lambda: set_adapter(model, "x"),
        "no adapter None": lambda: set_adapter(model, None),
        "layers' own adapter": lambda: delete_adapter(model, "default"),
        "no adapter 'y'": lambda: delete_adapter(model, "y"),
        "no adapter 'z'": lambda: lorafa_parameters(model, "z"),
        "no LoRA-FA layer": lambda: add_adapter(nn.Linear(2, 2), "b", CONFIG),
    }
    for text, call in wrong.items():
        with pytest.raises(ValueError, match=text):
            call()
    set_adapter(model, "b")
    with pytest.raises(ValueError, match="is active"):
        delete_adapter(model, "b")
    set_adapter(model, "default")
    with adapter_index(model, INDEX), pytest.raises(RuntimeError, match="within adapter_index"):
        delete_adapter(model, "b")
    assert (model.state_dict().keys(), adapter_names(model)) == before
    # What fails in the second layer leaves none in the first.
    mixed_ranks = apply_lorafa(Net(), LoRAFAConfig(r=4, target_modules=["q", "k"], rank_pattern={"k": 2}))
    with pytest.raises(ValueError, match=r"blocks\.0\.k: share_lora_A"):
        add_adapter(mixed_ranks, "b", LoRAFAConfig(r=4), share_lora_A=True)
    assert adapter_names(mixed_ranks) == ("default",)


def test_an_adapter_may_have_the_name_of_a_layer(tmp_path):
    model = build()
    add_adapter(model, "down", LoRAFAConfig(r=2))
    add_adapter(model, "d", LoRAFAConfig(r=2, target_modules=["down"]))
    assert set(layers_of(model, "d")) == {f"blocks.{i}.mlp.down" for i in range(2)}
    save_adapter(model, tmp_path)
    alone = copied(model)
    for name in ("down", "d"):
        delete_adapter(alone, name)
    save_adapter(alone, tmp_path / "alone")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_layers_on_a_quantised_base_have_one_adapter():
    model = apply_lorafa(quantize_base(Net(), "int8"), LoRAFAConfig(r=2, target_modules=["q"]))
    with pytest.raises(ValueError, match=r"blocks\.0\.q has a quantised base"):
        add_adapter(model, "b", LoRAFAConfig(r=2))
    with pytest.raises(ValueError, match="quantised base"), adapter_index(model, [0] * B):
        pass
    with pytest.raises(ValueError, match="quantised base"):
        model.blocks[0].q.add_adapter("b")
    assert adapter_names(model) == ("default",)


def test_thawed_lora_A_is_an_error():
    model = build()
    model.blocks[0].q.adapter("c").lora_A.requires_grad_()
    set_adapter(model, "c")
    with pytest.raises(ValueError, match="lora_A requires grad"):
        model(batch())
    set_adapter(model, "default")
    with adapter_index(model, INDEX), pytest.raises(ValueError, match="lora_A requires grad"):
        model(batch())


def test_explain_says_what_runs():
    model = build()
    layer = model.blocks[0].q
    with adapter_index(model, INDEX):
        told = explain(layer)
    assert told.impl == "torch" and "never timed on a GPU" in told.reason
    assert any("rows of each adapter" in step.formula for step in told.forward)
    if importlib.util.find_spec("triton"):
        with adapter_index(model, INDEX):
            told = explain(layer, impl="triton", dtype=torch.float32)
        assert told.impl == "triton" and "mixed_expand (Triton)" in str(told)
        steps = [step.call for step in (*told.forward, *told.backward)]
        assert steps == ["mixed_shrink", "mixed_expand", "mixed_grad", "mixed_shrink", "mixed_expand"]
    set_adapter(model, "c")
    assert explain(layer).R == 3
    assert explain(model.blocks[0].k).impl == "linear"
    with adapter_index(model, INDEX), pytest.raises(RuntimeError, match='impl="triton" cannot run'):
        explain(layer, impl="triton", dtype=torch.float64)


def test_a_layer_by_itself():
    layer = LoRAFALinear(6, 8, r=2, init_lora_weights=False).to(WIDE)
    layer.add_adapter("b", r=3, init_lora_weights=False)
    layer.to(WIDE)
    x = torch.randn(4, 6, dtype=WIDE)
    with adapter_index(layer, [0, 1, -1, 1]):
        y = layer(x)
    close(y[0], layer(x)[0])
    set_adapter(layer, "b")
    close(y[[1, 3]], layer(x)[[1, 3]])
    with disable_adapter(layer):
        close(y[2], layer(x)[2])


def llama():
    transformers = pytest.importorskip("transformers", reason="the model is Llama's")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


STEPS, ROWS = 20, 3


def texts(seed):
    return torch.randint(64, (STEPS, ROWS, 12), generator=torch.Generator().manual_seed(seed))


def losses_of(logits, tokens):
    """The mean loss of next tokens of each sample."""
    flat = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    return flat.view(len(tokens), -1).mean(1)


def assert_near(loss, exact):
    """Within the 1e-5 in 20 steps that is promised of losses."""
    assert abs(loss - exact) <= 1e-5 * exact


def optimizer_of(name, parameters):
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, lr={"sgd": 0.1, "adamw": 1e-2}[name])


@pytest.mark.parametrize(
    ("optimizer", "checkpointing", "share"),
    [
        pytest.param("adamw", None, True, id="adamw-shared-A"),
        pytest.param("sgd", True, False, id="sgd-reentrant", marks=pytest.mark.slow),
        pytest.param("adamw", False, False, id="adamw-non-reentrant", marks=pytest.mark.slow),
    ],
)
def test_two_trainings_at_once_have_the_losses_of_two(tmp_path, optimizer, checkpointing, share):
    """fp32, 20 steps: losses within 1e-5 of those of two runs; the files reload in PEFT."""
    peft = pytest.importorskip("peft", reason="PEFT reads the files")
    configs = [
        LoRAFAConfig(r=4, lora_alpha=alpha, target_modules="all-linear", init_seed=1 if share else seed)
        for alpha, seed in ((8, 1), (16, 2))
    ]
    data = [texts(1), texts(2)]
    want = []
    for config, tokens in zip(configs, data, strict=True):
        model = apply_lorafa(llama(), config).train()
        step = optimizer_of(optimizer, lorafa_parameters(model))
        losses = []
        for part in tokens:
            loss = losses_of(model(part).logits, part).mean()
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(loss.item())
        want.append(losses)

    model = apply_lorafa(llama(), configs[0]).train()
    add_adapter(model, "second", configs[1], share_lora_A=share)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    steps = [optimizer_of(optimizer, lorafa_parameters(model, name)) for name in adapter_names(model)]
    # Samples of both in turn, so that no adapter's rows follow each other.
    index = torch.tensor([0, 1] * ROWS)
    got = [[], []]
    for parts in zip(*data, strict=True):
        tokens = torch.stack(parts, dim=1).flatten(0, 1)
        with adapter_index(model, index):
            logits = model(tokens).logits
        losses = losses_of(logits, tokens)
        both = losses[0::2].mean(), losses[1::2].mean()
        model.zero_grad()
        sum(both).backward()
        for step in steps:
            step.step()
        for kept, loss in zip(got, both, strict=True):
            kept.append(loss.item())
    for name, losses, alone in zip(adapter_names(model), got, want, strict=True):
        for loss, exact in zip(losses, alone, strict=True):
            assert_near(loss, exact)
        assert losses[0] != losses[-1]
        save_adapter(model, tmp_path / name, adapter=name)
        loaded = peft.PeftModel.from_pretrained(llama().double(), str(tmp_path / name)).eval()
        wide = set_adapter(copied(model).double().eval(), name)
        with torch.no_grad():
            close(wide(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize("device", [on_device(device, id=device) for device in DEVICES])
def test_autocast_on_both_devices(device):
    model = build().to(device)
    x = batch().to(device)
    index = torch.tensor([0, 1, 2, -1, 0, 1], device=device, dtype=torch.int32)
    with torch.autocast(device, torch.bfloat16), adapter_index(model, index):
        y = model(x)
    assert y.dtype == torch.bfloat16
    found = gradients(model, y.float())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found)
