"""Several writers of the user's table: no entry is lost, no name is shared, no link is followed."""

from __future__ import annotations

import os
import stat
import threading
import time

import pytest
import torch

from lorafa_kernels import files
from lorafa_kernels.plan.config import KNOWN_DEVICES
from lorafa_kernels.plan.recipe import Device, Problem, Recipe
from lorafa_kernels.plan.tables import Entry, Measured, key_of, read_table, update_table

H200 = Device("NVIDIA H200", KNOWN_DEVICES["sm_90"], "3.6.0")


def entry(M: int, N: int = 4096) -> Entry:
    problem = Problem("forward", torch.bfloat16, M, N, 4096, 16)
    return Entry(key_of(problem), (Measured(Recipe("library"), 1.0, 2.0),))


def write_many(path, N: int, count: int) -> None:
    for index in range(count):
        update_table(path, H200, [entry(1 << index, N)], {})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_lose_no_entry(tmp_path):
    path = tmp_path / "cache" / "table.json"
    started = []
    for N in (1024, 2048, 3072):
        if (pid := os.fork()) == 0:
            # Nothing of pytest may run in the copy.
            code = 1
            try:
                write_many(path, N, 16)
                code = 0
            finally:
                os._exit(code)
        started.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in started] == [0, 0, 0]
    assert len(read_table(path).entries) == 3 * 16
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture(params=["folder", "file"])
def lock(request, monkeypatch):
    """Both ways to lock: that of a folder, and the file where a folder cannot be locked."""
    if request.param == "file":
        monkeypatch.setattr(files, "fcntl", None)
    return request.param


def in_threads(count: int, work) -> list[BaseException]:
    failed = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def test_threads_lose_no_entry(tmp_path, lock):
    path = tmp_path / "table.json"
    assert not in_threads(4, lambda index: write_many(path, 1024 * (index + 1), 8))
    assert len(read_table(path).entries) == 4 * 8
    assert list(tmp_path.iterdir()) == [path]


def test_threads_without_any_lock_still_share_no_name(tmp_path):
    path = tmp_path / "file"
    texts = {str(index) * 200_000 for index in range(4)}

    def work(index: int) -> None:
        for _ in range(20):
            files.replace_file(path, str(index) * 200_000)
            assert path.read_text() in texts

    assert not in_threads(4, work)
    assert list(tmp_path.iterdir()) == [path]


def test_the_lock_is_held_against_others_and_ends_with_its_process(tmp_path, lock):
    path, order = tmp_path / "table.json", []

    def second(_: int) -> None:
        with files.one_writer(path):
            order.append("second")

    with files.one_writer(path):
        thread = threading.Thread(target=second, args=(0,))
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_who_waits_too_long_goes_on_with_a_warning(tmp_path, lock):
    path = tmp_path / "table.json"
    warned = pytest.warns(UserWarning, match="locked by another process")
    with files.one_writer(path), warned, files.one_writer(path, 0.05):
        files.replace_file(path, "{}")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_locked_has_a_lock_file(tmp_path, monkeypatch):
    """As some network file systems answer."""

    def refused(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refused)
    with files.one_writer(tmp_path / "table.json"):
        assert [path.name for path in tmp_path.iterdir()] == [files.LOCK_FILE]
    assert not list(tmp_path.iterdir())


def test_the_lock_file_of_a_killed_process_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    left = tmp_path / files.LOCK_FILE
    left.touch()
    os.utime(left, (0, 0))
    with files.one_writer(tmp_path / "table.json", 5.0):
        assert left.stat().st_mtime > 0
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_removed(tmp_path):
    path = tmp_path / "table.json"
    left = tmp_path / f".table.json.0123{files.ASIDE}"
    other = tmp_path / f".other.json.0123{files.ASIDE}"
    left.touch(), other.touch()
    update_table(path, H200, [entry(16)], {})
    assert set(tmp_path.iterdir()) == {path, other}


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
class TestLinks:
    def test_the_name_aside_cannot_be_guessed_and_must_be_new(self, tmp_path, monkeypatch):
        """A link planted under the very name is refused, not followed."""
        victim = tmp_path / "victim"
        victim.write_text("precious")
        monkeypatch.setattr(files.secrets, "token_hex", lambda size: "guessed")
        (tmp_path / f".table.json.guessed{files.ASIDE}").symlink_to(victim)
        with pytest.raises(FileExistsError):
            files.replace_file(tmp_path / "table.json", "new")
        assert victim.read_text() == "precious"

    def test_names_differ_from_write_to_write(self, tmp_path, monkeypatch):
        opened, right = [], os.open
        monkeypatch.setattr(
            files.os, "open", lambda path, *rest: opened.append((str(path), rest)) or right(path, *rest)
        )
        for _ in range(2):
            files.replace_file(tmp_path / "table.json", "new")
        names = [name for name, _ in opened]
        assert len(set(names)) == 2 and all(str(os.getpid()) != name.split(".")[-1] for name in names)
        assert all(flags & os.O_EXCL and flags & os.O_CREAT for _, (flags, *_) in opened)

    def test_a_link_in_the_table_s_place_is_replaced(self, tmp_path):
        victim = tmp_path / "victim"
        victim.write_text("precious")
        (tmp_path / "table.json").symlink_to(victim)
        update_table(tmp_path / "table.json", H200, [entry(16)], {})
        assert victim.read_text() == "precious"
        assert not (tmp_path / "table.json").is_symlink()


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_never_replaced(tmp_path, kind):
    """`tune --out /dev/null` as root would replace the device."""
    path = tmp_path / "table.json"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    before = stat.S_IFMT(path.lstat().st_mode)
    with pytest.raises(OSError, match="not a regular file"):
        update_table(path, H200, [entry(16)], {})
    assert stat.S_IFMT(path.lstat().st_mode) == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    files.replace_file(tmp_path / "table.json", "{}")
    assert (tmp_path / "table.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    path = tmp_path / "table.json"
    update_table(path, H200, [entry(16)], {})
    before = path.read_bytes()
    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update_table(path, H200, [entry(32)], {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
