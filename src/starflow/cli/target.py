"""Where pictures go: a folder, or one file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from starflow import files
from starflow.errors import UserError

OTHER_FORMATS = frozenset({".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
LONGEST_NAME = 60


@dataclass(frozen=True)
class Target:
    """A folder for PNG files that can be written, or the one file of it that is to be written."""

    folder: Path
    file: Path | None = None

    @classmethod
    def of(cls, output: str, count: int, *, grid: bool = False) -> Target:
        """Read `--output` for `count` pictures, and prove that it can be written.

        Raises:
            UserError: several pictures for one file, another format, a file where the folder should be, no permission.
        """
        path = Path(output).expanduser()
        suffix = path.suffix.lower()
        if suffix in OTHER_FORMATS:
            raise UserError(f"--output is {output}, but pictures are written as PNG: name a folder or a .png file")
        if suffix != ".png":
            return cls(files.check_output_folder(path))
        if count > 1 or grid:
            what = "a grid as well" if count == 1 else f"{count} pictures"
            raise UserError(f"--output is the one file {output}, but {what} is asked for: name a folder")
        if path.is_dir():
            raise UserError(f"--output {output} is a folder, expected a file of that ending: choose another --output")
        return cls(files.check_output_folder(path.parent), path)

    def path(self, prompt: str, seed: int) -> Path:
        """The file of one picture; seeds differ within a call, so names do."""
        return self.file or self.folder / f"{slug(prompt) or 'unconditional'}-{seed:04d}.png"

    @property
    def grid_path(self) -> Path:
        """The file of all pictures side by side."""
        return self.folder / "grid.png"


def slug(text: str) -> str:
    """A prompt as part of a file name: letters and digits of any script, in lower case, other runs as one hyphen."""
    from starflow.conditioning.emoji import name_emoji

    words = re.findall(r"\w+", name_emoji(text).casefold().replace("_", " "))
    return "-".join(words)[:LONGEST_NAME].rstrip("-")
