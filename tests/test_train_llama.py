"""examples/train_llama.py: a kill, Ctrl-C or another number of processes leaves a training's losses alone."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llama_runs import ROOT, Kill, Runs

from examples import train_llama

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

KILLS = 20
SMALL = ("--device", "cpu", "--sequence", "16", "--batch", "4", "--eval-rows", "3", "--eval-every", "7")
# Dropout shows whether the random state came back, accumulation whether a step is whole.
ONE = (*SMALL, "--steps", "90", "--save-every", "2", "--dropout", "0.2", "--accumulate", "2", "--rank", "4")
TWO = (*SMALL, "--steps", "60", "--save-every", "2", "--accumulate", "2", "--rank", "4")
needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with Runs(tmp_path_factory.mktemp("runs")) as started:
        yield started


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of a training that torchrun ran on two processes, and nothing ended."""
    out = tmp_path_factory.mktemp("two") / "out"
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*command, "-m", "examples.train_llama", *TWO, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu, FSDP2" in done.stdout
    return out


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def losses(out: Path) -> list[float]:
    """Of every step, then on held-out text."""
    found = results(out)
    assert len(found["losses"]) == found["options"]["steps"]
    assert found["losses"][-1] < found["losses"][0]
    return [*found["losses"], *(loss for _, loss in found["evaluations"])]


