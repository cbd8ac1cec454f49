"""Parquet files of images, as data sets on the hub come: a column of encoded images, others of captions and labels.

The column of images is binary, or a struct with `bytes` (and `path`). Rows are read a row group at a time, of which
the last few are kept: an order that stays among neighbours (`data.window`) reads each group once. Each file may have
columns of other names. Where the hub's metadata names the classes of a label, captions are those names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starflow.data.images import ImageError, read_image_size
from starflow.data.sources.base import (
    Found,
    ImageLocation,
    ScannedImage,
    SkippedImage,
    files_state,
    shard_names,
    unused_by_ending,
    walk_files,
)
from starflow.data.sources.captions import CAPTION_KEYS, LABEL_KEYS, caption_and_label, parse_json_object
from starflow.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
        names, self._left = walk_files(folder) if folder.is_dir() else ([], [])
        tables = [name for name in names if name.lower().endswith(".parquet")]
        self._left += map(unused_by_ending, sorted(set(names).difference(tables)))
        self._files = [folder / name for name in tables] if folder.is_dir() else [folder] * folder.is_file()
        if not path or not self._files:
            raise UserError(f"no .parquet files at '{path}': set data.path to a folder of them, or to one")
        self._groups: OrderedDict[tuple[int, int], list[Any]] = OrderedDict()
        self._column(0)

    @cached_property
    def _short(self) -> list[str]:
        return shard_names(self.shards)

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
            except Exception as error:  # noqa: BLE001  (damaged files raise errors of any class)
                reason = " ".join(str(error).split())[:120]
                raise UserError(f"{path} is no whole parquet file ({reason}): fetch it again") from None
        return self._opened[number]

    def _column(self, number: int) -> str:
        """The name of a file's column of encoded images.

        Raises:
            UserError: it has none; the message says what it has.
        """
        schema, path = self._file(number).schema_arrow, self._files[number]
        found = [name for name in IMAGE_COLUMNS if name in schema.names]
        if not found:
            raise UserError(
                f"{path} has the columns {', '.join(schema.names)}: expected one of {', '.join(IMAGE_COLUMNS)} "
                "with encoded pictures"
            )
        encoded = [name for name in found if _holds_bytes(schema.field(name).type)]
        if not encoded:
            raise UserError(
                f"{path}: the column '{found[0]}' holds {schema.field(found[0]).type} (addresses, lists or numbers), "
                "expected encoded pictures, one a row: fetch or encode them into the table first"
            )
        return encoded[0]

    @cached_property
    def _class_names(self) -> dict[str, str]:
        """Names of the classes by number, where the hub's metadata of the first file has them."""
        return _hub_class_names(self._file(0).schema_arrow)

    def scan(self, shard: int, *, sizes: bool) -> Iterator[Found]:
        """See `Source.scan`; without sizes the images themselves are not read."""
        try:
            self._column(shard)
        except UserError as error:
            yield from self._unreadable_rows(shard, str(error))
        else:
            file = self._file(shard)
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                yield from self._scan_group(shard, group, count, sizes=sizes)
        if shard == 0:
            yield from self._left

    def _scan_group(self, shard: int, group: int, count: int, *, sizes: bool) -> Iterator[Found]:
        names = [f"{self._short[shard]}/{group}-{row}" for row in range(count)]
        file = self._file(shard)
        keys = (*CAPTION_KEYS, *LABEL_KEYS)
        wanted = [name for name in file.schema_arrow.names if name.strip().casefold() in keys]
        wanted = [name for name in wanted if name != self._column(shard)]
        try:
            rows = file.read_row_group(group, columns=wanted).to_pylist() if wanted else [{}] * count
            images = self._images(shard, group) if sizes else []
        except Exception as error:  # noqa: BLE001  (damaged pages raise errors of any class)
            yield from (SkippedImage(name, _reason(error)) for name in names)
            return
        for row, name in enumerate(names):
            try:
                size = read_image_size(_encoded(images[row], name), name) if sizes else None
            except ImageError as error:
                yield SkippedImage(name, error.reason)
                continue
            fields = {key: self._named(shard, key, value) for key, value in rows[row].items()}
            caption, label, note = caption_and_label(fields, self._class_names)
            yield ScannedImage(name, caption, label, size, (shard, group, row), note=note)

    def _named(self, shard: int, key: str, value: Any) -> Any:
        """A class's number as the first file counts it; -1 is no class."""
        if not self._class_names or key.strip().casefold() not in LABEL_KEYS or not isinstance(value, int):
            return value
        own = _hub_class_names(self._file(shard).schema_arrow)
        if own == self._class_names or str(value) not in own:
            return None if value == -1 else value
        first = {name: number for number, name in self._class_names.items()}
        return first.get(own[str(value)], own[str(value)])

    def _unreadable_rows(self, shard: int, reason: str) -> Iterator[SkippedImage]:
        """Every row of a file that cannot be used, or the file where not even their number can be read."""
        try:
            count = self._file(shard).metadata.num_rows
        except UserError:
            yield SkippedImage(self._short[shard], reason)
            return
        yield from (SkippedImage(f"{self._short[shard]}, row {row}", reason) for row in range(count))

    def read(self, location: ImageLocation) -> bytes:
        """See `Source.read`."""
        file, group, row = (int(part) for part in location)
        try:
            value = self._images(file, group)[row]
        except Exception as error:  # noqa: BLE001  (damaged pages raise errors of any class)
            raise ImageError(self._files[file], _reason(error)) from None
        return _encoded(value, f"{self._files[file]}, row {row} of group {group}")

    def state(self) -> dict[str, Any]:
        """See `Source.state`."""
        return files_state(Path(), [], self.shards)

    def class_names(self, labels: set[str]) -> dict[str, str]:
        """See `Source.class_names`: the hub's names of the classes that occur, in the order of their numbers."""
        return {number: name for number, name in self._class_names.items() if number in labels}

    def _images(self, file: int, group: int) -> list[Any]:
        key = (file, group)
        if key not in self._groups:
            column = self._file(file).read_row_group(group, columns=[self._column(file)]).column(0)
            self._groups[key] = column.to_pylist()
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


