"""Trainer on models of apply_lorafa: its checkpoints are the adapter, and a training that was interrupted
ends with the bits of one that was not.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from accuracy import assert_same
from torch import nn

from lorafa_kernels import LoRAFAConfig, apply_lorafa, load_adapter, lorafa_state_dict, save_adapter
from lorafa_kernels.integrations import transformers as ours
from lorafa_kernels.integrations.transformers import AdapterCheckpoints, adapter_checkpoints
from lorafa_kernels.model.names import lorafa_layers

peft = pytest.importorskip("peft", reason="its losses are compared")
transformers = pytest.importorskip("transformers", reason="the models and the Trainer are transformers'")
beds = pytest.importorskip("peft_beds")

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 6
# Relative difference of the losses of 20 steps in fp32 that users are promised.
PROMISED = 1e-5
CHECKPOINT = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
}


def rows(count=12):
    ids = torch.randint(3, beds.VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]


def adapted(seed=0, **fields):
    """A model whose lora_A differs from seed to seed; with dropout, which shows whether random state came
    back.
    """
    base = beds.base("llama")
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1} | fields
    return apply_lorafa(base, LoRAFAConfig(**config))


def arguments(folder, **fields):
    options = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**options | fields)


def trainer(folder, model=None, **fields):
    model = adapted() if model is None else model
    return transformers.Trainer(
        model, arguments(folder, **fields), train_dataset=rows(), eval_dataset=rows(4)
    )


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def trained(folder, **fields):
    done = adapter_checkpoints(trainer(folder, **fields))
    done.train()
    return done


def same(resumed, whole):
    assert losses(resumed) == losses(whole) and len(losses(whole)) == STEPS
    assert_same(lorafa_state_dict(resumed.model), lorafa_state_dict(whole.model))


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
WAYS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": REENTRANT,
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True},
}


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_training_has_the_bits_of_one_that_was_not_interrupted(way, tmp_path):
    fields, rest = WAYS[way], {"modules_to_save": ["lm_head"]} if way == "plain" else {}
    whole = trained(tmp_path / "whole", model=adapted(**rest), **fields)
    assert all(layer.lora_B.any() for layer in lorafa_layers(whole.model).values())
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    # By its path, too, where that costs least.
    for wanted in (True, tmp_path / "cut" / "checkpoint-2")[: 1 + (way == "plain")]:
        resumed = trainer(tmp_path / "cut", model=adapted(seed=9, **rest), **fields)
        adapter_checkpoints(resumed).train(resume_from_checkpoint=wanted)
        same(resumed, whole)


@pytest.mark.slow
def test_a_checkpoint_is_the_adapter_and_as_large(tmp_path):
    done = trained(tmp_path, model=adapted(modules_to_save=["lm_head"]), save_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    checkpoint = tmp_path / "checkpoint-6"
    assert {path.name for path in checkpoint.iterdir()} == CHECKPOINT
    save_adapter(done.model, tmp_path / "adapter")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (checkpoint / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    # What AdamW keeps: two moments of what is trained, in fp32; the rest is a few numbers per parameter.
    moments = 8 * sum(p.numel() for p in done.model.parameters() if p.requires_grad)
    state = torch.load(checkpoint / "optimizer.pt")["state"].values()
    assert sum(v.nbytes for entry in state for v in entry.values() if v.numel() > 1) == moments
    done.save_model(str(tmp_path / "model"))
    assert {p.name for p in (tmp_path / "model").iterdir()} == {p for p in CHECKPOINT if "." in p} - {
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }
    fresh = load_adapter(beds.base("llama"), tmp_path / "model")
    assert_same(lorafa_state_dict(fresh), lorafa_state_dict(done.model))


@pytest.mark.slow
@pytest.mark.numerics
def test_the_best_model_comes_back_at_the_end(tmp_path):
    # The worst by its loss is the first one.
    fields = {"metric_for_best_model": "loss", "greater_is_better": True, "save_total_limit": 2}
    done = trained(tmp_path, **WAYS["evaluation"], **fields)
    assert Path(done.state.best_model_checkpoint).name == "checkpoint-2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]
    best, last = (
        lorafa_state_dict(load_adapter(beds.base("llama"), tmp_path / name))
        for name in ("checkpoint-2", "checkpoint-6")
    )
    assert_same(lorafa_state_dict(done.model), best)
    assert any(not torch.equal(best[key], last[key]) for key in best)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing interrupted."""
    return trained(tmp_path_factory.mktemp("whole"), save_strategy="no")


class Killed(BaseException):
    """Nobody catches it."""


def kill(*args, **kwargs):
    raise Killed


def half_a_state(state, path):
    Path(path).write_text('{"global_step": 4,')
    raise Killed


