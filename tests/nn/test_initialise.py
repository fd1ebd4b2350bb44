"""What lora_A starts as: the same from a seed wherever and whenever it is drawn, and orthogonal if asked."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_same
from processes import start
from torch import nn

from lorafa_kernels import (
    LoRAFAConfig,
    LoRAFALinear,
    LoRAFALinearGroup,
    LoRAFASwiGLU,
    apply_lorafa,
    load_adapter,
    save_adapter,
)
from lorafa_kernels.nn.initialise import seed_for
from lorafa_kernels.nn.linear import INITIALISATIONS

pytestmark = pytest.mark.numerics


def toy(*names: str) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(12, 10) for name in names})


def adapted(model: nn.Module, **options) -> nn.Module:
    return apply_lorafa(
        model, LoRAFAConfig(**{"target_modules": "all-linear", "r": 4, "init_seed": 5} | options)
    )


@pytest.mark.parametrize("kind", INITIALISATIONS)
def test_values_of_a_seed_depend_on_the_name_and_on_nothing_else(kind):
    model = adapted(toy("a", "b", "c"), init_lora_weights=kind)
    torch.manual_seed(99)
    torch.rand(17)
    other = adapted(toy("c", "x", "a"), init_lora_weights=kind)
    for name in ("a", "c"):
        assert_same(other[name].lora_A, model[name].lora_A)
        assert_same(other[name].lora_B, model[name].lora_B)
    assert not torch.equal(model["a"].lora_A, model["b"].lora_A)
    alone = LoRAFALinear(12, 10, r=4, init_lora_weights=kind, init_seed=seed_for(5, "b"))
    assert_same(alone.lora_A, model["b"].lora_A)
    assert not torch.equal(adapted(toy("a"), init_seed=6)["a"].lora_A, model["a"].lora_A)


def test_a_seed_leaves_the_default_generator_alone():
    """What is drawn after it, dropout say, does not depend on whether a layer has a seed."""
    torch.manual_seed(1)
    linear = nn.Linear(12, 10)
    state = torch.get_rng_state()
    LoRAFALinear.from_linear(linear, r=4, init_seed=5, init_lora_weights=False)
    assert_same(torch.get_rng_state(), state)
    LoRAFALinear.from_linear(linear, r=4)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_values_of_a_seed_are_those_of_fp32_but_for_rounding(dtype):
    options = {"r": 4, "init_seed": 5}
    wide = LoRAFALinear(12, 10, dtype=torch.float64, **options).lora_A
    assert_same(LoRAFALinear(12, 10, **options).lora_A, wide.float())
    assert_same(LoRAFALinear(12, 10, dtype=dtype, **options).lora_A, wide.to(dtype))


@pytest.mark.gpu
def test_values_of_a_seed_are_the_same_on_a_gpu():
    want = LoRAFALinear(12, 10, r=4, init_seed=5).lora_A
    assert_same(LoRAFALinear(12, 10, r=4, init_seed=5, device="cuda").lora_A.cpu(), want)


@pytest.mark.parametrize("kind", INITIALISATIONS)
def test_a_layer_from_the_meta_device_gets_them_later(kind):
    options = {"r": 4, "init_seed": 5, "init_lora_weights": kind}
    layer = LoRAFALinear(12, 10, device="meta", **options).to_empty(device="cpu")
    layer.reset_parameters()
    assert_same(layer.lora_A, LoRAFALinear(12, 10, **options).lora_A)


def test_blocks_draw_by_the_names_of_their_layers():
    torch.manual_seed(0)
    mlp = LoRAFASwiGLU(12, 10, r=4, init_seed=5)
    assert_same(mlp.up_proj.lora_A, LoRAFALinear(12, 10, r=4, init_seed=seed_for(5, "up_proj")).lora_A)
    assert not torch.equal(mlp.gate_proj.lora_A, mlp.up_proj.lora_A)
    around = LoRAFASwiGLU.from_linears(
        nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 12), r=4, init_seed=5
    )
    group = LoRAFALinearGroup.from_linears({"up_proj": nn.Linear(12, 7)}, r=4, init_seed=5)
    assert_same(around.up_proj.lora_A, mlp.up_proj.lora_A)
    assert_same(group.up_proj.lora_A, mlp.up_proj.lora_A)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("r", [1, 5, 12])
def test_orthogonal_rows_are_as_long_as_kaimings(r, seed):
    options = {"r": r, "init_lora_weights": "orthogonal", "init_seed": seed, "dtype": torch.float64}
    layer = LoRAFALinear(12, 10, **options)
    A = layer.lora_A.detach()
    gram = A @ A.T - torch.eye(r, dtype=A.dtype) / 3
    assert gram.abs().max() < r * torch.finfo(A.dtype).eps
    assert not layer.lora_A.requires_grad and (layer.lora_B == 0).all()
    # Of 4,000 rows of Kaiming's, the mean square of a length is within five standard errors of 1/3.
    rows = LoRAFALinear(64, 1, r=4000, init_seed=1).lora_A.square().sum(1)
    assert (rows.mean() - 1 / 3).abs() < 5 * rows.std() / 4000**0.5


def test_more_rows_than_columns_have_orthogonal_columns():
    A = LoRAFALinear(3, 10, r=8, init_lora_weights="orthogonal", dtype=torch.float64).lora_A.detach()
    assert (A.T @ A - torch.eye(3, dtype=A.dtype) / 3).abs().max() < 8 * torch.finfo(A.dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_orthogonal_rows_are_rounded_once(dtype):
    torch.manual_seed(3)
    linear = nn.Linear(12, 10)
    state = torch.get_rng_state()
    wide = LoRAFALinear.from_linear(linear, r=4, init_lora_weights="orthogonal").lora_A
    torch.set_rng_state(state)
    narrow = LoRAFALinear.from_linear(linear.to(dtype), r=4, init_lora_weights="orthogonal").lora_A
    assert_same(narrow, wide.to(dtype))


@pytest.mark.parametrize("r", [3, 4])
def test_peft_loads_orthogonal_adapters_of_any_rank(r, tmp_path):
    """Its own initialisation of that name is another one, and refuses odd ranks."""
    peft = pytest.importorskip("peft", reason="PEFT reads the file")
    model = adapted(toy("a"), r=r, init_lora_weights="orthogonal")
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"]
    assert written == ("orthogonal" if r % 2 == 0 else True)
    theirs = peft.PeftModel.from_pretrained(toy("a"), str(tmp_path))
    assert_same(theirs.base_model.model["a"].lora_A["default"].weight, model["a"].lora_A)
    assert_same(load_adapter(toy("a"), tmp_path)["a"].lora_A, model["a"].lora_A)


def test_orthogonal_adapters_of_peft_load_here(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT writes the file")
    fields = {"r": 4, "target_modules": ["a"], "init_lora_weights": "orthogonal"}
    theirs = peft.get_peft_model(toy("a"), peft.LoraConfig(**fields))
    theirs.save_pretrained(str(tmp_path))
    layer = load_adapter(toy("a"), tmp_path)["a"]
    other = theirs.base_model.model["a"]
    assert_same(layer.lora_A, other.lora_A["default"].weight)
    assert_same(layer.lora_B, other.lora_B["default"].weight)


@pytest.mark.parametrize("seed", ["5", 1.0, True, 2**64, -(2**63) - 1, [1]])
def test_what_seeds_no_generator_is_refused(seed):
    for make in (
        lambda: LoRAFALinear(4, 4, init_seed=seed),
        lambda: LoRAFAConfig(target_modules=["a"], init_seed=seed),
        lambda: LoRAFASwiGLU(4, 4, init_seed=seed),
        lambda: LoRAFALinearGroup.from_linears([nn.Linear(4, 4)], init_seed=seed),
    ):
        with pytest.raises(ValueError, match="init_seed must be"):
            make()


@pytest.mark.parametrize("seed", [0, -(2**63), 2**64 - 1])
def test_every_seed_of_64_bits_is_taken(seed):
    assert LoRAFALinear(4, 4, r=2, init_seed=seed).lora_A.isfinite().all()
    assert adapted(toy("a"), init_seed=seed)["a"].lora_A.isfinite().all()


def _sharded(rank: int, world: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(rank)
    found = {}
    for kind in INITIALISATIONS:
        layer = fully_shard(LoRAFALinear(12, 10, r=3, device="meta", init_seed=5, init_lora_weights=kind))
        layer.to_empty(device="cpu")
        layer.reset_lora_parameters()
        found[kind] = layer.lora_A.full_tensor().detach(), layer.lora_B.full_tensor().detach()
    layer.init_seed = None
    layer.init_lora_weights = "orthogonal"
    with pytest.raises(RuntimeError, match="give the layer an init_seed"):
        layer.reset_lora_parameters()
    torch.save(found, f"{folder}/{rank}")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_ranks_draw_their_parts_of_one_matrix(tmp_path):
    start(_sharded, 2, tmp_path)
    for rank in range(2):
        for kind, got in torch.load(tmp_path / str(rank)).items():
            layer = LoRAFALinear(12, 10, r=3, init_seed=5, init_lora_weights=kind)
            assert_same(got, (layer.lora_A.detach(), layer.lora_B.detach()))
