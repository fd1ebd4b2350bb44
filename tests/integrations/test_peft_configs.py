"""What people paste from PEFT: its LoraConfig, its fields, its defaults per architecture, its task types."""

from __future__ import annotations

import importlib.util
import json
import warnings

import pytest
import torch
from accuracy import assert_same, check_budget
from torch import nn

from lorafa_kernels import (
    LoRAFAConfig,
    apply_lorafa,
    disable_adapter,
    load_adapter,
    lorafa_parameters,
    merge_adapter,
    save_adapter,
    unload_adapter,
    unmerge_adapter,
)
from lorafa_kernels.model.names import lorafa_layers
from lorafa_kernels.nn.conv1d import LoRAFAConv1D

peft = pytest.importorskip("peft", reason="the configs are PEFT's")
transformers = pytest.importorskip("transformers", reason="the models are transformers'")
beds = pytest.importorskip("peft_beds")

HEADS = {
    "SEQ_CLS": ("BertForSequenceClassification", "classifier"),
    "TOKEN_CLS": ("BertForTokenClassification", "classifier"),
    "QUESTION_ANS": ("BertForQuestionAnswering", "qa_outputs"),
}


def bert(kind):
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(**beds.FAMILIES["bert"][1]))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear", "r": 4, "lora_alpha": 32, "use_rslora": True},
        {
            "target_modules": ["v_proj", "q_proj"],
            "rank_pattern": {"layers.0.*q_proj": 2},
            "lora_dropout": 0.1,
        },
        {"target_modules": None, "task_type": "CAUSAL_LM", "layers_to_transform": 1},
    ],
    ids=["all-linear", "patterns", "default"],
)
def test_a_lora_config_adapts_what_peft_adapts(fields):
    config = peft.LoraConfig(**fields)
    theirs = peft.get_peft_model(beds.base("llama"), peft.LoraConfig(**fields))
    ours = lorafa_layers(apply_lorafa(beds.base("llama"), config))
    wanted = {
        name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for name, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert {name: (layer.r, layer.scaling) for name, layer in ours.items()} == wanted


# Keywords that say nothing here, and one that changes the mathematics, of each kind.
NEUTRAL = {
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "inference_mode": True,
    "base_model_name_or_path": "some/model",
    "revision": "main",
    "fan_in_fan_out": True,
    "loftq_config": {"loftq_bits": 4},
    "use_dora": False,
    "lora_bias": False,
    "target_parameters": None,
    "megatron_core": "megatron.core",
}


def test_neutral_fields_are_kept_and_written_back(tmp_path):
    model = apply_lorafa(beds.base("llama"), LoRAFAConfig(target_modules=["q_proj"], **NEUTRAL))
    save_adapter(model, tmp_path)
    other = load_adapter(beds.base("llama"), tmp_path)
    save_adapter(other, tmp_path / "again")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written == json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    for name in ("task_type", "base_model_name_or_path", "revision", "loftq_config", "bias"):
        assert written[name] == NEUTRAL[name], name
    theirs = peft.LoraConfig.from_pretrained(tmp_path)
    assert theirs.task_type == "CAUSAL_LM" and theirs.target_modules == {"q_proj"}
    assert other.lorafa_config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("target_parameters", ["experts.up"]),
        ("trainable_token_indices", [1]),
        ("layer_replication", [(0, 1)]),
        ("init_lora_weights", "pissa"),
        ("task_type", "DANCING"),
        ("ensure_weight_tying", True),
        ("adapter_dtype", torch.int8),
    ],
)
def test_fields_that_change_the_mathematics_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        LoRAFAConfig(target_modules="all-linear", **{name: value})
    if name in ("use_dora", "lora_bias", "bias", "init_lora_weights"):
        with pytest.raises(ValueError, match=name):
            apply_lorafa(beds.base("llama"), peft.LoraConfig(target_modules=["q_proj"], **{name: value}))


def test_other_configs_of_peft_are_refused():
    for config in (peft.IA3Config(), peft.AdaLoraConfig(total_step=9), 3):
        with pytest.raises((TypeError, ValueError), match=r"must be a LoRAFAConfig|peft_type is"):
            apply_lorafa(beds.base("llama"), config)


def test_no_target_modules_are_peft_s_for_the_architecture_or_all_linear(monkeypatch):
    config = LoRAFAConfig()
    assert {n.rpartition(".")[2] for n in lorafa_layers(apply_lorafa(beds.base("llama"), config))} == {
        "q_proj",
        "v_proj",
    }
    with pytest.raises(ValueError, match=r"target_modules must say.*no default for a model without"):
        apply_lorafa(nn.Sequential(nn.Linear(2, 2)), config)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    assert len(lorafa_layers(apply_lorafa(beds.base("llama"), config))) == 14


def test_adapter_dtype():
    config = LoRAFAConfig(target_modules="all-linear", adapter_dtype=torch.bfloat16)
    model = apply_lorafa(beds.base("llama", torch.bfloat16), config)
    assert {p.dtype for p in lorafa_parameters(model)} == {torch.bfloat16}


