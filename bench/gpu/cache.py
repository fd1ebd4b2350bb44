"""Triton's cache in parts: files small enough to bring back from a machine, each complete by itself.

A part is a compressed tar of whole entries, DIGEST/FILE. Of an entry only what a launch reads goes along: the
binary, its description and the launchers; not the code of the stages between.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

NAME = "triton-cache-{}.tar.gz"
PATTERN = "triton-cache-*.tar.gz"
# What comes back at most: 16 MiB a file, eight files and 64 MiB together; two files are not of the cache.
PART_BYTES, MOST_PARTS = 15 * 2**20, 3
# Written in between: a part ends behind the entry that crosses PART_BYTES less this.
LARGEST_ENTRY = 2**20
LEFT_OUT = (".ttir", ".ttgir", ".llir", ".ptx", ".source", ".lock", ".amdgcn")


def entries(cache: Path) -> Iterator[list[Path]]:
    """Yield the files of each entry below `cache` that a launch reads, oldest entry first."""
    folders = [path for path in cache.iterdir() if path.is_dir()] if cache.is_dir() else []
    for folder in sorted(folders, key=lambda path: (path.stat().st_mtime, path.name)):
        files = [
            path
            for path in sorted(folder.iterdir())
            if path.is_file() and path.suffix not in LEFT_OUT and not path.name.startswith("tmp.")
        ]
        if files:
            yield files


def pack(cache: Path, out: Path, part_bytes: int = PART_BYTES, most_parts: int = MOST_PARTS) -> int:
    """Write the cache into parts in `out` and return how many entries did not fit.

    Each part appears whole; parts of an earlier call that are no longer needed are removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    waiting, parts = list(entries(cache)), 0
    room = part_bytes - min(LARGEST_ENTRY, part_bytes // 4)
    while waiting and parts < most_parts:
        # The command removes what an earlier one left of these.
        aside = out / f".triton-cache-{parts}"
        with aside.open("wb") as raw, tarfile.open(fileobj=raw, mode="w:gz", compresslevel=1) as tar:
            while waiting and raw.tell() < room:
                for path in waiting.pop(0):
                    tar.add(path, f"{path.parent.name}/{path.name}", recursive=False)
        os.replace(aside, out / NAME.format(parts))
        parts += 1
    for path in out.glob(PATTERN):
        if path.name not in {NAME.format(number) for number in range(parts)}:
            path.unlink()
    return len(waiting)


def unpack(folders: Iterable[Path], cache: Path) -> tuple[int, list[str]]:
    """Put the entries of all parts in `folders` into `cache`; return how many, and what could not be read.

    What is there already stays. A name that is not DIGEST/FILE is left out.
    """
    known: set[str] = set()
    problems = []
    for part in sorted(path for folder in folders for path in folder.glob(PATTERN)):
        try:
            with tarfile.open(part) as tar:
                for member in tar:
                    digest, _, file = member.name.partition("/")
                    if not member.isfile() or not file or "/" in file or {digest, file} & {"", ".", ".."}:
                        continue
                    target = cache / digest / file
                    if not target.exists():
                        target.parent.mkdir(parents=True, exist_ok=True)
                        aside = target.with_name(f"tmp.{file}")
                        aside.write_bytes(tar.extractfile(member).read())
                        aside.chmod(0o755 if file.endswith(".so") else 0o644)
                        os.replace(aside, target)
                    known.add(digest)
        except (OSError, EOFError, tarfile.TarError) as error:
            problems.append(f"{part}: {error}")
    return len(known), problems
