"""Runs of examples/train_llama.py that a test may kill: `Runs` in the test, this file the program behind it.

The program imports what a run needs, then forks for every process of every run: each starts as a new one
does, without the seconds that the imports take. It has computed nothing itself. A request is a line of JSON,
and so is the answer.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Far beyond what any run takes.
PATIENCE_S = 240.0
_STEP = re.compile(rb"(\d+)/\d+ \[")


@dataclass(frozen=True)
class Kill:
    """When to send `number` to the process of `rank`: `wait` seconds after the progress line has shown that
    `steps` steps of this run are done, with 0 after the start; `saving`: and after the next checkpoint was
    begun. The others are killed then, as torchrun does.
    """

    steps: int = 0
    wait: float = 0.0
    saving: bool = False
    rank: int = 0
    number: int = signal.SIGKILL


class Ended(NamedTuple):
    """codes: exit statuses by rank, −N for a process that the signal N ended; sent: whether the signal met a
    process that was running; output: what rank 0 has printed, then the others.
    """

    codes: list[int]
    sent: bool
    output: list[str]


class Runs:
    """Starts runs one after another; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Runs:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=self._folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def run(
        self, *arguments: str, processes: int | None = None, kill: Kill | None = None, room: int | None = None
    ) -> Ended:
        """Run the example with `arguments`; processes: as under torchrun, None: without it; room: the bytes
        that a file may have, as a full disk has it.
        """
        request = {"arguments": arguments, "count": processes, "kill": kill and asdict(kill), "room": room}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


def _serve() -> None:
    # What a run imports, before any thread has started.
    import pydoc_data.topics  # noqa: F401

    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import examples.train_llama  # noqa: F401
    from examples.llama import checkpoints, loop, model, processes, text  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        request["kill"] = Kill(**request["kill"]) if request["kill"] else None
        ended = _run(**request)
        print(json.dumps(ended._asdict()), flush=True)


def _run(arguments: list[str], count: int | None, kill: Kill | None, room: int | None) -> Ended:
    logs = [Path(f"log-{rank}") for rank in range(count or 1)]
    port = _free_port()
    pids = [
        _start(arguments, {} if count is None else _as_torchrun(rank, count, port), log, room)
        for rank, log in enumerate(logs)
    ]
    codes: dict[int, int] = {}
    sent, end = False, time.monotonic() + PATIENCE_S
    due = first = None
    checkpoints = Path(arguments[arguments.index("--out") + 1], "checkpoints")
    present: set[str] = _names(checkpoints)
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
        shown = _steps_shown(logs[0])
        first = shown if first is None else first
        before, present = present, _names(checkpoints)
        if kill and due is None and (kill.steps == 0 or (shown or 0) - (first or 0) >= kill.steps):
            due = time.monotonic() + kill.wait if not kill.saving or present - before else None
        if kill and not sent and due is not None and time.monotonic() >= due and kill.rank not in codes:
            os.kill(pids[kill.rank], kill.number)
            sent = True
        # One that failed or was killed: the others would wait for it.
        if any(codes.values()) or time.monotonic() > end:
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    return Ended([codes[rank] for rank in range(len(pids))], sent, [log.read_text("utf-8") for log in logs])


def _start(arguments: list[str], variables: dict[str, str], log: Path, room: int | None) -> int:
    log.write_bytes(b"")
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        from examples.train_llama import NAME, exit_code, main

        os.environ.update(variables)
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = exit_code(NAME, lambda: main(arguments))
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _as_torchrun(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _steps_shown(log: Path) -> int | None:
    shown = _STEP.findall(log.read_bytes())
    return int(shown[-1]) if shown else None


if __name__ == "__main__":
    _serve()
