"""The packed weights of a model: in memory, or in files of the cache folder.

Contract: packed integers, and all weights of a model over `MAPPED_BYTES`, are kept as files: the next process packs
nothing. A file is written whole, its name made of the values that it was packed from, the layout and the format. Those
of large models are mapped, so that the system may drop their pages; others are copied into memory, where large pages
make them faster to read. Weights that are being trained leave no file.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import warnings
import weakref
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.flow.block import AutoregressiveBlock
from starflow.flow.memory import MAPPED_BYTES
from starflow.io import files
from starflow.nn.cpu import HUGE_PAGE_THRESHOLD, mapped_files, on_huge_pages
from starflow.nn.quantize import WeightFormat
from starflow.sampling.cpu.build import VERSION, BuildError, Library, cache_folder
from starflow.sampling.cpu.pack import (
    PackedBlock,
    PanelLayout,
    bytes_of,
    matrices_bytes,
    pack,
    parameter_versions,
    write_matrices,
)

PACKED_BYTES_LIMIT = 4 * 2**30
"""Most bytes of packed weights outside of files; of a larger model only those of the block at work are kept."""

SAMPLED_VALUES = 64
"""Values of a mapped parameter that tell whether it was written to."""

KEPT_SECONDS = 30 * 24 * 3600
"""Files of packed weights that nobody used for so long are removed when another one is written."""


@dataclass
class PackedWeights:
    """The packed weights of each block of one model; several threads may ask for them at once."""

    model_bytes: int = 0
    """Of the model's parameters; over `MAPPED_BYTES`, packed weights are mapped from files."""
    blocks: weakref.WeakKeyDictionary[AutoregressiveBlock, dict[WeightFormat, PackedBlock]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    """Of each block by format: its own, and those of guesses."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[int]]:
        """Make copies of a model pack weights for themselves."""
        return PackedWeights, (self.model_bytes,)

    @property
    def bytes(self) -> int:
        """Memory that all of them take."""
        return sum(packed.bytes for every in list(self.blocks.values()) for packed in every.values())

    def of_block(self, block: AutoregressiveBlock, form: WeightFormat, library: Library) -> PackedBlock:
        """A block's packed weights in a format; packed anew where its parameters have changed."""
        with self._lock:
            every = self.blocks.setdefault(block, {})
            found = every.get(form)
            if found is None or found.versions != parameter_versions(block):
                every.pop(form, None)
                checksums = _checksums(block, library, large=self._large)  # before anything is copied, as the versions
                file = self._file(block, form, checksums, library.panels)
                if file is None:
                    self._make_room(block)
                mapped = file is not None and self._large
                found = pack(block, library.panels, form, (lambda one: one) if mapped else _on_huge_pages, file)
                found = every[form] = replace(found, checksums=checksums, mapped=mapped)
            return found

    @property
    def _large(self) -> bool:
        return self.model_bytes > MAPPED_BYTES

    def _file(
        self, block: AutoregressiveBlock, form: WeightFormat, checksums: tuple[int, ...], panels: PanelLayout
    ) -> Path | None:
        """The file of a block's packed matrices, which is written where it is missing; None for one that has none.

        Weights that are being trained are not worth a file.
        """
        trained = block.training and any(one.requires_grad for one in block.parameters())
        if trained or not (self._large or form in ("int8", "int4")):
            return None
        known = repr((VERSION, panels, form, block.spec, checksums))
        try:
            file = cache_folder() / f"packed-{hashlib.sha256(known.encode()).hexdigest()[:20]}.bin"
            if not (file.is_file() and file.stat().st_size == matrices_bytes(block, panels, form)):
                _remove_old(file.parent)
                with files.atomic_write(file) as temporary:
                    write_matrices(temporary, block, panels, form)
            os.utime(file)  # it was used today
        except (BuildError, UserError, OSError) as error:
            warnings.warn(f"packed weights stay in memory: {error}")
            return None
        return file

    def _make_room(self, block: AutoregressiveBlock) -> None:
        """Drop the other blocks' packed weights if all together are large: packing again costs little."""
        others = [packed for every in self.blocks.values() for packed in every.values() if not packed.mapped]
        if sum(map(bytes_of, block.parameters())) + sum(one.bytes for one in others) > PACKED_BYTES_LIMIT:
            for other in [other for other in self.blocks if other is not block]:
                del self.blocks[other]

    def drop_changed(self, library: Library) -> None:
        """Drop packed weights whose parameters have been written to since.

        Of parameters that are mapped from a file, as those of a large model are, only some values are looked at.
        """
        with self._lock:
            for block, every in list(self.blocks.items()):
                checksums = _checksums(block, library, large=self._large)
                if any(packed.checksums != checksums for packed in every.values()):
                    del self.blocks[block]


def _checksums(block: AutoregressiveBlock, library: Library, *, large: bool) -> tuple[int, ...]:
    """Of each parameter a number that depends on all values, or on the file behind them and some of them."""
    parameters = list(block.parameters())
    if not all(map(is_plain_parameter, parameters)):
        return (-1,)
    origins = mapped_files(parameters) if large else [None] * len(parameters)
    found = []
    for parameter, origin in zip(parameters, origins, strict=True):
        step = 1 if origin is None else max(1, parameter.numel() // SAMPLED_VALUES)
        values = library.checksum(parameter.detach().flatten()[::step])
        found.append(values if origin is None else zlib.crc32(repr((origin, values)).encode()))
    return tuple(found)


def is_plain_parameter(parameter: Tensor) -> bool:
    """Whether its values are plain numbers in the memory of a CPU."""
    return type(parameter) is nn.Parameter and parameter.device.type == "cpu"


def _remove_old(folder: Path) -> None:
    """Remove the packed weights that nobody used for long."""
    for file in folder.glob("packed-*.bin"):
        if file.stat().st_mtime < time.time() - KEPT_SECONDS:
            file.unlink(missing_ok=True)


def _on_huge_pages(tensor: Tensor) -> Tensor:
    """A copy in memory that is asked for in huge pages: the panels are read as one long stream."""
    if tensor.nbytes < HUGE_PAGE_THRESHOLD:
        return tensor
    return on_huge_pages(torch.empty_like(tensor)).copy_(tensor)
