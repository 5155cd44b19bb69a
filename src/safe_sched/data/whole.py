"""A small file that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_file(path: Path, data: bytes, part: Path) -> None:
    """Write a file under another name, flush it to the disk, and rename it: whole even after the power failed.

    Args:
        path: Where it is to be.
        data: All of it.
        part: What it is called until it is whole, in the same folder. It is gone when this fails.

    Raises:
        OSError: It cannot be written; what was at ``path`` is as it was.
    """
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
