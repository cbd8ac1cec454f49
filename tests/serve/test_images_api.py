"""The service as its clients see it: OpenAI's own client, and plain HTTP, against a server on the loopback."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy
import pytest
from PIL import Image

from starflow import StarFlowPipeline
from tests.serve.conftest import Running, untrained_student

httpx = pytest.importorskip("httpx")


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def photo(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A smooth picture."""
    return Image.linear_gradient("L").resize(size).convert("RGB")


def mask(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """White, to be painted anew, in a square."""
    image = Image.new("L", size)
    image.paste(255, (16, 16, 40, 40))
    return image


def generate(api: Running, **fields: Any) -> Any:
    return httpx.post(f"{api.url}/v1/images/generations", json={"candidates": 1, **fields}, timeout=60)


def quiet(api: Running) -> bool:
    scheduler = api.service.scheduler
    return scheduler is not None and scheduler.waiting + scheduler.at_work == 0


def test_the_official_client_draws(api: Running, box: StarFlowPipeline) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key="unused", max_retries=0)
    assert [one.id for one in client.models.list()] == ["glyphs"]
    made = client.images.generate(
        model="glyphs", prompt="a red apple", n=2, size="64x64", response_format="b64_json",
        extra_body={"seed": 5, "guidance": 2.0, "candidates": 1},
    )  # fmt: skip
    wanted = box("a red apple", num_images=2, seed=5, guidance=2.0, candidates=1).images
    for one, drawn in zip(made.data, wanted, strict=True):
        found = picture(one.b64_json)
        assert abs(numpy.asarray(found).astype(int) - numpy.asarray(drawn).astype(int)).max() <= 1
    assert picture(made.data[1].b64_json).info == {"prompt": "a red apple", "seed": "6", "model": "glyphs"}
    assert made.data[1].seed == 6


def test_the_official_client_streams(api: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key="unused", max_retries=0)
    stream = client.images.generate(
        model="glyphs", prompt="a red apple", stream=True, partial_images=2, extra_body={"seed": 5, "candidates": 1}
    )
    events = list(stream)
    assert [one.type for one in events] == [
        "image_generation.partial_image", "image_generation.partial_image", "image_generation.completed",
    ]  # fmt: skip
    assert [one.partial_image_index for one in events[:2]] == [0, 1]
    whole = generate(api, prompt="a red apple", seed=5).json()["data"][0]["b64_json"]
    assert events[2].b64_json == whole
    errors = [
        abs(numpy.asarray(picture(one.b64_json)).astype(int) - numpy.asarray(picture(whole)).astype(int)).mean()
        for one in events
    ]
    assert errors[0] > errors[1] > errors[2] == 0


def test_the_official_client_fills_a_hole_and_edits(api: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key="unused", max_retries=0)
    filled = client.images.edit(
        image=("photo.png", as_png(photo())), mask=("mask.png", as_png(mask())), prompt="a red apple",
        extra_body={"seed": 1, "method": "resample", "candidates": 2},
    )  # fmt: skip
    found, given = numpy.asarray(picture(filled.data[0].b64_json)), numpy.asarray(photo())
    known = numpy.asarray(mask()) == 0
    assert (found[known] == given[known]).all()
    assert (found[~known] != given[~known]).any()
    edited = client.images.edit(
        image=[("photo.png", as_png(photo()))], prompt="a red apple", n=2,
        extra_body={"source_prompt": "a blue car", "strength": 0.5, "seed": 1},
    )  # fmt: skip
    assert [one.seed for one in edited.data] == [1, 2]
    assert edited.data[0].b64_json != edited.data[1].b64_json