MOMENTS = {
    "before the adapter": (ours, "save_adapter", kill),
    "before the optimizer": (transformers.Trainer, "_save_optimizer_and_scheduler", kill),
    "in the state": (transformers.trainer_callback.TrainerState, "save_to_json", half_a_state),
}


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_checkpoint_that_was_interrupted_is_left_out(moment, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    owner, name, killer = MOMENTS[moment]
    original, calls = getattr(owner, name), []

    def second_time(*args, **kwargs):
        calls.append(args)
        return killer(*args, **kwargs) if len(calls) == 2 else original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, second_time)
        trained(out)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    with pytest.raises(ValueError, match=r"checkpoint-4 (was interrupted|holds no adapter|holds an adapter)"):
        adapter_checkpoints(trainer(out)).train(resume_from_checkpoint=str(out / "checkpoint-4"))
    resumed = adapter_checkpoints(trainer(out, model=adapted(seed=9)))
    with pytest.warns(UserWarning, match="checkpoint-4 was interrupted while it was written .*: left out"):
        resumed.train(resume_from_checkpoint=True)
    same(resumed, whole)
    shutil.rmtree(out / "checkpoint-2")
    for folder in out.iterdir():
        (folder / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is finished"):
        adapter_checkpoints(trainer(out)).train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.numerics
def test_forgotten_the_whole_model_is_saved_with_a_warning_and_can_be_taken_up(tmp_path):
    forgotten = trainer(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        forgotten.train()
    told = [str(w.message) for w in caught if "adapter_checkpoints" in str(w.message)]
    assert len(told) == 1 and "without the adapter" in told[0]
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    resumed = adapter_checkpoints(trainer(tmp_path, model=adapted(seed=9)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same(resumed, forgotten)
    for fields, message in (
        ({"r": 2}, r"has .*lora_A of shape \(4, 64\), the model \(2, 64\): adapt the model with the r"),
        ({"target_modules": ["q_proj"]}, r"has .*lora_[AB], which the model has not: adapt the model with"),
    ):
        other = adapted(seed=9, **fields)
        before = lorafa_state_dict(other)
        before = {name: value.clone() for name, value in before.items()}
        with pytest.raises(ValueError, match=message):
            adapter_checkpoints(trainer(tmp_path, model=other)).train(str(tmp_path / "checkpoint-2"))
        assert_same(lorafa_state_dict(other), before)


def test_a_checkpoint_that_is_written_again_is_not_whole_before_its_end(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    adapter_checkpoints(trainer(tmp_path))._save(str(folder))
    names = {path.name for path in folder.iterdir()}
    assert "adapter_model.safetensors" in names and "trainer_state.json" not in names


class Plain(nn.Module):
    """No PreTrainedModel: Trainer saves its state dict, whatever its methods are called."""

    def save_pretrained(self, folder):
        raise AssertionError("Trainer does not call it")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(beds.VOCABULARY, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, beds.VOCABULARY)

    def forward(self, input_ids, labels, attention_mask=None):
        logits = self.head(self.inner(self.embedding(input_ids)).relu())
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


@pytest.mark.slow
@pytest.mark.numerics
def test_a_model_that_is_not_transformers(tmp_path):
    def made(seed):
        torch.manual_seed(seed)
        config = LoRAFAConfig(r=2, target_modules=["inner"], modules_to_save=["head"], lora_dropout=0.1)
        return apply_lorafa(Plain(), config)

    whole = trained(tmp_path, model=made(0))
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} == CHECKPOINT
    for later in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / later)
    resumed = adapter_checkpoints(trainer(tmp_path, model=made(9)))
    resumed.train(resume_from_checkpoint=True)
    same(resumed, whole)


@pytest.mark.slow
def test_as_a_base_class_and_beside_what_else_saves(tmp_path):
    class Theirs(transformers.Trainer):
        def _save(self, output_dir=None, state_dict=None):
            super()._save(output_dir, state_dict)
            (Path(output_dir) / "theirs").touch()

    class Mine(AdapterCheckpoints, Theirs):
        pass

    words = tokenizer()
    done = Mine(adapted(), arguments(tmp_path, max_steps=2), train_dataset=rows(), processing_class=words)
    assert adapter_checkpoints(done) is done and type(done) is Mine
    done.train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert names >= CHECKPOINT | {"theirs", "tokenizer.json"} and "model.safetensors" not in names
    # Outside of checkpoints save_pretrained is as before.
    with pytest.warns(UserWarning, match="save_pretrained writes the base model"):
        done.model.save_pretrained(tmp_path / "all")
    assert (tmp_path / "all" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="holds no LoRA-FA layer"):
        Mine(beds.base("llama"), arguments(tmp_path), train_dataset=rows()).train()


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers", reason="makes a tokenizer")
    words = {f"w{number}": number for number in range(beds.VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w2")


@pytest.mark.slow
def test_without_its_optimizer_a_checkpoint_warns(tmp_path):
    trained(tmp_path, save_only_model=True)
    again = adapter_checkpoints(trainer(tmp_path, save_only_model=True))
    with pytest.warns(UserWarning, match=r"has no optimizer state \(save_only_model=True\)"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(losses(again)) == STEPS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    trained(out, max_steps=2)
    return out / "checkpoint-2"


FITS_NOT = {
    "rank": ({"r": 8}, r"cannot go on from .*checkpoint-2: model.* has r=8 in the model, r=4 in the file"),
    "alpha": ({"lora_alpha": 32}, "has scaling=8.0 in the model, 2.0 in the file.*says with which r"),
    "fewer targets": (
        {"target_modules": ["q_proj"]},
        "is unexpected: the model has no such tensor.*target_mod",
    ),
    "more": ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing.*resume from another checkpoint"),
}


@pytest.mark.parametrize("case", FITS_NOT)
def test_the_checkpoint_of_another_configuration_is_refused(case, checkpoint):
    fields, message = FITS_NOT[case]
    model = adapted(**fields)
    before = {name: tensor.clone() for name, tensor in lorafa_state_dict(model).items()}
    with pytest.raises(ValueError, match=message):
        adapter_checkpoints(trainer(checkpoint.parent, model=model)).train(resume_from_checkpoint=True)
    assert_same(lorafa_state_dict(model), before)


def test_folders_that_are_no_checkpoints_are_refused(checkpoint, tmp_path):
    def resume(folder):
        adapter_checkpoints(trainer(tmp_path)).train(resume_from_checkpoint=folder)

    with pytest.raises(FileNotFoundError, match=r"nothing is not a folder: pass a checkpoint-<step> folder"):
        resume(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no adapter .*: pass one of checkpoint-2 in it"):
        resume(checkpoint.parent)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        resume(True)
    save_adapter(adapted(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter and no training to go on with"):
        resume(tmp_path / "adapter")
    beds.base("llama").save_pretrained(tmp_path / "base")
    shutil.copy(checkpoint / "trainer_state.json", tmp_path / "base")
    with pytest.raises(ValueError, match=r"whole model without model\.layers\.0\.self_attn\.q_proj\.lora_A"):
        resume(tmp_path / "base")
    for damage, message in (("unlink", "is missing"), ("cut", "is damaged")):
        broken = Path(shutil.copytree(checkpoint, tmp_path / damage))
        weights = broken / "adapter_model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        if damage == "cut":
            weights.write_bytes(content[:-100])
        with pytest.raises((ValueError, FileNotFoundError), match=f"cannot go on from .*{message}"):
            resume(broken)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_what_has_no_adapter_to_save_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"must be a transformers\.Trainer, got LlamaForCausalLM"):
        adapter_checkpoints(adapted())
    theirs = peft.get_peft_model(beds.base("llama"), beds.config())
    with pytest.raises(
        ValueError, match=r"PEFT's, whose own save_pretrained .*leave out adapter_checkpoints"
    ):
        adapter_checkpoints(trainer(tmp_path, model=theirs))
    plain = trainer(tmp_path, model=beds.base("llama"))
    with pytest.raises(ValueError, match="holds no LoRA-FA layer: call apply_lorafa"):
        adapter_checkpoints(plain)
    assert type(plain) is transformers.Trainer
    thawed = adapted()
    thawed.model.norm.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight would be trained and be missing .*modules_to_s"
    ):
        adapter_checkpoints(trainer(tmp_path, model=thawed))
    sharded = trainer(tmp_path)
    sharded.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"under FSDP checkpoints are those of FSDP.*save_adapter"):
        adapter_checkpoints(sharded)


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_losses_are_those_of_peft_with_lora_A_frozen(kind, tmp_path):
    steps = {"max_steps": 20, "save_strategy": "no", "learning_rate": 1e-2}
    model = adapted(lora_dropout=0.0)
    found = []
    for one in (beds.twin(model, beds.base("llama")), model):
        if kind == "SFTTrainer":
            trl = pytest.importorskip("trl", reason="SFTTrainer is TRL's")
            datasets = pytest.importorskip("datasets", reason="SFTTrainer takes its datasets")
            options = trl.SFTConfig(**arguments(tmp_path, **steps).to_dict() | {"max_length": 12})
            data = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()])
            done = trl.SFTTrainer(one, options, train_dataset=data, processing_class=tokenizer())
        else:
            done = trainer(tmp_path, model=one, **steps)
        if one is model:
            adapter_checkpoints(done)
        done.train()
        found.append(losses(done))
    assert len(found[0]) == 20 and found[0][-1] < found[0][0]
    assert max(abs(a - b) / b for a, b in zip(*found, strict=True)) <= PROMISED
