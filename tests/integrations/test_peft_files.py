"""Folders of save_adapter in PEFT's hands, and what of PEFT's folders is read here."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from accuracy import assert_same
from saved import pickled

from lorafa_kernels import LoRAFAConfig, apply_lorafa, load_adapter, save_adapter, unload_adapter

peft = pytest.importorskip("peft", reason="the files are PEFT's")
transformers = pytest.importorskip("transformers", reason="the models are transformers'")
beds = pytest.importorskip("peft_beds")


@pytest.fixture
def base_folder(tmp_path):
    beds.base("llama").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def loaded(base_folder):
    return transformers.LlamaForCausalLM.from_pretrained(base_folder)


def adapted(model, **fields):
    apply_lorafa(model, LoRAFAConfig(**{"r": 4, "target_modules": "all-linear"} | fields))
    beds.draw(model)
    return model


@pytest.mark.numerics
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_auto_classes_of_peft_load_the_folder_alone(task, base_folder, tmp_path):
    model = adapted(loaded(base_folder), task_type=task)
    save_adapter(model, tmp_path / "adapter")
    auto = peft.AutoPeftModelForCausalLM if task else peft.AutoPeftModel
    for kind in (auto, peft.AutoPeftModelForCausalLM):
        theirs = kind.from_pretrained(tmp_path / "adapter").eval()
        inputs = beds.tokens(model)
        plain, exact = theirs(**inputs)[0], copy.deepcopy(theirs).double()(**inputs)[0]
        from accuracy import check_budget

        check_budget({"y": model.eval()(**inputs)[0]}, {"y": exact}, {"y": plain})
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == base_folder and written["task_type"] == task
    assert written["auto_mapping"] == (
        None
        if task
        else {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
        }
    )


def test_the_card_says_what_hubs_read(base_folder, tmp_path):
    card = pytest.importorskip("huggingface_hub", reason="reads cards").ModelCard
    model = adapted(loaded(base_folder), task_type="CAUSAL_LM")
    save_adapter(model, tmp_path / "ours")
    theirs = peft.get_peft_model(loaded(base_folder), beds.config(task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, wanted = (card.load(tmp_path / who / "README.md").data.to_dict() for who in ("ours", "theirs"))
    assert set(wanted.pop("tags")) <= set(ours.pop("tags"))
    assert ours == wanted
    (tmp_path / "ours" / "README.md").write_text("mine")
    save_adapter(model, tmp_path / "ours")
    assert (tmp_path / "ours" / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    "way", [lambda model: model, copy.deepcopy, pickled], ids=["self", "deepcopy", "pickle"]
)
def test_save_pretrained_warns_and_says_what_to_call(way, base_folder, tmp_path):
    model = way(adapted(loaded(base_folder)))
    with pytest.warns(UserWarning, match=r"lorafa_kernels\.save_adapter\(model, folder\)"):
        model.save_pretrained(tmp_path / "whole")
    # It saved this model, and what comes back is the base: what the warning is about.
    file = pytest.importorskip("safetensors.torch").load_file(tmp_path / "whole" / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.lora_B"
    assert_same(file[key], dict(model.named_parameters())[key].data)
    assert_same(dict(loaded(tmp_path / "whole").state_dict()), dict(loaded(base_folder).state_dict()))


@pytest.mark.filterwarnings("error::UserWarning")
def test_save_pretrained_is_the_model_s_own_after_unloading(base_folder, tmp_path):
    model = unload_adapter(adapted(loaded(base_folder)))
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "merged")
    assert_same(dict(loaded(tmp_path / "merged").state_dict()), dict(model.state_dict()))


@pytest.mark.numerics
def test_a_state_dict_of_an_adapted_model_goes_into_an_adapted_one(base_folder):
    model = adapted(loaded(base_folder))
    other = adapted(loaded(base_folder))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert_same(beds.results(other.train()), beds.results(model.train()))
    missing = loaded(base_folder).load_state_dict(model.state_dict(), strict=False)
    assert missing.unexpected_keys and all("lora_" in key for key in missing.unexpected_keys)


@pytest.mark.numerics
def test_peft_s_folder_comes_back_from_here_as_it_was(base_folder, tmp_path):
    theirs = peft.get_peft_model(loaded(base_folder), beds.config(task_type="CAUSAL_LM", revision="v1"))
    beds.draw(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(load_adapter(loaded(base_folder), tmp_path / "theirs"), tmp_path / "ours")
    load = pytest.importorskip("safetensors.torch").load_file
    one, other = (load(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert_same(dict(sorted(one.items())), dict(sorted(other.items())))
    ours, wanted = (
        json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")
    )
    assert {name: wanted[name] for name in ours} == ours | {
        "target_modules": wanted["target_modules"],
        # PEFT writes what its own layers know.
        "fan_in_fan_out": wanted["fan_in_fan_out"],
    }


def extended(model, tokens=beds.VOCABULARY + 4):
    torch.manual_seed(7)
    model.resize_token_embeddings(tokens)
    return model


@pytest.mark.numerics
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.filterwarnings("error:.*had no values")
def test_an_extended_vocabulary_is_saved_with_the_adapter_and_told(when, tied, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**beds.DECODER, tie_word_embeddings=tied)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base")
    model = adapted(extended(model)) if when == "before" else extended(adapted(model))
    with pytest.warns(
        UserWarning, match=r"vocabulary has 65 tokens, the base model's 61: the embeddings are"
    ):
        save_adapter(model, tmp_path / "adapter")
    inputs = {"input_ids": torch.tensor([[3, 62, 64]])}
    wanted = model.eval()(**inputs)[0]
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    other.resize_token_embeddings(65)
    assert_same(load_adapter(other, tmp_path / "adapter").eval()(**inputs)[0], wanted)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs.resize_token_embeddings(65)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert_same(theirs.base_model.model.model.embed_tokens.weight.data, model.model.embed_tokens.weight.data)
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight has shape .*resize_token_embeddings\(65\) first"
    ):
        load_adapter(loaded(tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.numerics
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["all-linear", "lm_head"])
@pytest.mark.filterwarnings("ignore")
def test_peft_s_files_with_embeddings_are_read(targets, base_folder, tmp_path):
    theirs = peft.get_peft_model(extended(loaded(base_folder)), beds.config(target_modules=targets))
    beds.draw(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    keys = pytest.importorskip("safetensors.torch").load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert any("lm_head" in key and "lora" not in key for key in keys)
    ours = loaded(base_folder)
    ours.resize_token_embeddings(65)
    load_adapter(ours, tmp_path / "theirs")
    state = ours.state_dict()
    assert_same(state["lm_head.weight"], theirs.base_model.model.get_output_embeddings().weight.data)
    # And from here to PEFT again.
    save_adapter(ours, tmp_path / "ours")
    again = loaded(base_folder)
    again.resize_token_embeddings(65)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "ours")
    inputs = {"input_ids": torch.tensor([[3, 62, 64]])}
    assert_same(again.eval()(**inputs)[0], theirs.eval()(**inputs)[0])


@pytest.mark.numerics
@pytest.mark.filterwarnings("ignore")
def test_a_fp32_lora_A_of_a_bf16_model_keeps_its_bits(tmp_path):
    theirs = peft.get_peft_model(beds.base("llama", torch.bfloat16), beds.config())
    torch.manual_seed(0)
    with torch.no_grad():
        # As if trained: PEFT draws it in bf16.
        for name, parameter in theirs.named_parameters():
            if "lora_A" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(beds.base("llama", torch.bfloat16), tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    load = pytest.importorskip("safetensors.torch").load_file
    one, other = (load(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert_same(dict(sorted(one.items())), dict(sorted(other.items())))
    assert not model.model.layers[0].self_attn.q_proj.lora_A.requires_grad
    beds.results(model.train())
    present = apply_lorafa(beds.base("llama", torch.bfloat16), beds.config())
    with pytest.warns(UserWarning, match="and 13 more has fewer bits in the model than in the file"):
        load_adapter(present, tmp_path / "theirs")


MIXTURE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 33,
    "num_local_experts": 2,
    "eos_token_id": 2,
}


def mixture():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTURE))


@pytest.mark.filterwarnings("ignore:is_gradient", "ignore:.*is_gradient_checkpointing")
def test_experts_are_listed_and_their_files_are_told(tmp_path):
    report = adapted(mixture()).lorafa_report
    assert len(report.layers) == 4
    assert [text.partition(",")[0] for text in report.not_adapted] == [
        "MixtralTopKRouter.weight",
        "MixtralExperts.gate_up_proj",
        "MixtralExperts.down_proj",
    ]
    assert "not adapted: MixtralExperts.gate_up_proj, a stack of matrices (2, 96, 32)" in str(report)
    theirs = peft.get_peft_model(
        mixture(), beds.config(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    )
    beds.draw(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"target_parameters=.*mlp\.experts\.lora_A.*strict=False loads the rest"
    ):
        load_adapter(mixture(), tmp_path)
    with pytest.warns(UserWarning, match=r"left out, the model has no such tensor: .*experts\.lora_A"):
        model = load_adapter(mixture(), tmp_path, strict=False)
    value = dict(theirs.named_parameters())[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    ]
    assert_same(model.model.layers[0].self_attn.q_proj.lora_B.data, value.data)


class Mixture(torch.nn.Module):
    """With a router that is a linear layer."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = torch.nn.Linear(8, 2), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.experts(x) * self.router(x).softmax(-1)[..., :1]