@pytest.mark.parametrize("task", HEADS)
def test_heads_are_trained_and_saved_as_peft_does(task, tmp_path):
    kind, head = HEADS[task]
    config = {"r": 4, "target_modules": ["query", "value"], "task_type": task}
    theirs = peft.get_peft_model(bert(kind), peft.LoraConfig(**config))
    ours = apply_lorafa(bert(kind), peft.LoraConfig(**config))
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_B" not in n} == {f"{head}.weight", f"{head}.bias"}
    assert trained == {
        beds.plain_name(n.replace("modules_to_save.default.", ""))
        for n, p in theirs.named_parameters()
        if p.requires_grad and "lora_A" not in n
    }
    with torch.no_grad():
        for parameter in lorafa_parameters(ours):
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    load = pytest.importorskip("safetensors.torch").load_file
    files = [load(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    saved = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert saved[0]["modules_to_save"] == saved[1]["modules_to_save"]
    assert saved[0]["task_type"] == task
    loaded = peft.PeftModel.from_pretrained(bert(kind), tmp_path / "ours").eval()
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    # The same head on the same last states but for rounding: the head's own tensors are the same bits.
    own = {n: p for n, p in loaded.named_parameters() if f"{head}.modules_to_save.default." in n}
    for name, parameter in own.items():
        short = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        assert_same(parameter.data, dict(ours.named_parameters())[short].data)
    assert loaded(**inputs)[0].shape == ours.eval()(**inputs)[0].shape
    again = load_adapter(bert(kind), tmp_path / "theirs")
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained


def test_a_head_that_was_newly_initialised_is_told(tmp_path):
    bert("BertModel").save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    config = {"target_modules": ["query"]}
    with pytest.warns(UserWarning, match=r"no values for classifier: .*modules_to_save=\['classifier'\]"):
        apply_lorafa(model, LoRAFAConfig(**config))
    for more in ({"modules_to_save": ["classifier"]}, {"task_type": "SEQ_CLS"}):
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            apply_lorafa(model, LoRAFAConfig(**config, **more))


def test_a_tied_output_embedding_warns():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**beds.DECODER, tie_word_embeddings=True))
    with pytest.warns(UserWarning, match=r"lm_head shares its weight with model\.embed_tokens"):
        apply_lorafa(model, LoRAFAConfig(target_modules=["lm_head"]))


def test_a_model_of_peft_is_told_what_to_call():
    model = beds.with_peft("llama")
    with pytest.raises(ValueError, match=r"PEFT's already.*integrations\.peft\.accelerate_peft\(model\)"):
        apply_lorafa(model, LoRAFAConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"accelerate_peft"):
        apply_lorafa(model.base_model.model, LoRAFAConfig(target_modules="all-linear"))


@pytest.mark.numerics
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_conv1d_of_gpt2_is_adapted_in_place(impl):
    model = beds.base("gpt2")
    weights = {n: p for n, p in model.named_parameters() if n.endswith("weight")}
    apply_lorafa(model, LoRAFAConfig(target_modules=["c_attn"], init_lora_weights=False))
    layer = model.transformer.h[0].attn.c_attn
    assert type(layer) is LoRAFAConv1D and layer.weight is weights["transformer.h.0.attn.c_attn.weight"]
    if impl == "triton":
        pytest.importorskip("triton")
    for other in lorafa_layers(model).values():
        other.impl = impl
    x = torch.randn(3, 5, 64)
    with torch.no_grad():
        got = layer(x)
        wanted = x @ layer.weight + layer.bias + layer.scaling * (x @ layer.lora_A.mT) @ layer.lora_B.mT
        exact = x.double() @ layer.weight.double() + layer.bias.double()
        exact += layer.scaling * (x.double() @ layer.lora_A.double().mT) @ layer.lora_B.double().mT
    check_budget({"y": got}, {"y": exact}, {"y": wanted})


@pytest.mark.numerics
def test_a_conv1d_merges_unloads_and_is_disabled():
    model = apply_lorafa(
        beds.base("gpt2"), LoRAFAConfig(target_modules="all-linear", init_lora_weights=False)
    )
    model.eval()
    inputs = beds.tokens(model)
    adapted, plain = model(**inputs)[0], beds.base("gpt2").eval()(**inputs)[0]
    with disable_adapter(model):
        assert_same(model(**inputs)[0], plain)
    layer, product = model.transformer.h[0].attn.c_attn, {}
    for dtype in (torch.float32, torch.float64):
        A, B, weight = (t.detach().to(dtype) for t in (layer.lora_A, layer.lora_B, layer.weight))
        product[dtype] = {"merged": weight + layer.scaling * (B @ A).mT}
    merge_adapter(model)
    check_budget({"merged": layer.weight.detach()}, product[torch.float64], product[torch.float32])
    unmerge_adapter(model)
    assert_same(model(**inputs)[0], adapted)
    unload_adapter(model, merge=False)
    assert_same(model(**inputs)[0], plain)
    assert [type(m) for m in model.modules()] == [type(m) for m in beds.base("gpt2").modules()]
