"""Parquet files of images, as data sets on the hub come: a column of encoded images, others of captions and labels.

The column of images is binary, or a struct with `bytes` (and `path`). Rows are read a row group at a time, of which
the last few are kept: an order that stays among neighbours (`data.window`) reads each group once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from starflow.data.images import ImageError, read_image_size
from starflow.data.sources.base import (
    CAPTION_KEYS,
    LABEL_KEYS,
    ImageLocation,
    ScannedImage,
    SkippedImage,
    caption_and_label,
)
from starflow.errors import UserError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "picture")

CACHED_ROW_GROUPS = 8


class ParquetSource:
    """A `Source` over parquet files; a location is (file, row group, row in it), and a shard is a file."""

    def __init__(self, path: str) -> None:
        """Find the files at `path`, a folder or one file.

        Raises:
            UserError: no files, no pyarrow, or no column of images.
        """
        self._parquet = _import_parquet()
        self.path = path
        folder = Path(path).expanduser()
        self._files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else [folder] * folder.is_file()
        if not path or not self._files:
            raise UserError(f"no .parquet files at '{path}': set data.path to a folder of them, or to one")
        self._groups: OrderedDict[tuple[int, int], list[bytes | None]] = OrderedDict()
        self._column = self._find_column()

    def __reduce__(self) -> tuple[type[ParquetSource], tuple[str]]:
        return ParquetSource, (self.path,)

    @property
    def shards(self) -> list[str]:
        """See `Source.shards`."""
        return [str(path) for path in self._files]

    @cached_property
    def _opened(self) -> dict[int, Any]:
        return {}

    def _file(self, number: int) -> Any:
        """Open a file, once a process.

        Raises:
            UserError: damaged.
        """
        if number not in self._opened:
            path = self._files[number]
            try:
                self._opened[number] = self._parquet.ParquetFile(path)
            except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
                reason = " ".join(str(error).split())[:120]
                raise UserError(f"{path} is no whole parquet file ({reason}): fetch it again") from None
        return self._opened[number]

    def _find_column(self) -> str:
        names = self._file(0).schema_arrow.names
        found = [name for name in IMAGE_COLUMNS if name in names]
        if not found:
            raise UserError(
                f"{self._files[0]} has the columns {', '.join(names)}: expected one of {', '.join(IMAGE_COLUMNS)} "
                "with encoded pictures"
            )
        return found[0]

    def scan(self, shard: int, *, sizes: bool) -> Iterator[ScannedImage | SkippedImage]:
        """See `Source.scan`; without sizes the images themselves are not read."""
        try:
            file = self._file(shard)
        except UserError as error:
            yield SkippedImage(self._files[shard].name, str(error))
            return
        wanted = [name for name in (*CAPTION_KEYS, *LABEL_KEYS) if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=wanted).to_pylist() if wanted else []
            images = self._images(shard, group) if sizes else []
            for row in range(file.metadata.row_group(group).num_rows):
                name = f"{self._files[shard].name}/{group}-{row}"
                try:
                    size = read_image_size(images[row] or b"", name) if sizes else None
                except ImageError as error:
                    yield SkippedImage(name, error.reason)
                    continue
                caption, label = caption_and_label(rows[row] if wanted else {})
                yield ScannedImage(name, caption, label, size, (shard, group, row))

    def read(self, location: ImageLocation) -> bytes:
        """See `Source.read`."""
        file, group, row = (int(part) for part in location)
        try:
            data = self._images(file, group)[row]
        except (OSError, ValueError) as error:
            raise ImageError(self._files[file], " ".join(str(error).split())[:120]) from None
        if data is None:
            raise ImageError(self._files[file], f"row {row} of group {group} is empty")
        return data

    def class_names(self, labels: set[str]) -> dict[str, str]:
        """See `Source.class_names`; labels are taken as they are."""
        return {}

    def _images(self, file: int, group: int) -> list[bytes | None]:
        key = (file, group)
        if key not in self._groups:
            column = self._file(file).read_row_group(group, columns=[self._column]).column(0).to_pylist()
            self._groups[key] = [value.get("bytes") if isinstance(value, dict) else value for value in column]
            while len(self._groups) > CACHED_ROW_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def _import_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: run pip install 'starflow[data]'") from None
    return parquet