def test_the_official_client_streams_the_filling_of_a_hole(api: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key="unused", max_retries=0)
    asked = {"image": ("photo.png", as_png(photo())), "mask": ("mask.png", as_png(mask())), "prompt": "a red apple"}
    own = {"seed": 1, "method": "hmc", "candidates": 2, "steps": 4}
    events = list(client.images.edit(**asked, stream=True, partial_images=2, extra_body=own))
    assert [one.type for one in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert [one.partial_image_index for one in events[:2]] == [0, 1]
    whole = client.images.edit(**asked, extra_body=own).data[0].b64_json
    assert events[2].b64_json == whole, "previews change nothing"
    known = numpy.asarray(mask()) == 0
    for one in events[:2]:
        assert (numpy.asarray(picture(one.b64_json))[known] == numpy.asarray(photo())[known]).all()
        assert one.b64_json != whole


def test_a_student_draws_where_the_model_has_one(
    api: Running, box: StarFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"prompt": "a red apple", "n": 2, "seed": 5, "guidance": 0.0, "sampler": "student"}
    monkeypatch.setattr(box, "student", None)
    answer = generate(api, **asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "sampler")
    monkeypatch.setattr(box, "student", untrained_student(box))
    wanted = box("a red apple", num_images=2, seed=5, guidance=0.0, sampler="student").images
    for one, drawn in zip(generate(api, **asked).json()["data"], wanted, strict=True):
        assert abs(numpy.asarray(picture(one["b64_json"])).astype(int) - numpy.asarray(drawn).astype(int)).max() <= 1
    assert generate(api, **asked, stream=True).text.count("event: image_generation.completed") == 2
    refused = generate(api, **{**asked, "guidance": 5.0})
    assert refused.status_code == 400
    assert "trained up to 0" in refused.json()["error"]["message"]


@pytest.mark.parametrize("sampler", ["flow", "student"])
def test_a_size_that_the_model_was_not_trained_at_is_said(
    api: Running, box: StarFlowPipeline, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    monkeypatch.setattr(box, "student", untrained_student(box))
    asked: dict[str, Any] = {"prompt": "a red apple", "n": 2, "guidance": 0.0, "sampler": sampler}
    for one in generate(api, **asked, size="96x64").json()["data"]:
        (note,) = one["notes"]
        assert "trained at 64x64 pixels, not at 96x64" in note
        assert picture(one["b64_json"]).size == (96, 64)
    for size in ({}, {"size": "64x64"}):
        assert all("notes" not in one for one in generate(api, **asked, **size).json()["data"])
    assert generate(api, **asked, size="96x64", stream=True).text.count("not at 96x64") == 2


def test_openai_s_masks_are_transparent_where_to_paint(api: Running) -> None:
    alpha = photo().convert("RGBA")
    alpha.putalpha(mask().point(lambda value: 255 - value))
    files, data = {"image": ("a.png", as_png(alpha))}, {"prompt": "a", "method": "resample", "candidates": "1"}
    answer = httpx.post(f"{api.url}/v1/images/edits", files=files, data=data, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "transparent" in answer.json()["data"][0]["notes"][0]


def test_a_likelihood_is_the_pipeline_s(api: Running, box: StarFlowPipeline) -> None:
    drawn = box("a red apple", seed=3, candidates=1).images[0]
    prompts = ["a blue car", "a red apple"]
    answer = httpx.post(
        f"{api.url}/v1/likelihood",
        files={"image": ("a.png", as_png(drawn))},
        data={"prompt": prompts, "seed": "7", "draws": "2", "map": "true"},
        timeout=60,
    ).json()
    for row, prompt in zip(answer["data"], prompts, strict=True):
        wanted = box.log_prob(drawn, prompt, seed=7, draws=2)
        assert row["prompt"] == prompt
        assert row["nats"] == pytest.approx(wanted.nats, rel=1e-5)
        assert row["bits_per_dim"] == pytest.approx(wanted.bits_per_dim, rel=1e-5)
        assert row["error"] == pytest.approx(wanted.standard_error, rel=1e-3)
        assert picture(row["map_b64_png"]).size == (64, 64)
    assert answer["best"] == 1


def test_a_seed_by_chance_is_told_and_repeats(api: Running) -> None:
    first = generate(api, prompt="a red apple").json()["data"][0]
    again = generate(api, prompt="a red apple", seed=first["seed"]).json()["data"][0]
    assert first["b64_json"] == again["b64_json"]


def test_candidates_come_with_their_log_p(api: Running) -> None:
    made = generate(api, prompt="a red apple", candidates=2, seed=1).json()["data"][0]
    assert made["log_prob"] < 0
    assert "log_prob" not in generate(api, prompt="a red apple", seed=1).json()["data"][0]


WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({}, 400, "prompt", "missing"),
    ({"prompt": "a", "response_format": "url"}, 400, "response_format", "b64_json"),
    ({"prompt": "a", "sed": 4}, 400, "sed", "did you mean 'seed'"),
    ({"prompt": "a", "n": 0}, 400, "n", "1 to 16"),
    ({"prompt": "a", "n": 17}, 400, "n", "1 to 16"),
    ({"prompt": "a", "n": "2"}, 400, "n", "int"),
    ({"prompt": "a", "n": True}, 400, "n", "int"),
    ({"prompt": 5}, 400, "prompt", "str"),
    ({"prompt": "a" * 2001}, 400, "prompt", "2000"),
    ({"prompt": "a", "size": "63x64"}, 400, None, "multiples of 8"),
    ({"prompt": "a", "size": "64"}, 400, "size", "WIDTHxHEIGHT"),
    ({"prompt": "a", "size": "4096x4096"}, 400, "size", "at most"),
    ({"prompt": "a", "size": "256x128"}, 400, "size", "4 times the pixels of 64x64"),
    ({"prompt": "a", "seed": -1}, 400, "seed", "seed"),
    ({"prompt": "a", "seed": 2**64}, 400, "seed", "seed"),
    ({"prompt": "a", "seed": 10**400}, 400, "seed", "seed"),
    ({"prompt": "a", "guidance": 10**400}, 400, None, "too large"),
    ({"prompt": "a", "guidance": -1}, 400, "guidance", "0 to 100"),
    ({"prompt": "a", "guidance": "1e999"}, 400, "guidance", "0 to 100"),
    ({"prompt": "a", "partial_images": 2}, 400, "partial_images", "stream"),
    ({"prompt": "a", "model": "dall-e-3"}, 404, "model", "not served"),
    ({"prompt": "a", "timeout": 1e6}, 400, "timeout", "timeout"),
    ({"prompt": "a \ud800 b"}, 400, "prompt", "surrogate"),
]


@pytest.mark.parametrize(("fields", "status", "param", "says"), WRONG)
def test_a_wrong_field_is_named(
    api: Running, fields: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    answer = httpx.post(
        f"{api.url}/v1/images/generations",
        content=json.dumps(fields),
        headers={"x-request-id": "mine-1", "Content-Type": "application/json"},
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"] == error["request_id"] == "mine-1"
    assert "\n" not in error["message"]
    assert len(error["message"]) <= 400


@pytest.mark.parametrize(
    ("files", "data", "param"),
    [
        ({}, {"prompt": "a"}, None),  # a form without a file is sent as another kind of body
        ({"mask": ("m.png", as_png(mask()))}, {"prompt": "a"}, "image"),
        ({"image": ("a.png", as_png(photo()))}, {"prompt": "a"}, None),  # neither mask nor source prompt
        ({"image": ("a.png", as_png(photo().convert("RGBA")))}, {"prompt": "a"}, None),  # nothing is transparent
        ({"image": ("a.png", b"no picture")}, {"prompt": "a"}, "image"),
        ({"image": ("a.png", as_png(photo())[:150])}, {"prompt": "a", "source_prompt": "b"}, "image"),
        ({"image": ("a.png", as_png(photo())), "mask": ("m", b"\x89PNG")}, {"prompt": "a"}, "mask"),
        ({"image": ("a.png", as_png(photo())), "file": ("m", b"x")}, {"prompt": "a"}, "file"),
        ({"image": ("a.png", as_png(photo()))}, {"prompt": "a", "source_prompt": "b", "strength": "2"}, "strength"),
        ({"image": ("a.png", as_png(photo()))}, {"prompt": "a", "strength": "0.5"}, "strength"),
        ({"image": ("a.png", as_png(photo()))}, {"prompt": "a", "source_prompt": "b", "steps": "3"}, "steps"),
        ({"image": ("a.png", as_png(photo((1200, 1200))))}, {"prompt": "a", "source_prompt": "b", "n": "16"}, "n"),
        ({"image": ("a.png", as_png(photo()))}, {"prompt": ["a", "b"], "source_prompt": "b"}, "prompt"),
    ],
)
def test_a_wrong_form_is_named(api: Running, files: dict[str, Any], data: dict[str, Any], param: str | None) -> None:
    answer = httpx.post(f"{api.url}/v1/images/edits", files=files or None, data=data)
    assert answer.status_code in (400, 415), answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_unknown_paths_and_methods_have_the_same_shape(api: Running) -> None:
    for answer in (httpx.get(f"{api.url}/v1/nothing"), httpx.get(f"{api.url}/v1/images/generations")):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]


def test_a_huge_picture_is_refused_before_it_is_decoded(api: Running) -> None:
    """A few kilobytes of PNG that would be 192 MB."""
    image = Image.new("1", (8000, 8000))
    files = {"image": ("a.png", as_png(image))}
    answer = httpx.post(f"{api.url}/v1/likelihood", files=files)
    assert answer.status_code == 400
    assert "8000x8000" in answer.json()["error"]["message"]


def test_what_is_not_finite_is_one_s_own(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert api.service.scheduler is not None
    sampler: Any = api.service.scheduler.sampler
    encode = sampler._encode

    def poisoned(prompt: str, shape: tuple[int, int, int]) -> Any:
        condition, null = encode(prompt, shape)
        return (condition * float("nan"), null) if prompt == "poison" else (condition, null)

    monkeypatch.setattr(sampler, "_encode", poisoned)
    answer = generate(api, prompt="poison")
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "not_finite"
    stream = generate(api, prompt="poison", stream=True).text
    assert stream.startswith("event: error\n")
    assert '"not_finite"' in stream


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_noticed_queued_or_at_work(api: Running, stream: bool) -> None:
    service = api.service
    assert service.scheduler is not None
    host, port = api.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a red apple", "n": 16, "candidates": 8, "stream": stream}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    sockets = []
    for _ in range(3):
        one = socket.create_connection((host, int(port)))
        one.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        sockets.append(one)
    wait_for(lambda: service.scheduler is not None and service.scheduler.waiting + service.scheduler.at_work > 16)
    for one in sockets:
        one.close()
    wait_for(lambda: quiet(api))
    assert generate(api, prompt="a red apple").status_code == 200
    assert 'outcome="cancelled"' in httpx.get(f"{api.url}/metrics").text


def test_health_models_and_metrics(api: Running) -> None:
    assert httpx.get(f"{api.url}/health").json() == {"status": "alive"}
    assert httpx.get(f"{api.url}/ready").status_code == 200
    assert httpx.get(f"{api.url}/v1/models").json()["data"][0]["id"] == "glyphs"
    generate(api, prompt="a red apple")
    text = httpx.get(f"{api.url}/metrics").text
    for name in (
        "starflow_queue_depth 0.0", "starflow_at_work 0.0", "starflow_wait_seconds_count", 'stage="block 3"',
        'stage="decode"', "starflow_pictures_total", 'starflow_ended_total{kind="pictures",outcome="done"}',
        'starflow_requests_total{path="/v1/images/generations",status="200"}',
    ):  # fmt: skip
        assert name in text


def test_a_deadline_is_answered(api: Running) -> None:
    answer = generate(api, prompt="a red apple", n=16, candidates=16, timeout=0.05)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    wait_for(lambda: quiet(api))
