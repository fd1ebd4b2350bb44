"""The hash of a checkout's source files, with and without git.

A machine with a GPU may have the files and no git. There the hash says which code was measured; where git
is, it is compared with the commits'.

    hash = sha256 of the lines "PATH BLOB\\n", sorted by path; BLOB is git's name for the content: sha1 of
           "blob LENGTH\\0CONTENT". A commit's hash needs no checkout: `git ls-tree` lists both.

A file counts if it can change what is measured: sources below FOLDERS and the files in FILES. Results,
documents and hidden files do not.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .shell import git

FOLDERS = ("lorafa_kernels", "bench", "tests", "csrc_reference", "examples")
FILES = ("Makefile", "pyproject.toml", "constraints.txt", "csrc_reference/Makefile")
SUFFIXES = (".py", ".c", ".h", ".json")
RESULTS = "bench/results"
# A hash is looked for in so many commits, newest first.
MOST_COMMITS = 2000


def counts(path: str) -> bool:
    """Whether the file `path`, relative to the checkout and with slashes, is part of the hash."""
    parts = PurePosixPath(path).parts
    if path in FILES:
        return True
    if parts[0] not in FOLDERS or path.startswith(f"{RESULTS}/"):
        return False
    return path.endswith(SUFFIXES) and not any(part.startswith((".", "__pycache__")) for part in parts)


def hash_of(blobs: Iterable[tuple[str, str]]) -> str:
    """Return the hash of files, given as pairs of path and blob."""
    lines = sorted(f"{path} {blob}\n" for path, blob in blobs)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tree_hash(root: Path) -> str:
    """Return the hash of the files below `root` as they are now."""
    files = [root / name for name in FILES]
    for folder, folders, names in itertools.chain(*(os.walk(root / name) for name in FOLDERS)):
        hidden = (".", "__pycache__")
        folders[:] = (name for name in folders if not name.startswith(hidden))
        files += [Path(folder) / name for name in names]
    paths = {path.relative_to(root).as_posix(): path for path in files}
    there = {name: path for name, path in paths.items() if counts(name) and path.is_file()}
    blobs = {name: path.read_bytes() for name, path in there.items() if not path.is_symlink()}
    return hash_of((name, blob_of(content)) for name, content in blobs.items())


def blob_of(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@functools.lru_cache(maxsize=4096)
def commit_hash(commit: str, root: Path) -> str | None:
    """Return the hash of a commit of the repository at `root`, or None where git does not know it."""
    # A name of a commit from a result file, which git must not take for an option.
    if commit.startswith("-"):
        return None
    listed = git(root, "ls-tree", "-r", "-z", "--full-tree", commit, errors="surrogateescape")
    if listed is None:
        return None
    found = []
    for line in listed.split("\0"):
        about, _, path = line.partition("\t")
        if path and counts(path) and about.startswith("100"):
            found.append((path, about.split()[2]))
    return hash_of(found)


def fitting_commit(tree: str, commit: str | None, root: Path) -> str | None:
    """Return the commit of the repository at `root` whose files have the hash `tree`: `commit` if that is
    one, else the newest; None if none has.
    """
    if commit and commit_hash(commit, root) == tree:
        return commit
    known = (git(root, "rev-list", "--all", f"--max-count={MOST_COMMITS}") or "").split()
    return next((one for one in known if commit_hash(one, root) == tree), None)


@functools.lru_cache(maxsize=64)
def has_git(root: Path) -> bool:
    """Whether `root` is the top of a git repository with a commit."""
    top = git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != root.resolve():
        return False
    return git(root, "rev-parse", "--verify", "--quiet", "HEAD") is not None
