"""Trainer and SFTTrainer with PEFT models on these kernels: the losses of PEFT with lora_A frozen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lorafa_kernels.integrations.peft import accelerate_peft, register

peft = pytest.importorskip("peft", reason="the models are PEFT's")
transformers = pytest.importorskip("transformers", reason="the models and the Trainer are transformers'")
beds = pytest.importorskip("peft_beds")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
STEPS = 20
# Relative difference of the losses of 20 steps in fp32 that users are promised.
PROMISED = 1e-5


def rows():
    generator = torch.Generator().manual_seed(4)
    # Few, so that they can be learnt.
    ids = torch.randint(3, beds.VOCABULARY, (2, 12), generator=generator).repeat(STEPS, 1)
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]


def options(folder):
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def losses(trainer):
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == STEPS and found[-1] < found[0]
    return found


def check(got, wanted):
    assert max(abs(one - other) / other for one, other in zip(got, wanted, strict=True)) <= PROMISED


def thawed(model):
    return [n for n, p in model.named_parameters() if ".lora_A." in n and p.requires_grad]


@pytest.mark.numerics
@pytest.mark.parametrize("checkpointing", [False, True], ids=["eager", "checkpointing"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trainer(family, checkpointing, tmp_path):
    def run(model):
        arguments = transformers.TrainingArguments(**options(tmp_path), gradient_checkpointing=checkpointing)
        return losses(transformers.Trainer(model, arguments, train_dataset=rows()))

    wanted = run(beds.with_peft(family))
    for made in (beds.config, lambda **fields: register(beds.config(**fields))):
        model = peft.get_peft_model(beds.base(family), made())
        beds.draw(model)
        model = accelerate_peft(model) if made is beds.config else model
        check(run(model), wanted)
        assert not thawed(model)


@pytest.mark.numerics
@pytest.mark.parametrize("way", ["peft_config", "accelerate_peft"])
def test_sft_trainer(way, tmp_path):
    trl = pytest.importorskip("trl", reason="SFTTrainer is TRL's")
    datasets = pytest.importorskip("datasets", reason="SFTTrainer takes its datasets")
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()])
    found = []
    for ours in (False, True):
        config = beds.config()
        torch.manual_seed(0)
        trainer = trl.SFTTrainer(
            model=beds.base("llama"),
            args=trl.SFTConfig(**options(tmp_path), max_length=12),
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=register(config) if ours and way == "peft_config" else config,
        )
        beds.draw(trainer.model)
        if not ours:
            beds.freeze(trainer.model)
        elif way == "accelerate_peft":
            accelerate_peft(trainer.model)
            assert trainer.model.lorafa_report.layers
        found.append(losses(trainer))
        assert not thawed(trainer.model)
    check(*found)


@pytest.mark.numerics
@pytest.mark.parametrize("ours", [True, False], ids=["registered", "PEFT"])
def test_preferences_without_a_reference_model_leave_lora_A_alone(ours, tmp_path):
    """DPOTrainer disables the adapter in each step for the reference, whereupon PEFT trains lora_A again."""
    trl = pytest.importorskip("trl", reason="DPOTrainer is TRL's")
    datasets = pytest.importorskip("datasets", reason="DPOTrainer takes its datasets")
    row = {"prompt": "w3 w4 w5", "chosen": " w6 w7 w8", "rejected": " w9 w10 w11"}
    config = beds.config(task_type="CAUSAL_LM")
    trainer = trl.DPOTrainer(
        model=beds.base("llama"),
        args=trl.DPOConfig(**options(tmp_path) | {"max_steps": 3}, max_length=16),
        train_dataset=datasets.Dataset.from_list([row] * 8),
        processing_class=tokenizer(),
        peft_config=register(config) if ours else config,
    )
    beds.draw(trainer.model)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert {n.split(".")[-3] for n in moved} == ({"lora_B"} if ours else {"lora_A", "lora_B"})


def test_the_page_s_snippet_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="SFTTrainer is TRL's")
    page = (Path(__file__).resolve().parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```py\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    beds.base("llama").save_pretrained("base")
    names = {"tokenizer": tokenizer()}
    exec(compile(snippet, "docs/huggingface.md", "exec"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 2 and len(trainer.model.lorafa_report.layers) == 14
    assert not thawed(trainer.model)


def tokenizer():
    """One word for each number: SFTTrainer asks for a tokenizer though the data has ids already."""
    tokenizers = pytest.importorskip("tokenizers", reason="makes a tokenizer")
    words = {f"w{number}": number for number in range(beds.VOCABULARY)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
    )
