"""How a run through the stub driver (tests/stub_gpu) is told from one on a GPU, and refused as a measurement.

Nothing computes there: launches are accepted and forgotten. Its device is named "STUB sm_90", and every line
that it writes carries "stub": true. Either of the two is enough to be refused.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "LORAFA_STUB_GPU"
START = "STUB "


def stub_name() -> str | None:
    """Return the name of the stub's device if this process runs through it, such as "STUB sm_90"."""
    architecture = os.environ.get(VARIABLE)
    return f"{START}{architecture}" if architecture else None


def is_stub(found: object) -> bool:
    """Whether a result, or anything in it, says that it is of the stub driver: the mark, or a device's name.

    found: what a JSON file or line holds.
    """
    if isinstance(found, dict):
        return bool(found.get("stub")) or any(map(is_stub, found.values()))
    if isinstance(found, (list, tuple)):
        return any(map(is_stub, found))
    return isinstance(found, str) and found.startswith(START)


def refuse_stub(found: object, where: Path | str) -> None:
    """Raise ValueError if a result is of the stub driver. where: its file."""
    if is_stub(found):
        raise ValueError(
            f"{where}: it was made through the stub driver (tests/stub_gpu), where nothing computes: no "
            "number of it may stand in a report or a table; remove the file"
        )
