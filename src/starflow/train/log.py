"""A run's log: log.jsonl (one line a step, and one an evaluation) and TensorBoard files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from starflow.files import write_text


class RunLog:
    """Appends to `folder/log.jsonl` and `folder/tensorboard`.

    On resume, lines of steps after the checkpoint are dropped first: those updates are done again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        if path.exists():
            write_text(path, "".join(line for line in _whole_lines(path) if json.loads(line)["step"] <= step))
        self._file = path.open("a", encoding="utf-8", buffering=1)  # by lines: a killed run leaves no gap behind it
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def step(self, step: int, terms: Mapping[str, float]) -> None:
        """One update."""
        self._write(step, "train", terms)

    def evaluation(self, step: int, measures: Mapping[str, float]) -> None:
        """One held-out evaluation; keys are prefixed with `heldout_` in log.jsonl."""
        self._write(step, "heldout", {f"heldout_{name}": value for name, value in measures.items()})

    def _write(self, step: int, group: str, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


def _whole_lines(path: Path) -> list[str]:
    """Lines that a killed run wrote completely."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