def test_a_router_that_is_a_linear_layer_is_adapted():
    assert [layer.name for layer in adapted(Mixture()).lorafa_report.layers] == ["router", "experts"]


def llava():
    torch.manual_seed(0)
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    text = {key: value for key, value in MIXTURE.items() if key != "num_local_experts"}
    config = transformers.LlavaConfig(vision_config=vision, text_config={"model_type": "llama", **text})
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("listed", ["by ending", "in full"])
def test_keys_of_earlier_vision_language_models_are_understood(listed, tmp_path):
    """As PEFT wrote them with transformers before 4.52."""
    model = adapted(llava(), target_modules=["q_proj", "v_proj"])
    save_adapter(model, tmp_path)
    safetensors = pytest.importorskip("safetensors.torch")

    def old(name):
        name = name.replace("model.language_model.", "language_model.model.")
        return name.replace("model.vision_tower.", "vision_tower.vision_model.")

    file = tmp_path / "adapter_model.safetensors"
    prefix = "base_model.model."
    values = safetensors.load_file(file)
    renamed = {prefix + old(key.removeprefix(prefix)): value for key, value in values.items()}
    assert not renamed.keys() & values.keys()
    safetensors.save_file(renamed, file, metadata={"format": "pt"})
    if listed == "in full":
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        config["target_modules"] = [old(layer.name) for layer in model.lorafa_report.layers]
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = load_adapter(llava(), tmp_path)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
