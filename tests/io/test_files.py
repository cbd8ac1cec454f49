"""Files are written whole or not at all; lines by number, folder locks, and room on the disk."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from starflow.errors import UserError
from starflow.io import files


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    files.write_text(path, "old")

    def fill_the_disk(temporary: Path) -> None:
        temporary.write_text("half of the ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(UserError, match=r"cannot write .*value\.txt: No space left"),
        files.atomic_write(path) as temporary,
    ):
        fill_the_disk(temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "value.txt"
    files.write_text(path, "old")
    with pytest.raises(UserError, match="No space left"), files.atomic_write(path):
        full.write_text("x" * 100_000)
    assert path.read_text() == "old"


def test_tensors_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "a" / "t.safetensors"
    tensors = {"x": torch.arange(6).reshape(2, 3), "y": torch.ones(2, dtype=torch.bfloat16)}
    files.write_tensors(path, tensors)
    read = files.read_tensors(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_a_truncated_tensor_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    files.write_tensors(path, {"x": torch.arange(1000)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"t\.safetensors is not a whole safetensors file"):
        files.read_tensors(path)


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("something")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        files.check_output_folder(path)
    with pytest.raises(UserError, match="cannot write"):
        files.check_output_folder(path / "below")
    assert path.read_text() == "something"


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.text(), st.text() | st.integers()), max_size=6))
def test_lines_by_number_are_the_objects_written(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "rows.jsonl"
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    lines = files.JsonLines(path)
    assert len(lines) == len(rows)
    assert [lines[number] for number in reversed(range(len(rows)))] == rows[::-1]
    assert len(copy.copy(lines)) == len(rows)  # as pickling does, by its path


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    files.write_text(path, '{"a": 1}\n{"a": \n[]\n')
    lines = files.JsonLines(path)
    assert lines[0] == {"a": 1}
    for number in (1, 2):
        with pytest.raises(UserError, match=rf"rows\.jsonl, line {number + 1} is damaged"):
            lines[number]


def test_json_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    with pytest.raises(UserError, match=r"no such file: .*value\.json"):
        files.read_json(path)
    files.write_json(path, {"ä": [1, None]})
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert files.read_json(path) == {"ä": [1, None]}
    path.write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*value\.json as JSON"):
        files.read_json(path)


def test_a_written_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    files.write_text(tmp_path / "ours", "")
    files.write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})  # whose writer puts a file of 0600 there
    (tmp_path / "plain").touch()
    (tmp_path / "b.safetensors").touch(mode=0o600)
    files.give_usual_modes(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    assert len(list(tmp_path.iterdir())) == 4


LOCKING = """
import sys
from pathlib import Path
from starflow.errors import UserError
from starflow.io.files import folder_lock
try:
    with folder_lock(Path(sys.argv[1])):
        print("held")
except UserError as error:
    print(error)
"""


def test_a_folder_is_locked_for_one_process_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")

    def other() -> str:
        words = [sys.executable, "-c", LOCKING, str(tmp_path)]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
        return subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout

    with files.folder_lock(tmp_path):
        assert other().startswith(f"another process writes to {tmp_path}: wait until it ends")
    assert other() == "held\n"


def test_the_cache_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STARFLOW_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = files.cache_folder()
    assert folder == tmp_path / "xdg" / "starflow"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setenv("STARFLOW_CACHE", str(tmp_path / "own"))
    assert files.cache_folder() == tmp_path / "own"
    (tmp_path / "own").chmod(0o777)
    with pytest.raises(UserError, match=r"own may be written to by others: set STARFLOW_CACHE"):
        files.cache_folder()


def test_what_does_not_fit_the_disk_is_refused_with_both_sizes(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    files.check_disk_space(tmp_path / "not" / "there", free // 2, "half")
    with pytest.raises(UserError, match=r"all takes \d+\.\d GB in .*there, and \d+\.\d GB are free there: make room"):
        files.check_disk_space(tmp_path / "not" / "there", 2 * free + 1, "all")