def _holds_bytes(kind: Any) -> bool:
    """Whether a column's type is bytes, or a struct with a field `bytes` of them."""
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _encoded(value: Any, name: str) -> bytes:
    """The bytes of an image in a row.

    Raises:
        ImageError: there are none.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes) and data:
        return data
    path = value.get("path") if isinstance(value, dict) else None
    raise ImageError(Path(name), f"the row has only a path, '{path}'" if path else "the row is empty")


def _hub_class_names(schema: Any) -> dict[str, str]:
    """Class names by number of the label's column, as the hub's `datasets` writes them; empty where it has none."""
    info = parse_json_object((schema.metadata or {}).get(b"huggingface", b"")).get("info")
    features = info.get("features") if isinstance(info, dict) else None
    for key, feature in (features if isinstance(features, dict) else {}).items():
        names = feature.get("names") if isinstance(feature, dict) else None
        if key.strip().casefold() in LABEL_KEYS and isinstance(names, list) and names:
            return {str(number): str(name) for number, name in enumerate(names)}
    return {}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def read_numbers(path: Path, columns: Sequence[str]) -> Iterator[NDArray[Any]]:
    """Columns of numbers, or of lists of numbers of one shape, a row group at a time.

    Args:
        path: of one parquet file.
        columns: one column (R,) or of lists (R, ..); or several, of numbers, which become a vector (R, K).

    Raises:
        UserError: no such file, no pyarrow, a damaged file, no such column, missing values, or lists of unequal
            lengths.
    """
    import numpy as np

    try:
        table = _import_parquet().ParquetFile(path)
        for group in range(table.num_row_groups):
            read = table.read_row_group(group, columns=list(columns))
            absent = [name for name in columns if name not in read.column_names]
            if absent:
                known = ", ".join(table.schema_arrow.names)
                raise UserError(f"{path} has no column '{absent[0]}', expected one of {known}")
            parts = [np.asarray(read.column(name).to_pylist()) for name in columns]
            for name, part in zip(columns, parts, strict=True):
                if part.dtype.kind not in "fiub":
                    raise UserError(
                        f"column '{name}' of {path} is not of numbers, or some are missing: expected one, or equally "
                        "many, in each row"
                    )
            yield parts[0] if len(parts) == 1 else np.stack(parts, 1)
    except UserError:
        raise
    except (OSError, ValueError, ArithmeticError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read as a parquet file of numbers ({reason})") from None
