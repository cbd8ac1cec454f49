"""Other libraries' remarks, kept from standing between ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger

TORCHAO = ("torchao", "torch.utils._pytree")
"""Who speaks when torchao is imported, as transformers and diffusers do wherever it is installed."""


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Loggers of these names let errors through alone while a block runs."""
    loggers = [getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
