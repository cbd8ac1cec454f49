"""The site builds without a warning, every link inside resolves, and every public name is on an API page."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from docs.write_reference import WITHOUT_PAGE
from tests.test_imports import ROOT, files, room_of

DOCS = ROOT.parents[1] / "docs"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages that `make docs` makes, without network; warnings are errors."""
    pytest.importorskip("sphinx", reason="the extra 'docs' is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-E", "-b", "html", str(DOCS)]
    env = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


class Page(HTMLParser):
    """Anchors of a page, and what it links to or shows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.anchors.add(values.get("id", ""))
        target = values.get("href" if tag in ("a", "link") else "src" if tag in ("img", "script") else "")
        if target:
            self.links.append(target)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_link_inside_resolves(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            if ":" in link.split("/")[0] or link.startswith("//"):
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (path.parent / name.partition("?")[0]).resolve() if name else path
            known = pages.get(target)
            if not target.is_file() or (anchor and known is not None and anchor not in known.anchors):
                broken.append((path.name, link))
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Style, scripts, pictures: a site that is read offline has its own."""
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert 'src="http' not in text, path.name
        assert '<link rel="stylesheet" type="text/css" href="http' not in text, path.name


def public_names() -> list[str]:
    """Every class and function of the package whose name and module are public, as the syntax trees have them."""
    found = []
    for path in files():
        if path.endswith("__init__.py") or room_of(path) in WITHOUT_PAGE:
            continue
        module = "starflow." + path.removesuffix(".py").replace("/", ".")
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                found.append(f"{module}.{node.name}")
    return found


def test_every_public_class_and_function_is_on_an_api_page(pages: dict[Path, Page]) -> None:
    anchors = {anchor for page in pages.values() for anchor in page.anchors}
    names = public_names()
    assert len(names) > 300
    assert [name for name in names if name not in anchors] == []
