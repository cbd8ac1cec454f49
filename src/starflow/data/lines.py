"""JSON lines by number, without reading the file: it is mapped, and only where each line starts is kept in memory."""

from __future__ import annotations

import json
import mmap
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starflow.errors import UserError


class Lines:
    """`Lines(path)[i]` is line i as an object; 8 bytes of memory a line. Pickles as its path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Raises UserError: the line is no JSON object."""
        start = int(self._ends[number - 1]) + 1 if number else 0
        try:
            line = json.loads(self._bytes[start : int(self._ends[number])])
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise UserError(f"{self.path}, line {number + 1} is damaged: delete the folder and make it again")
        return line

    def __reduce__(self) -> tuple[type[Lines], tuple[Path]]:
        return Lines, (self.path,)

    @cached_property
    def _bytes(self) -> mmap.mmap | bytes:
        if not self.path.stat().st_size:
            return b""  # nothing to map
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Where each line's newline is."""
        step, found = 1 << 24, []
        for start in range(0, len(self._bytes), step):
            part = np.frombuffer(self._bytes[start : start + step], dtype=np.uint8)
            found.append(np.flatnonzero(part == ord("\n")) + start)
        return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)
