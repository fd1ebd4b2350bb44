"""Whole models on a quantised base: quantised in place, or as bitsandbytes leaves them."""

from __future__ import annotations

import importlib
import logging
import weakref

import pytest
import torch
from accuracy import assert_same
from saved import copied, pickled
from torch import nn

from lorafa_kernels import (
    LoRAFAConfig,
    LoRAFALinear,
    apply_lorafa,
    disable_adapter,
    load_adapter,
    lorafa_parameters,
    merge_adapter,
    quantize_base,
    save_adapter,
    unload_adapter,
    unmerge_adapter,
)
from lorafa_kernels.base.kinds import KINDS
from lorafa_kernels.nn.quantised import LoRAFAQuantisedLinear, QuantisedLinear

transformers = pytest.importorskip("transformers", reason="needs transformers")

IDS = torch.arange(18).reshape(2, 9) % 11
CONFIG = LoRAFAConfig(r=3, target_modules="all-linear", init_seed=1)


def llama(intermediate_size: int = 96, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=11,
        **changes,
    )
    return transformers.LlamaForCausalLM(config)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def trained(model: nn.Module) -> nn.Module:
    """The same with an adapter that acts."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lorafa_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def dense_twin(model: nn.Module) -> nn.Module:
    """A dense model with the weights that the base stands for."""
    twin = llama()
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            twin.get_submodule(name).weight.data = module.dense_weight()
    return twin


@pytest.mark.numerics
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_computes_and_trains_as_the_dense_model(kind, fuse):
    model = quantize_base(llama(), kind)
    layer = model.model.layers[1].mlp.down_proj
    assert type(layer) is QuantisedLinear and type(model.lm_head) is nn.Linear
    assert not any(p.requires_grad for p in layer.parameters())
    twin = dense_twin(model)
    assert_same(logits(model), logits(twin))
    for other in (model, twin):
        apply_lorafa(other, CONFIG, fuse=fuse, norm=False)
        trained(other)
    assert type(model.model.layers[1].mlp.down_proj) is LoRAFAQuantisedLinear
    placed = [(b.kind, b.layers) for b in model.lorafa_report.blocks if b.fused]
    assert placed == [(b.kind, b.layers) for b in twin.lorafa_report.blocks if b.fused]
    assert len(placed) == (4 if fuse else 0)
    results = []
    for other in (model, twin):
        loss = other(IDS, labels=IDS).loss
        loss.backward()
        results.append((loss.detach(), *(parameter.grad for parameter in lorafa_parameters(other))))
    assert_same(*results)


def test_one_dense_weight_is_freed_before_the_next_layer():
    model = llama()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    alive = [weakref.ref(linear.weight) for linear in linears]
    counts = []
    del linears
    made = QuantisedLinear.from_linear.__func__

    def counted(cls, linear, kind):
        counts.append(sum(reference() is not None for reference in alive))
        return made(cls, linear, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantisedLinear, "from_linear", classmethod(counted))
        quantize_base(model, "nf4")
    assert counts == list(range(len(alive), 0, -1))
    assert not any(reference() is not None for reference in alive)


def test_says_what_it_did(caplog):
    with caplog.at_level(logging.INFO, "lorafa_kernels"):
        model = quantize_base(llama(), "nf4")
    (text,) = caplog.messages
    assert text.startswith(
        "14 linear layers quantised to nf4: 0.2 MiB became 0.0 MiB; error of the weights 9."
    )
    apply_lorafa(model, CONFIG)
    report = str(model.lorafa_report)
    assert "2 x down_proj: 96 -> 64, r=3, scaling=2.66667, nf4 base" in report
    assert model.lorafa_report.total_parameters == sum(p.numel() for p in llama().parameters()) + sum(
        layer.lora_A.numel() + layer.lora_B.numel()
        for layer in model.modules()
        if isinstance(layer, LoRAFALinear)
    )
    assert "2 x LlamaMLP, MLP: gate_proj, up_proj, down_proj in one node" in report
    assert "2 x LlamaAttention, shared input: q_proj, k_proj, v_proj computed together" in report


def test_what_stays_dense():
    model = quantize_base(llama(), "int8", skip=["lm_head", "mlp.gate_proj"])
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    dense = [name for name, kind in kinds.items() if kind is nn.Linear]
    assert dense == ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj", "lm_head"]
    # A second call takes what is left.
    quantize_base(model, "nf4", skip=())
    assert (
        model.lm_head.quantised_kind == "nf4" and model.model.layers[0].mlp.up_proj.quantised_kind == "int8"
    )
    tied = quantize_base(llama(tie_word_embeddings=True), "nf4", skip=())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    shared = nn.ModuleDict({"a": (linear := nn.Linear(64, 64)), "b": nn.ModuleDict({"c": linear})})
    quantize_base(shared, "fp8")
    assert type(shared["a"]) is QuantisedLinear and shared["a"] is shared["b"]["c"]


def test_t5_keeps_in_fp32_what_its_class_says():
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=11, decoder_start_token_id=0
    )
    model = quantize_base(transformers.T5ForConditionalGeneration(config), "nf4")
    block = model.encoder.block[0]
    assert type(block.layer[0].SelfAttention.q) is QuantisedLinear
    assert type(block.layer[1].DenseReluDense.wo) is nn.Linear
    assert model(IDS, labels=IDS).loss.isfinite()


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["nf4-nested", "int8"])
def test_files_copies_and_states(kind, tmp_path):
    model = trained(apply_lorafa(quantize_base(llama(), kind), CONFIG))
    want = logits(model)
    assert_same(logits(copied(model)), want)
    assert_same(logits(pickled(model)), want)
    save_adapter(model, tmp_path)
    other = load_adapter(quantize_base(llama(), kind), tmp_path)
    assert_same(logits(other), want)
    # The same adapter on the dense weights that the base stands for.
    assert_same(logits(load_adapter(dense_twin(quantize_base(llama(), kind)), tmp_path)), logits(other))
    third = apply_lorafa(quantize_base(llama(), kind), CONFIG)
    third.load_state_dict(model.state_dict())
    assert_same(logits(third), want)


@pytest.mark.numerics
def test_merged_unmerged_and_unloaded(caplog):
    base = logits(quantize_base(llama(), "nf4"))
    model = trained(apply_lorafa(quantize_base(llama(), "nf4"), CONFIG)).eval()
    want = logits(model)
    with disable_adapter(model):
        assert_same(logits(model), base)
    merge_adapter(model)
    merged = logits(model)
    with disable_adapter(model):
        assert_same(logits(model), base)
    assert_same(logits(model), merged)
    unmerge_adapter(model)
    assert_same(logits(model), want)
    merge_adapter(model, requantize=True)
    (text,) = caplog.messages
    assert text.startswith("14 merged weights quantised again: off by ")
    again = logits(model)
    unmerge_adapter(model)
    assert_same(logits(model), want)
    assert_same(logits(unload_adapter(copied(model))), merged)
    assert_same(logits(unload_adapter(copied(model), requantize=True)), again)
    assert_same(logits(unload_adapter(model, merge=False)), base)
    assert type(model.model.layers[0].mlp.up_proj) is QuantisedLinear


def test_wrong_calls_change_nothing():
    model = llama()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="no quantiser 'int4'"):
        quantize_base(model, "int4")
    with pytest.raises(TypeError, match="skip must hold names"):
        quantize_base(model, "nf4", skip=[3])
    with pytest.raises(ValueError, match="no linear layer to quantise"):
        quantize_base(nn.Sequential(nn.ReLU()), "nf4")
    with pytest.raises(ValueError, match=r"itself an nn.Linear"):
        quantize_base(nn.Linear(4, 4), "nf4")
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module"):
        quantize_base(3, "nf4")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0.weight is on the meta device"):
        quantize_base(empty, "nf4")
    assert_same(dict(model.state_dict()), state)
    apply_lorafa(model, CONFIG)
    with pytest.raises(ValueError, match="call quantize_base before apply_lorafa"):
        quantize_base(model, "nf4")
    with pytest.raises(ValueError, match="no LoRA-FA layer of the model has a quantised base"):
        merge_adapter(model, requantize=True)
    with pytest.raises(ValueError, match="goes with merge=True"):
        unload_adapter(model, merge=False, requantize=True)
    broken = llama()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj: a weight that holds NaN"):
        quantize_base(broken, "nf4")


@pytest.mark.parametrize(
    ("module", "name", "text"),
    [
        ("bitsandbytes.nn.modules", "Linear8bitLt", "load_in_4bit=True"),
        ("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear", r"quantize_base\(model, 'nf4'\)"),
        ("awq.modules.linear.gemm", "WQLinear_GEMM", r"quantize_base\(model, 'nf4'\)"),
        ("transformers.integrations.finegrained_fp8", "FP8Linear", r"quantize_base\(model, 'fp8'\)"),
    ],
)
def test_layers_of_other_libraries_say_what_to_do(module, name, text):
    kind = type(name, (nn.Linear,), {"__module__": module})
    model = nn.Sequential(kind(4, 4), nn.Linear(4, 4))
    with pytest.raises(TypeError, match=f"0: .*{name} cannot be adapted, .*{text}"):
        apply_lorafa(model, LoRAFAConfig(r=2, target_modules=["0", "1"]))


def test_tensors_of_torchao_say_what_to_do():
    kind = type("Int8Tensor", (torch.Tensor,), {"__module__": "torchao.quantization"})
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4).as_subclass(kind), requires_grad=False)
    with pytest.raises(TypeError, match=r"torchao's Int8Tensor cannot be adapted, .*quantize_base"):
        apply_lorafa(model, LoRAFAConfig(r=2, target_modules=["0"]))


class TestBitsandbytes:
    """A model as from_pretrained(quantization_config=BitsAndBytesConfig(load_in_4bit=True, …)) leaves it."""

    @pytest.fixture
    def folder(self, tmp_path):
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
        pytest.importorskip("accelerate", reason="needs accelerate")
        # bitsandbytes 0.50.2 takes wrong scales on a CPU with AVX-512 where K is a multiple of 16 and not of
        # its blocks of 64, as 96.
        llama(intermediate_size=128).save_pretrained(tmp_path / "base")
        return tmp_path

    @staticmethod
    def load(folder, nested=True) -> nn.Module:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested
        )
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder / "base", quantization_config=config, dtype=torch.float32
        ).train()

    @pytest.mark.numerics
    @pytest.mark.parametrize("nested", [False, True])
    def test_is_taken_over(self, folder, nested):
        model = self.load(folder, nested)
        kind = type(model.model.layers[0].mlp.up_proj)
        assert kind.__name__ == "Linear4bit" and model.is_quantized
        want = model(IDS).logits.detach()
        before = model.model.layers[0].mlp.up_proj.weight.data_ptr()
        apply_lorafa(model, CONFIG)
        assert sum(block.fused and block.kind != "norm" for block in model.lorafa_report.blocks) == 4
        layer = model.model.layers[0].mlp.up_proj
        assert layer.quantised_kind == ("nf4-nested" if nested else "nf4")
        assert layer.weight.data_ptr() == before
        assert_same(model(IDS).logits.detach(), want)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in lorafa_parameters(model))
        save_adapter(trained(model), folder / "adapter")
        other = load_adapter(self.load(folder, nested), folder / "adapter")
        assert_same(logits(other), logits(model))
        # transformers refuses to train what it takes for bitsandbytes' own.
        assert model.is_quantized is False
        trainer_utils = importlib.import_module("transformers.trainer_utils")
        if validate := getattr(trainer_utils, "validate_quantization_for_training", None):
            validate(model)
        unload_adapter(model, merge=False)
        assert type(model.model.layers[0].mlp.up_proj) is kind and model.is_quantized is True
        assert_same(model(IDS).logits.detach(), want)
