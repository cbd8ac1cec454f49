"""Bodies that no client should send: each gets an answer in the known shape, never a 500, a traceback or silence."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from starflow import StarFlowPipeline
from starflow.serve.schemas import EditBody, GenerationBody, LikelihoodBody, Limits
from starflow.serve.service import Service
from tests.serve.conftest import Running, running

httpx = pytest.importorskip("httpx")

NARROW = Limits(body=200_000, pictures=2, candidates=2, prompt=300, steps=2, draws=2, prompts=2, drawn_pixels=128 * 64)
"""What is right by chance shall cost little."""


@pytest.fixture(scope="module")
def narrow(box: StarFlowPipeline) -> Iterator[Running]:
    with running(Service(lambda: box, "glyphs", limits=NARROW)) as found:
        yield found


def png(size: int) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((size, size)).save(buffer, "PNG")
    return buffer.getvalue()


NUMBERS = st.one_of(
    st.integers(-3, 20), st.integers(), st.sampled_from([2**31, 2**63 - 1, 2**63, 10**30, 10**4000, -(2**63), 1e308])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=40)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
WORDS = st.sampled_from(["", "a red apple", "auto", "b64_json", "url", "64x64", "0x0", "99999x1", "-1", "nan", "1e999"])
FIELDS = sorted(set().union(*(cls.__dataclass_fields__ for cls in (GenerationBody, EditBody, LikelihoodBody))))
NAMES = st.one_of(st.sampled_from(FIELDS), st.text(max_size=10))


@st.composite
def json_bodies(draw: st.DrawFn) -> bytes:
    """Nearly right objects, any JSON, or bytes; with numbers that JSON has not, and halves of surrogate pairs."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=200))
    if kind == 1:
        return draw(st.sampled_from([b"[" * 50_000, b'{"a":' * 30_000, b"1" * 5000, b"", b"null", b'"\\ud800"', b"{"]))
    fields: Any = draw(VALUES if kind == 2 else st.dictionaries(NAMES, st.one_of(VALUES, WORDS), max_size=5))
    if isinstance(fields, dict) and kind > 3:
        fields = {"prompt": draw(WORDS), "candidates": 1, **fields}
    text = json.dumps(fields, ensure_ascii=draw(st.booleans()))
    data = text.encode("utf-8", "surrogatepass")
    return data[: draw(st.integers(0, len(data)))] if kind == 3 else data


@st.composite
def forms(draw: st.DrawFn) -> tuple[bytes, str]:
    """A multipart body and its type: fields and files of all sorts, the bytes sometimes cut or changed."""
    pictures = st.one_of(
        st.binary(max_size=100),
        st.sampled_from([png(64), png(65), png(8)]),
        st.builds(lambda cut: png(64)[:cut], st.integers(0, 400)),
        st.builds(lambda at, byte: _changed(png(64), at, byte), st.integers(0, 400), st.integers(0, 255)),
    )
    files = draw(st.dictionaries(st.sampled_from(["image", "mask", "image[]", "file"]), pictures, max_size=3))
    fields = draw(st.lists(st.tuples(NAMES, st.one_of(WORDS, st.text(max_size=20), NUMBERS.map(str))), max_size=4))
    if draw(st.booleans()):
        fields = [("prompt", "a"), ("method", "resample"), ("candidates", "1"), *fields]
    if draw(st.booleans()):
        files = {"image": png(64), **files}
    request = httpx.Request(
        "POST",
        "http://x",
        files=[(name, (name, data)) for name, data in files.items()] or [("mask", ("m", b""))],
        data=_several(fields),
    )
    data, kind = request.read(), request.headers["content-type"]
    change = draw(st.integers(0, 5))
    if change == 0:
        data = data[: draw(st.integers(0, len(data)))]
    if change == 1:
        data = _changed(data, draw(st.integers(0, len(data))), draw(st.integers(0, 255)))
    if change == 2:
        kind = draw(
            st.sampled_from(["multipart/form-data", "multipart/form-data; boundary=", kind + "x", "text/plain"])
        )
    return data, kind


def _several(fields: list[tuple[str, str]]) -> dict[str, list[str]]:
    several: dict[str, list[str]] = {}
    for name, value in fields:
        several.setdefault(name, []).append(value.encode("utf-8", "replace").decode())
    return several


def _changed(data: bytes, at: int, byte: int) -> bytes:
    at = min(at, len(data) - 1)
    return data[:at] + bytes([byte]) + data[at + 1 :]


def check(api: Running, path: str, data: bytes, kind: str) -> None:
    answer = httpx.post(f"{api.url}{path}", content=data, headers={"Content-Type": kind}, timeout=60)
    assert answer.status_code in (200, 400, 404, 408, 413, 415, 422), (answer.status_code, answer.text[:500])
    assert "Traceback" not in answer.text
    if answer.status_code != 200 and not answer.headers["content-type"].startswith("text/event-stream"):
        error = answer.json()["error"]
        assert error["request_id"] == answer.headers["x-request-id"]
        assert error["message"]
        assert "\n" not in error["message"]


def fuzz(api: Running, count: int) -> None:
    @settings(max_examples=count // 2, database=None, suppress_health_check=list(HealthCheck))
    @given(json_bodies())
    def try_json(data: bytes) -> None:
        check(api, "/v1/images/generations", data, "application/json")

    @settings(max_examples=count // 2, database=None, suppress_health_check=list(HealthCheck))
    @given(forms(), st.sampled_from(["/v1/images/edits", "/v1/likelihood"]))
    def try_form(form: tuple[bytes, str], path: str) -> None:
        check(api, path, *form)

    try_json()
    try_form()
    assert httpx.get(f"{api.url}/ready").status_code == 200
    scheduler = api.service.scheduler
    assert scheduler is not None
    assert scheduler.waiting + scheduler.at_work == 0


def test_sixty_bodies(narrow: Running) -> None:
    fuzz(narrow, 60)


@pytest.mark.slow
def test_two_thousand_bodies(narrow: Running) -> None:
    fuzz(narrow, 2000)
