"""Replace files of a folder all at once.

Whoever opens the files by their names, whichever program it is, finds all of the old ones or all of the new
ones, after a crash too. One rename does that for one file. For two it is done by way of symbolic links:

    .lorafa-save-<hex>/old/   the old files (hard links)
    .lorafa-save-<hex>/new/   the new files
    .lorafa-save-<hex>/now    link to old

Each file is replaced by a link to now/<its name>, which changes nothing for who reads it. Then `now` is
replaced by a link to new, which is one rename. Then each link is replaced by the file it leads to, which
changes nothing either, and the folder within is removed. A crash leaves one of these states; the next call
takes it from there. Where the file system has no links, the last file is absent while the others are
replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_STAGE = re.compile(r"\.lorafa-save-[0-9a-f]{16}")
_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp")
# Files up to this size are compared with what would be written, and left alone if they are the same.
_COMPARED = 1 << 20
# Longest wait for another process that saves there (estimate).
_LOCK_SECONDS = 600.0
# Where folders cannot be locked, what a crash has left is told from what is under way by its age.
_STALE_SECONDS = 3600.0
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EACCES}


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold the lock of `folder`, if its file system has locks (the value), while this context lasts.

    shared: for reading, which others may do as well. Raises TimeoutError after ten minutes.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor, folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    finally:
        # Which gives the lock back.
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, how: int) -> bool:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{folder} is locked: another save has not ended in ten minutes") from None
            time.sleep(0.02)
        except OSError:
            return False


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files`, {name: content}, into `folder`: all of them, or after an error none.

    The last one is the one without which the others count for nothing: where none was there, it comes last.
    Leftovers of earlier calls that crashed are removed. Raises OSError, IsADirectoryError where a folder or
    device has a file's name.
    """
    with locked(folder) as is_locked:
        _clear_leftovers(folder, files, is_locked)
        changed = {}
        for name, content in files.items():
            path = folder / name
            if path.exists() and not path.is_file():
                raise IsADirectoryError(f"{path} is not a regular file: it cannot be replaced")
            if not _holds(path, content):
                changed[name] = content
        if len(changed) > 1 and any(os.path.lexists(folder / name) for name in list(files)[-1:]):
            _exchange(folder, changed)
        else:
            _rename(folder, changed)


def _holds(path: Path, content: bytes) -> bool:
    if not path.exists() or path.is_symlink() or len(content) > _COMPARED:
        return False
    return path.stat().st_size == len(content) and path.read_bytes() == content


def _rename(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace one file, or put all where there were none that count."""
    staged: dict[Path, Path] = {}
    new = [folder / name for name in files if not os.path.lexists(folder / name)]
    try:
        for name, content in files.items():
            aside = folder / f".{name}.{secrets.token_hex(4)}.tmp"
            staged[aside] = folder / name
            _write(aside, content)
        for aside, path in staged.items():
            os.replace(aside, path)
    except BaseException:
        if len(files) > 1:
            for path in new:
                path.unlink(missing_ok=True)
        raise
    finally:
        for aside in staged:
            aside.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        _sync(folder)


def _exchange(folder: Path, files: Mapping[str, bytes]) -> None:
    stage = folder / f".lorafa-save-{secrets.token_hex(8)}"
    try:
        _stage(folder, stage, files)
        if not _has_links(stage):
            _in_turn(folder, stage, files)
            return
        for name in files:
            pointer = stage / f"{name}.pointer"
            os.symlink(_target(stage, name), pointer)
            os.replace(pointer, folder / name)
        _sync(folder)
        os.symlink("new", stage / "next")
        os.replace(stage / "next", stage / "now")
        _sync(stage)
        _settle(folder, stage)
    except BaseException as error:
        # From the one rename on the new files are in place, and what remains to do is done here.
        done = _settle(folder, stage) == "new"
        if not (done and isinstance(error, Exception)):
            raise


def _stage(folder: Path, stage: Path, files: Mapping[str, bytes]) -> None:
    os.mkdir(stage)
    for side in ("old", "new"):
        os.mkdir(stage / side)
    for name, content in files.items():
        _write(stage / "new" / name, content)
        path, kept = folder / name, stage / "old" / name
        if not path.exists():
            continue
        try:
            if path.is_symlink():
                raise OSError(errno.EINVAL, "a hard link would be one to the link")
            os.link(path, kept)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            shutil.copyfile(path, kept)
            _sync(kept)
    for path in (stage / "old", stage / "new", stage):
        _sync(path)


def _has_links(stage: Path) -> bool:
    try:
        os.symlink("old", stage / "now", target_is_directory=True)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LINKS and os.name != "nt":
            raise
        return False
    _sync(stage)
    return True


def _target(stage: Path, name: str) -> str:
    return os.path.join(stage.name, "now", name)


def _in_turn(folder: Path, stage: Path, files: Mapping[str, bytes]) -> None:
    """Without links: the last file, which makes the others count, is away while those are replaced."""
    *others, last = files
    done: list[str] = []
    try:
        os.replace(folder / last, stage / "last")
        done.append(last)
        for name in others:
            os.replace(stage / "new" / name, folder / name)
            done.append(name)
        os.replace(stage / "new" / last, folder / last)
    except BaseException:
        for name in reversed(done):
            kept = stage / "old" / name
            if kept.exists():
                os.replace(kept, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    with contextlib.suppress(OSError):
        _sync(folder)


def _settle(folder: Path, stage: Path) -> str | None:
    """Put the files that now leads to in the places of the links, and remove the stage. Returns "old" or
    "new", or None where nothing had been linked.
    """
    try:
        side = os.readlink(stage / "now")
    except OSError:
        side = None
    if side in ("old", "new"):
        names = {
            name for each in ("old", "new") if (stage / each).is_dir() for name in os.listdir(stage / each)
        }
        names |= {path.name for path in folder.iterdir() if path.is_symlink()}
        for name in sorted(names):
            link = folder / name
            if not link.is_symlink() or os.readlink(link) != _target(stage, name):
                continue
            path = stage / side / name
            if path.exists():
                os.replace(path, link)
            else:
                link.unlink()
        _sync(folder)
    shutil.rmtree(stage, ignore_errors=True)
    return side


def _clear_leftovers(folder: Path, names: Mapping[str, bytes], is_locked: bool) -> None:
    """Finish or undo what a crash has cut off, and remove its files: those whose names are ours."""
    for path in list(folder.iterdir()):
        aside = _ASIDE.fullmatch(path.name)
        ours = _STAGE.fullmatch(path.name) or (aside and aside["name"] in names)
        if not ours or path.is_symlink():
            continue
        if not is_locked and time.time() - path.stat().st_mtime < _STALE_SECONDS:
            continue
        if path.is_dir():
            if _STAGE.fullmatch(path.name):
                _settle(folder, path)
        elif aside:
            path.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Make what was done to a file or folder last through a power failure, where the system can (Windows
    cannot open folders).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems do not sync folders; a full disk is another matter.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
    finally:
        os.close(descriptor)
