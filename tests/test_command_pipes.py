"""A reader that has seen enough, or a full disk, ends every command without a traceback."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys

import pytest

from lorafa_kernels import command_line
from lorafa_kernels.__main__ import main, make_parser
from lorafa_kernels.command_line import FAILED, INTERRUPTED, PIPE_CLOSED

CONFIG = '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, '
CONFIG += '"num_attention_heads": 4, "vocab_size": 100}'


class Closed(io.StringIO):
    """Standard output whose reader is gone after so many lines, buffered or not."""

    def __init__(self, lines: int, buffered: bool) -> None:
        super().__init__()
        self.left, self.buffered = lines, buffered

    def write(self, text: str) -> int:
        self.left -= text.count("\n")
        if not self.buffered:
            self.flush()
        return len(text)

    def flush(self) -> None:
        if self.left < 0:
            raise BrokenPipeError(32, "Broken pipe")


@pytest.fixture
def config(tmp_path) -> str:
    (tmp_path / "config.json").write_text(CONFIG)
    return str(tmp_path)


# For each command of the program: what prints several lines, without measuring anything.
CALLS = {
    "doctor": ["doctor", "--help"],
    "memory": ["memory", "CONFIG"],
    "memory help": ["memory", "--help"],
    # By its old name it says so on stderr, but not in its help.
    "plan": ["plan", "--help"],
    "tune": ["tune", "--help"],
    "help": ["--help"],
}


def test_every_command_is_called_below():
    (action,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(action.choices) <= set(CALLS)


@pytest.mark.parametrize("buffered", [False, True], ids=["at-once", "buffered"])
@pytest.mark.parametrize("call", CALLS)
def test_a_closed_pipe_ends_a_command_quietly(monkeypatch, capsys, config, call, buffered):
    monkeypatch.setattr(sys, "stdout", Closed(0, buffered))
    code = main([config if argument == "CONFIG" else argument for argument in CALLS[call]])
    assert code == PIPE_CLOSED
    assert capsys.readouterr().err == ""


def test_a_closed_pipe_ends_the_doctor_s_report_quietly(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Closed(3, False))
    assert main(["doctor", "--device", "cpu", "--verbose"]) == PIPE_CLOSED
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["lorafa_kernels", "doctor", "--device", "cpu"], id="doctor"),
        pytest.param(["lorafa_kernels", "memory", "CONFIG"], id="memory"),
        pytest.param(["lorafa_kernels", "tune", "--help"], id="tune"),
        pytest.param(["bench", "list"], id="bench list"),
        pytest.param(["bench", "run", "--help"], id="bench run"),
        pytest.param(["bench.gate", "--help"], id="bench.gate"),
        pytest.param(["bench.launch_gate", "--help"], id="bench.launch_gate"),
        pytest.param(["bench.host_time", "--help"], id="bench.host_time"),
        pytest.param(["bench.gpu", "--help"], id="bench.gpu"),
        pytest.param(["bench.tables", "--help"], id="bench.tables"),
        pytest.param(["examples.finetune_minilm", "--help"], id="demo"),
    ],
)
def test_a_real_pipe_that_nobody_reads(config, command):
    """`command | head -0`, in the shell's way: the pipe is closed before a byte is written."""
    read, write = os.pipe()
    os.close(read)
    arguments = [config if argument == "CONFIG" else argument for argument in command]
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.path.dirname(os.path.dirname(__file__)),
        # As in a plain shell, where output waits in a buffer; unbuffered, argparse swallows the error.
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        timeout=300,
    )
    os.close(write)
    assert done.stderr == "" and done.returncode in (0, PIPE_CLOSED)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_named_in_one_line(config):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lorafa_kernels", "memory", config],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    assert done.returncode == FAILED
    assert done.stderr == "lorafa-kernels: [Errno 28] No space left on device\n"


def test_errors_of_files_are_one_line(capsys):
    def run() -> int:
        raise PermissionError(13, "Permission denied", "a\nfile")

    assert command_line.exit_code("name", run) == FAILED
    said = capsys.readouterr().err
    assert said.startswith("name: ") and said.count("\n") == 1


def test_an_interrupt_is_told_and_other_errors_are_not_hidden(capsys):
    def interrupted() -> int:
        raise KeyboardInterrupt

    def wrong() -> int:
        raise AssertionError("a fault of the program")

    assert command_line.exit_code("name", interrupted) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(AssertionError):
        command_line.exit_code("name", wrong)


def test_without_standard_output_there_is_an_answer(monkeypatch):
    """As after `>&-`, or under a graphical interpreter."""
    monkeypatch.setattr(sys, "stdout", None)
    assert command_line.exit_code("name", lambda: 3) == 3
