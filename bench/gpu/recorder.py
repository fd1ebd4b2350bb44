"""A plugin of pytest (-p bench.gpu.recorder): a line for each test as it ends, and none done twice.

The file, the run and the tests to leave out come in the environment variable of driver.py and in DONE. Under
xdist the main process writes. A test after which the GPU answers nothing any more ends its process: xdist
starts another worker, and a process without workers is started again by the driver.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from ..run.shell import Lines
from .driver import DONE, RESTART, VARIABLE, answers

MOST_TEXT, MOST_FAILURES_IN_FULL = 3000, 100


class Recorder(Lines):
    """What the tests of this process, or of its workers, came to."""

    def __init__(self, config: pytest.Config):
        call = json.loads(os.environ[VARIABLE])
        self.file, self.run = Path(call["file"]), call["run"]
        self.worker = hasattr(config, "workerinput")
        self.alone = not self.worker and not getattr(config.option, "numprocesses", None)
        self.lost = False
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        done = os.environ.get(DONE)
        self.done = set(json.loads(Path(done).read_text())) if done else set()

    def pytest_collection_modifyitems(self, config, items) -> None:
        left = [item for item in items if item.nodeid not in self.done]
        if len(left) < len(items):
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.done])
            items[:] = left

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.alone:
            self.write("test", name=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report) -> None:
        if self.worker:
            return
        if report.when != "call" and report.outcome == "passed":
            return
        if report.when == "teardown" and report.outcome != "failed":
            return
        self.counts[report.outcome] += 1
        more = {}
        if report.outcome == "failed" and self.counts["failed"] <= MOST_FAILURES_IN_FULL:
            more["text"] = str(report.longrepr)[-MOST_TEXT:]
        elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            more["text"] = str(report.longrepr[-1])[:300]
        self.write(
            "test", name=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), **more
        )

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        yield
        if call.excinfo is not None and not self.lost:
            self.lost = not answers()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.lost and (self.worker or self.alone):
            # Everything after it would fail in this process, and be blamed for it.
            sys.stdout.flush()
            os._exit(RESTART)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config), "lorafa-recorder")
