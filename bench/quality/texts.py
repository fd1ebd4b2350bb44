"""Five real texts: four of Hutto & Gilbert (ICWSM 2014), with human sentiment scores, and Python's manual."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from examples import movie_reviews
from examples.movie_reviews import Snippet

from .settings import TRAIN, VALIDATION

FILES = {
    "movies": movie_reviews.SNIPPETS_FILE,
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
Item = TypeVar("Item")


class Split(NamedTuple):
    """Three lists without an item in common."""

    train: list
    validation: list
    test: list


def cache_folder() -> Path:
    """Where downloads and pretrained weights lie: lorafa_kernels/quality in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lorafa_kernels" / "quality"


def snippets(text: str) -> list[Snippet]:
    """Return the snippets of one of FILES whose score is not zero, each once; downloads them if needed."""
    return movie_reviews.load(cache_folder(), FILES[text])


def pieces(text: str, length: int) -> list[bytes]:
    """Return a text as pieces of `length` bytes that follow each other; what is left over is dropped.

    text: one of FILES, or "manual": the manual that the standard library has for help().
    """
    if text == "manual":
        from pydoc_data.topics import topics

        whole = "\n".join(topics[name] for name in sorted(topics))
    else:
        whole = "\n".join(snippet.text for snippet in snippets(text))
    data = whole.encode()
    return [data[start : start + length] for start in range(0, len(data) - length + 1, length)]


def split(items: Sequence[Item], seed: int, test: int, train: int = TRAIN) -> Split:
    """Draw test and validation, the same ones for all seeds, and from the rest, by the seed, the training
    items. Raises ValueError if there are too few.
    """
    if len(items) < test + VALIDATION + train:
        raise ValueError(f"{test + VALIDATION + train} items are needed, {len(items)} there are")
    shuffled = random.Random(2014).sample(list(items), len(items))
    rest = shuffled[test + VALIDATION :]
    chosen = random.Random(seed).sample(rest, train)
    return Split(chosen, shuffled[test : test + VALIDATION], shuffled[:test])
