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
