"""Folder, then the local cache, then the network; and one clear line where none has it."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from starflow.errors import UserError
from starflow.io.hub import HubOptions, has_digest, is_intact, local_or_hub, only_errors_logged, split_revision

NEEDED = ("config.json", "*.safetensors")


class FakeHub:
    """Answers as `snapshot_download` does: a folder, or an error of the hub's kind."""

    def __init__(self, cached: Path | None, online: Path | Exception) -> None:
        self.cached, self.online = cached, online
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo: str, **settings: Any) -> str:
        self.calls.append(settings)
        if settings["local_files_only"]:
            if self.cached is None:
                raise FileNotFoundError("not in the cache")
            return str(self.cached)
        if isinstance(self.online, Exception):
            raise self.online
        return str(self.online)


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).touch()
    return path


def use(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> FakeHub:
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    monkeypatch.setattr("starflow.io.hub._hub_digests", lambda repository, folder: {})  # it states none
    return hub


def test_a_folder_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = use(monkeypatch, FakeHub(None, OSError("no")))
    whole = folder(tmp_path / "model", "config.json", "a.safetensors")
    assert local_or_hub(str(whole), NEEDED) == whole
    assert not hub.calls


def test_a_cached_model_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = folder(tmp_path / "cached", "config.json", "a.safetensors")
    hub = use(monkeypatch, FakeHub(whole, OSError("no network")))
    assert local_or_hub("owner/name", NEEDED, optional=("*.txt",)) == whole
    assert [call["local_files_only"] for call in hub.calls] == [True, False], "asked whether it is complete, in vain"
    assert hub.calls[0]["allow_patterns"] == [*NEEDED, "*.txt"]


def test_a_cache_that_lacks_a_file_is_filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    partial = folder(tmp_path / "cached", "config.json")
    whole = folder(tmp_path / "fetched", "config.json", "a.safetensors")
    hub = use(monkeypatch, FakeHub(partial, whole))
    assert local_or_hub("owner/name", NEEDED) == whole
    assert [call["local_files_only"] for call in hub.calls] == [True, False]


def test_what_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, FakeHub(None, OSError("401 for url\nmany\nlines")))
    with pytest.raises(UserError, match=r"^'owner/name' is no folder, .* \(401 for url\): do this$"):
        local_or_hub("owner/name", NEEDED, remedy="do this")
    use(monkeypatch, FakeHub(folder(tmp_path / "partial", "config.json"), OSError("no network")))
    with pytest.raises(UserError, match="no network"):
        local_or_hub("owner/name", NEEDED)


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = folder(tmp_path / "bare", "config.json")
    with pytest.raises(UserError, match=r"bare has no \*\.safetensors: do this"):
        local_or_hub(str(bare), NEEDED, remedy="do this")
    use(monkeypatch, FakeHub(None, bare))
    with pytest.raises(UserError, match=r"bare has no \*\.safetensors"):
        local_or_hub("owner/name", NEEDED)


def test_a_name_that_no_repository_can_have() -> None:
    """The hub library's own check of names, which needs no network."""
    with pytest.raises(UserError, match=r"'no/such/folder' is no folder"):
        local_or_hub("no/such/folder", NEEDED)


def test_a_cache_with_a_shard_missing_is_filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An interrupted download left the index and one shard."""
    partial = folder(tmp_path / "cached", "config.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = folder(tmp_path / "fetched", "config.json", "a.safetensors", "b.safetensors")
    use(monkeypatch, FakeHub(partial, whole))
    assert local_or_hub("owner/name", NEEDED) == whole
    (partial / "b.safetensors").touch()
    use(monkeypatch, FakeHub(partial, OSError("no network")))
    assert local_or_hub("owner/name", NEEDED) == partial


def test_a_revision_comes_after_the_name_or_by_argument() -> None:
    assert split_revision("owner/name") == ("owner/name", None)
    assert split_revision("owner/name@v1") == split_revision("owner/name", HubOptions("v1")) == ("owner/name", "v1")
    assert HubOptions("v1", "cache", offline=True).without_revision == HubOptions(None, "cache", offline=True)
    with pytest.raises(UserError, match="'owner/name@v1' names the revision v1, and v2 is asked for: choose one"):
        split_revision("owner/name@v1", HubOptions("v2"))


@pytest.mark.parametrize("large", [False, True])
def test_a_file_of_the_cache_is_compared_with_its_name(large: bool, tmp_path: Path) -> None:
    content = b"some content"
    of_git = hashlib.sha1(b"blob 12\0" + content, usedforsecurity=False)
    name = (hashlib.sha256(content) if large else of_git).hexdigest()
    blob = folder(tmp_path / "blobs") / name
    blob.write_bytes(content)
    assert is_intact(blob)
    blob.write_bytes(content + b".")
    assert is_intact(blob) is False
    (tmp_path / name).write_bytes(content)
    assert is_intact(tmp_path / name) is None


def test_only_errors_are_logged_and_the_level_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("tests.chatty")
    logger.setLevel(logging.INFO)
    with only_errors_logged("tests.chatty"):
        logger.warning("a remark")
        logger.error("a fault")
    logger.info("another remark")
    assert caplog.messages == ["a fault", "another remark"]


def test_a_cache_that_others_filled_is_completed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another program fetched config.json alone; every needed pattern matches, and files are missing all the same."""
    monkeypatch.setenv("STARFLOW_CACHE", str(tmp_path / "ours"))
    partial = folder(tmp_path / "cached", "config.json", "a.safetensors")
    whole = folder(tmp_path / "fetched", "config.json", "a.safetensors", "b.safetensors")
    hub = use(monkeypatch, FakeHub(partial, whole))
    assert local_or_hub("owner/name", NEEDED) == whole
    hub.cached = whole
    hub.calls.clear()
    assert local_or_hub("owner/name", NEEDED) == whole
    assert [call["local_files_only"] for call in hub.calls] == [True], "it is known to be complete now"


def test_digests_that_the_hub_states(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"data")
    blob = hashlib.sha1(b"blob 4\0data", usedforsecurity=False).hexdigest()
    assert has_digest(file, hashlib.sha256(b"data").hexdigest()) is True
    assert has_digest(file, blob) is True
    assert has_digest(file, "0" * 64) is False
    assert has_digest(file, "0" * 40) is False
    assert has_digest(file, None) is None
