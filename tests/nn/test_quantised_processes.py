"""A quantised base under FSDP2 on two processes, and beside PEFT's QLoRA in training."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_same
from processes import start
from torch import nn

from lorafa_kernels.nn.quantised import LoRAFAQuantisedLinear, QuantisedLinear

KINDS = ("nf4", "nf4-nested", "int8", "fp8")
pytestmark = pytest.mark.slow


def model(kind: str) -> nn.Module:
    """Two layers, the second one of a flat layout: it has 66 columns."""
    torch.manual_seed(0)
    layers = [nn.Linear(128, 66), nn.Linear(66, 64)]
    adapted = [
        LoRAFAQuantisedLinear.from_linear(
            QuantisedLinear.from_linear(layer, kind), r=3, init_lora_weights=False
        )
        for layer in layers
    ]
    return nn.Sequential(*adapted)


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    module(x).square().sum().backward()
    return [layer.lora_B.grad for layer in module]


def _sharded(rank, world, folder):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for kind in KINDS:
        for policy in (None, torch.bfloat16):
            one = model(kind)
            plain = copy.deepcopy(one)
            if policy is not None:
                # The mixed precision of an engine casts what is floating point, and no scale.
                plain = plain.to(policy)
                for layer in plain:
                    layer.dense_dtype = torch.float32
                    layer.compute_dtype = policy
            options = {} if policy is None else {"mp_policy": MixedPrecisionPolicy(param_dtype=policy)}
            for layer in one:
                if policy is not None:
                    layer.compute_dtype = policy
                fully_shard(layer, **options)
            fully_shard(one, **options)
            for layer in one:
                names = [name for name, _ in layer.named_parameters()]
                assert all(hasattr(layer.get_parameter(name), "device_mesh") for name in names), names
            # The same rows on every process: the mean of their gradients is that of each.
            x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
            x = x if policy is None else x.to(policy)
            want = gradients(plain, x)
            got = [grad.full_tensor() for grad in gradients(one, x)]
            assert_same(got, [grad.to(torch.float32) for grad in want], name=f"{kind}, {policy}")
            # DDP sends codes and scales as they are.
            if policy is None:
                ddp = nn.parallel.DistributedDataParallel(model(kind))
                ddp(x).square().sum().backward()
                assert_same([layer.lora_B.grad for layer in ddp.module], want)
            # Codes and scales come back as they were.
            state = {name: p.full_tensor() for name, p in one.named_parameters()}
            before = dict(model(kind).named_parameters())
            assert_same(state, {name: p.data for name, p in before.items()})

    if importlib.util.find_spec("transformers"):
        _sharded_blocks()


def _sharded_blocks():
    """A model with groups and gated MLPs, of which each decoder layer is a unit."""
    from torch.distributed.fsdp import fully_shard

    from lorafa_kernels import LoRAFAConfig, apply_lorafa, lorafa_parameters, quantize_base

    config = LoRAFAConfig(r=3, target_modules="all-linear", init_lora_weights=False, init_seed=5)
    ids = torch.arange(24).reshape(2, 12) % 31
    found = []
    for sharded in (False, True):
        module = apply_lorafa(quantize_base(_llama(), "nf4-nested"), config)
        assert _places(module) == 2 * ["shared input", "MLP"]
        if sharded:
            for layer in module.model.layers:
                fully_shard(layer)
            fully_shard(module)
        names = []
        hook = torch.autograd.graph.saved_tensors_hooks(
            lambda t, names=names: names.append(tuple(t.shape)) or t, lambda t: t
        )
        with hook:
            loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad for p in lorafa_parameters(module)]
        gradients = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
        # The outputs of gate and up are kept, and neither their product nor x.
        found.append((loss.detach(), *gradients))
        assert names.count((24, 128)) == 4
    assert_same(*found)


def _places(module: nn.Module) -> list[str]:
    return [block.kind for block in module.lorafa_report.blocks if block.fused and block.kind != "norm"]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_fully_shard_on_two_processes_is_exact(tmp_path):
    start(_sharded, 2, tmp_path)


def _llama() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=31,
    )
    return transformers.LlamaForCausalLM(config)


def _losses(module: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    ids = torch.randint(0, 31, (4, 16), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(50):
        loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.numerics
def test_training_curves_of_peft_s_qlora(tmp_path):
    """50 steps of a small LLaMA on NF4, PEFT on bitsandbytes with lora_A frozen beside this library on the
    same codes.
    """
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    peft = pytest.importorskip("peft", reason="needs peft")
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    pytest.importorskip("accelerate", reason="needs accelerate")
    from lorafa_kernels import LoRAFAConfig, load_adapter, lorafa_parameters, save_adapter

    _llama().save_pretrained(tmp_path / "base")

    def load() -> nn.Module:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.float32
        )

    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    qlora = peft.get_peft_model(load(), peft.LoraConfig(task_type="CAUSAL_LM", **options)).train()
    qlora.save_pretrained(tmp_path / "adapter")
    for name, parameter in qlora.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    ours = load_adapter(load(), tmp_path / "adapter").train()
    assert isinstance(ours.lorafa_config, LoRAFAConfig)
    assert _places(ours) == 2 * ["shared input", "MLP"]
    trained = [p for p in qlora.parameters() if p.requires_grad]
    assert len(trained) == len(lorafa_parameters(ours)) == 14
    want, got = _losses(qlora, trained), _losses(ours, lorafa_parameters(ours))
    assert want[-1] < 0.8 * want[0], "it learns"
    assert_near(got, want)
    # PEFT reads what was trained here, on the same base.
    save_adapter(ours, tmp_path / "trained")
    theirs = peft.PeftModel.from_pretrained(load(), tmp_path / "trained").train()
    ids = torch.arange(32).reshape(2, 16) % 31
    both = [module(input_ids=ids, labels=ids).loss.item() for module in (theirs, ours)]
    assert_near(*([loss] for loss in both))


def assert_near(got: list[float], want: list[float]) -> None:
    """The promise of 50 steps: 1e-4 of the loss at each of them."""
    assert max(abs(a - b) / b for a, b in zip(got, want, strict=True)) <= 1e-4