def adapter(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def assert_near(got: list[float], want: list[float]) -> None:
    """Within what the order of an fp32 sum over processes may change."""
    assert len(got) == len(want)
    worst = max(abs(one - other) / abs(other) for one, other in zip(got, want, strict=True))
    assert worst <= 1e-6, f"{worst:.2e}"


def finish(runs: Runs, *arguments: str, processes: int | None = None) -> None:
    ended = runs.run(*arguments, processes=processes)
    assert set(ended.codes) == {0}, ended.output


def kill_often(runs: Runs, seed: int, *arguments: str, processes: int | None = None) -> list[str]:
    """Start a training, kill it, start it again, KILLS times. Returns what the runs printed."""
    draw = random.Random(seed)
    printed = []
    for kill in range(KILLS):
        # In turn between steps, while a checkpoint is written, and before the first step, while the model is
        # built and the checkpoint read.
        kind = ("step", "save", "step", "save", "start")[kill % 5]
        moment = Kill(
            steps=0 if kind == "start" else draw.randint(1, 2),
            saving=kind == "save",
            wait=draw.uniform(0, {"step": 0.03, "save": 0.01, "start": 0.4}[kind]),
            rank=draw.randrange(processes or 1),
        )
        ended = runs.run(*arguments, processes=processes, kill=moment)
        assert ended.sent and ended.codes[moment.rank] == -signal.SIGKILL, (kill, ended)
        # The other process may notice that the first is gone before it is killed, too.
        assert 0 not in ended.codes, (kill, ended)
        printed.append(ended.output[0])
    return printed


@pytest.mark.slow
@pytest.mark.numerics
def test_twenty_kills_change_no_bit_on_one_process(runs, tmp_path):
    finish(runs, *ONE, "--out", str(tmp_path / "whole"))
    printed = kill_often(runs, 0, *ONE, "--out", str(tmp_path / "killed"))
    assert sum("going on from step" in text for text in printed) > KILLS // 4
    finish(runs, *ONE, "--out", str(tmp_path / "killed"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == ["step-00000088", "step-00000090"]


@pytest.mark.slow
@pytest.mark.numerics
@needs_gloo
def test_twenty_kills_on_two_processes(runs, two_processes, tmp_path):
    out = tmp_path / "killed"
    kill_often(runs, 1, *TWO, "--out", str(out), processes=2)
    finish(runs, *TWO, "--out", str(out), processes=2)
    assert_near(losses(out), losses(two_processes))


@pytest.mark.slow
@pytest.mark.numerics
@needs_gloo
def test_two_processes_have_the_losses_of_one(runs, two_processes, tmp_path):
    finish(runs, *TWO, "--out", str(tmp_path / "one"))
    assert_near(losses(two_processes), losses(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.numerics
@needs_gloo
def test_tensor_parallel_processes_go_on_without_it(runs, tmp_path):
    """Matrices split over two processes to the end; and killed, one process, killed, split again."""
    short = (*SMALL, "--steps", "12", "--save-every", "2", "--accumulate", "2", "--rank", "4")
    split, changed = (*short, "--tensor-parallel", "2"), str(tmp_path / "changed")
    finish(runs, *short, "--out", str(tmp_path / "one"))
    finish(runs, *split, "--out", str(tmp_path / "split"), processes=2)
    assert_near(losses(tmp_path / "split"), losses(tmp_path / "one"))
    ended = runs.run(*split, "--out", changed, processes=2, kill=Kill(steps=3))
    assert ended.sent and "matrices split by 2" in ended.output[0]
    ended = runs.run(*short, "--out", changed, kill=Kill(steps=3))
    assert ended.sent and "going on from step" in ended.output[0]
    finish(runs, *split, "--out", changed, processes=2)
    assert_near(losses(tmp_path / "changed"), losses(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.numerics
@needs_gloo
def test_another_number_of_processes_goes_on(runs, two_processes, tmp_path):
    out = tmp_path / "changed"
    ended = runs.run(*TWO, "--out", str(out), processes=2, kill=Kill(steps=9))
    assert ended.sent
    ended = runs.run(*TWO, "--out", str(out), kill=Kill(steps=9))
    assert ended.sent and "going on from step" in ended.output[0]
    finish(runs, *TWO, "--out", str(out), processes=2)
    assert_near(losses(out), losses(two_processes))


@pytest.mark.slow
@pytest.mark.numerics
@needs_gloo
def test_peft_reads_the_adapter_of_two_processes(two_processes):
    """It has the loss on held-out text that the sharded model had."""
    peft = pytest.importorskip("peft")
    from examples.llama import loop, model, processes, text

    options = train_llama.parse_options(TWO)
    packed = text.pack(text.read(None), None, options.sequence, options.eval_rows)
    alone = processes.Processes(0, 1, False, torch.device("cpu"))
    base = model.build(
        "tiny",
        None,
        vocabulary=packed.vocabulary,
        sequence=options.sequence,
        seed=options.seed,
        dtype=torch.float32,
        device=alone.device,
    )
    before = loop.evaluate(base, packed.held_out, options.batch, alone)
    adapted = peft.PeftModel.from_pretrained(base, two_processes / "adapter")
    after = loop.evaluate(adapted, packed.held_out, options.batch, alone)
    assert after < before
    assert_near([after], [results(two_processes)["evaluations"][-1][1]])


@pytest.mark.slow
@pytest.mark.numerics
def test_ctrl_c_leaves_the_last_checkpoint(runs, tmp_path):
    arguments = (*SMALL, "--steps", "30", "--save-every", "4")
    finish(runs, *arguments, "--out", str(tmp_path / "whole"))
    out = tmp_path / "interrupted"
    ended = runs.run(*arguments, "--out", str(out), kill=Kill(steps=10, number=signal.SIGINT))
    assert ended.sent and ended.codes == [130]
    assert ended.output[0].splitlines()[-1].startswith("interrupted: ")
    # Neither a run of the past that was not finished may be taken for a checkpoint.
    unfinished = out / "checkpoints" / ".step-00000029.part"
    unfinished.mkdir()
    ended = runs.run(*arguments, "--out", str(out))
    assert ended.codes == [0] and "going on from step" in ended.output[0]
    assert losses(out) == losses(tmp_path / "whole")
    assert not unfinished.exists()


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(runs, tmp_path):
    arguments = (*SMALL, "--steps", "20", "--save-every", "4")
    finish(runs, *arguments, "--out", str(tmp_path / "whole"))
    out = tmp_path / "full"
    assert runs.run(*arguments, "--out", str(out), kill=Kill(steps=9)).sent
    ended = runs.run(*arguments, "--out", str(out), room=20_000)
    assert ended.codes == [1] and "Traceback" not in ended.output[0]
    assert "the checkpoint cannot be written" in ended.output[0].splitlines()[-1]
    finish(runs, *arguments, "--out", str(out))
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_what_only_the_model_or_a_checkpoint_can_tell_is_one_line_too(runs, tmp_path):
    out = ("--out", str(tmp_path))
    arguments = (*SMALL, "--steps", "12", *out)
    ended = runs.run(*arguments, "--targets", "no_such_layer")
    assert ended.codes == [2] and ended.output[0].count("\n") == 1 and "no_such_layer" in ended.output[0]
    finish(runs, *arguments)
    ended = runs.run(*arguments, "--rank", "3")
    assert ended.codes == [2] and ended.output[0].count("\n") == 1
    assert "--rank 8, not 3" in ended.output[0]
    text = tmp_path / "text"
    text.write_text("another text " * 100)
    ended = runs.run(*arguments, "--text", str(text))
    assert ended.codes == [2] and "--text None, not" in ended.output[0]


@pytest.mark.slow
@pytest.mark.numerics
@needs_gloo
def test_one_process_under_torchrun_has_the_losses_of_one_without(runs, tmp_path):
    arguments = (*SMALL, "--steps", "20")
    finish(runs, *arguments, "--out", str(tmp_path / "without"))
    finish(runs, *arguments, "--out", str(tmp_path / "under"), processes=1)
    assert_near(losses(tmp_path / "under"), losses(tmp_path / "without"))


@pytest.mark.slow
def test_a_folder_s_model_and_tokenizer(runs, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps\n" * 400)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train([str(text)], trainers.BpeTrainer(vocab_size=80, show_progress=False))
    base = tmp_path / "base"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(base)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=80, initializer_range=0.2)).save_pretrained(base)

    out = tmp_path / "out"
    folders = ("--checkpoint", str(base), "--tokenizer", str(base), "--text", str(text), "--out", str(out))
    finish(runs, *SMALL, "--steps", "20", *folders)
    assert losses(out)
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        str(base)
    )
    # Bytes need 256 tokens.
    ended = runs.run(*SMALL, "--checkpoint", str(base), "--out", str(tmp_path / "bytes"))
    assert ended.codes == [2] and ended.output[0].count("\n") == 1
    assert "80 tokens" in ended.output[0]


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        # As published.
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3-70B", 70_553_706_496),
        ("Mistral-7B", 7_241_732_096),
        # Without the norms of q and k, which a Llama does not have: 36 × 2 × 128.
        ("Qwen3-8B", 8_190_735_360 - 9_216),
    ],
)
def test_sizes_are_those_of_the_models(size, parameters):
    from transformers import LlamaForCausalLM

    from examples.llama.model import config_of

    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(size, 256, 128))
    assert sum(one.numel() for one in model.parameters()) == parameters
    assert size in train_llama.SIZES


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("--dtype", "bfloat16", "--checkpointing"), id="bf16"),
        pytest.param(("--gradient-correction", "--targets", "q_proj,down_proj"), id="correction"),
    ],
)
@needs_gloo
def test_other_options_train_on_two_processes(runs, more, tmp_path):
    arguments = (*SMALL, "--steps", "20", *more, "--out", str(tmp_path))
    finish(runs, *arguments, processes=2)
    assert losses(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(("--size", "Llama-9"), "--size", id="size"),
        pytest.param(("--rank", "0"), "--rank", id="rank"),
        pytest.param(("--dropout", "1"), "below 1", id="dropout"),
        pytest.param(("--lr", "nan"), "--lr", id="lr"),
        pytest.param(("--batch", "6", "--accumulate", "4"), "6 rows cannot be divided", id="batch"),
        pytest.param(("--tensor-parallel", "2"), "1 processes cannot be divided", id="split"),
        pytest.param(("--steps", "5", "--warmup", "5"), "--warmup", id="warmup"),
        pytest.param(("--alpha", "0", "--gradient-correction"), "--alpha", id="alpha"),
        pytest.param(("--sequence", "1"), "--sequence", id="sequence"),
        pytest.param(("--checkpoint", "nowhere"), "nowhere is not a folder", id="checkpoint"),
        pytest.param(("--text", "nowhere"), "nowhere is not a file", id="text"),
        pytest.param(("--sequence", "1000000"), "none is left to train on", id="short"),
        pytest.param(("--no-such-option",), "--no-such-option", id="unknown"),
    ],
)
def test_wrong_options_are_one_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = train_llama.main([*arguments, "--out", str(tmp_path / "out")])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and said in printed.err
    assert not (tmp_path / "out").exists()


def test_every_row_comes_once_an_epoch():
    from examples.llama.text import rows_at

    rows = rows_at(0, 30, 10, seed=3)
    assert [sorted(rows[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert rows[:10] != rows[10:20]
    assert rows_at(7, 6, 10, seed=3) == rows[7:13]
    assert rows_at(0, 10, 10, seed=4) != rows[:10]
