"""What stands before the routes, and how a service begins and ends; a fake model where none is needed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from starflow import StarFlowPipeline
from starflow.errors import UserError
from starflow.latents import PixelLatents
from starflow.serve.schemas import Limits
from starflow.serve.service import Guard, Service, listen
from tests.cli.conftest import random_pipeline
from tests.serve.conftest import Running, running

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

SMALL = Limits(body=2000, body_seconds=0.5)


@pytest.fixture(scope="module")
def guarded(box: StarFlowPipeline) -> Iterator[Running]:
    """With a key and narrow limits."""
    with running(Service(lambda: box, "glyphs", limits=SMALL, api_key="secret", places=8)) as found:
        yield found


def post(api: Running, key: str = "secret", **options: Any) -> Any:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **options.pop("headers", {})}
    return httpx.post(f"{api.url}/v1/images/generations", headers=headers, timeout=30, **options)


@pytest.mark.parametrize("key", ["", "wrong", "secret2", "sécret"])
def test_without_the_key_nothing_is_drawn_but_probes_answer(guarded: Running, key: str) -> None:
    answer = post(guarded, headers={"Authorization": f"Bearer {key}".strip().encode()}, json={"prompt": "a"})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{guarded.url}/v1/models").status_code == 401
    for path in ("health", "ready", "metrics"):
        assert httpx.get(f"{guarded.url}/{path}").status_code == 200


def test_with_the_key_it_is(guarded: Running) -> None:
    assert post(guarded, json={"prompt": "a red apple", "candidates": 1}).status_code == 200


def test_pages_of_other_sites_are_refused(guarded: Running) -> None:
    answer = post(guarded, headers={"Origin": "https://elsewhere.example"}, json={"prompt": "a"})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_a_body_of_another_type_is_refused(guarded: Running) -> None:
    """A page of another site may send text/plain without asking first."""
    answer = post(guarded, headers={"Content-Type": "text/plain"}, content=json.dumps({"prompt": "a"}))
    assert answer.status_code == 415


def test_a_long_body_is_refused_whether_it_says_so_or_not(guarded: Running) -> None:
    body = json.dumps({"prompt": "a" * 3000}).encode()
    assert post(guarded, content=body).status_code == 413
    chunks = (body[start : start + 500] for start in range(0, len(body), 500))
    answer = post(guarded, content=chunks)
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("length", ["3000", "1" * 19, "1" * 20])
def test_a_long_body_is_refused_before_it_is_waited_for(guarded: Running, length: str) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as one:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
        one.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{{".encode())
        assert b" 413 " in one.recv(4096).split(b"\r\n")[0]


def test_a_body_that_does_not_come_is_not_waited_for(guarded: Running) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as one:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
        one.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in one.recv(4096).split(b"\r\n")[0]


def test_bodies_together_hold_no_more_than_their_bound(box: StarFlowPipeline) -> None:
    """Many that send slowly cannot fill the memory; when one has gone there is room again."""
    limits = Limits(body=2000, bodies=1500, body_seconds=20)
    with running(Service(lambda: box, "glyphs", limits=limits)) as api:
        host, port = api.url.removeprefix("http://").split(":")
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        body = json.dumps({"prompt": "a" * 600, "model": "another"})
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(f"{head}Content-Length: 1500\r\n\r\n{'a' * 1000}".encode())
            wait_for_code(api, body, 429)
        wait_for_code(api, body, 404)


def wait_for_code(api: Running, body: str, code: int) -> None:
    end = time.monotonic() + 20
    while post(api, content=body.encode()).status_code != code:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_key_may_have_any_letters() -> None:
    service = Service(lambda: pytest.fail("nothing is loaded"), "none", api_key="schlüssel")
    guard = Guard(lambda *_: pytest.fail("nothing is called"), service)
    given = "Bearer schlüssel".encode().decode("latin-1")  # as a server reads the bytes of UTF-8
    assert guard._refusal({"authorization": given}) is None
    refused = guard._refusal({"authorization": given[:-1]})
    assert refused is not None
    assert refused.status == 401


def test_a_full_queue_is_answered_429(guarded: Running) -> None:
    answers: list[Any] = []

    def ask() -> None:
        answers.append(post(guarded, json={"prompt": "a red apple", "n": 4, "candidates": 8}))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    refused = answers[codes.index(429)]
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.json()["error"]["code"] == "queue_full"
    assert post(guarded, json={"prompt": "a red apple", "candidates": 1}).status_code == 200


def test_a_model_that_is_not_there_is_told_and_nothing_is_ready() -> None:
    def fail() -> StarFlowPipeline:
        raise UserError("no such model")

    service = Service(fail, "none")
    service.start()
    assert service.loaded.wait(10)
    assert isinstance(service.failure, UserError)
    assert not service.ready


def test_a_service_that_is_closed_while_it_loads_waits_for_that_and_draws_nothing() -> None:
    """A process that ended beside the thread that loads would abort."""
    go = threading.Event()

    def load() -> StarFlowPipeline:
        go.wait(20)
        return random_pipeline("slow", PixelLatents(), None)

    service = Service(load, "slow")
    service.start()
    assert service.computing
    assert not service.close(0.05)
    threading.Timer(0.2, go.set).start()
    assert service.close(20)
    assert service.loaded.is_set()
    assert service.scheduler is None
    assert not service.computing


def test_two_services_that_start_at_once_cannot_have_one_port() -> None:
    """The second is told so before it loads a model, though the first has not answered anybody yet."""
    with listen("127.0.0.1", 0) as first, pytest.raises(UserError, match="--port"):
        listen("127.0.0.1", first.getsockname()[1])


def test_an_answer_is_not_held_back_until_its_head_is_acknowledged() -> None:
    """Nagle's algorithm would delay every body by 40 ms, as head and body are written one after the other."""
    found: list[int] = []

    def connected(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def connect() -> None:
        bound = listen("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=bound):
            reader, writer = await asyncio.open_connection(*bound.getsockname())
            await reader.read()
            writer.close()

    asyncio.run(connect())
    assert found == [1]


def wait_for_status(url: str, status: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.get(url).status_code == status:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{url} did not answer {status} in {seconds} s")


@pytest.mark.slow
def test_sigterm_under_load_loses_no_accepted_request() -> None:
    """Of 12 clients that draw without a pause, all get what was taken, or are told to come back; then the end is 0."""
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "starflow", "serve", "--port", str(port)]
    process = subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    url, codes, broken = f"http://127.0.0.1:{port}", list[int](), list[str]()

    def client(number: int) -> None:
        with httpx.Client(timeout=60) as http:
            while True:
                asked = {"prompt": "a red apple", "n": 2, "candidates": 2, "seed": number}
                try:
                    answer = http.post(f"{url}/v1/images/generations", json=asked)
                except httpx.ConnectError:
                    return  # the service is no longer there
                except httpx.HTTPError as error:
                    broken.append(repr(error))
                    return
                codes.append(answer.status_code)
                if answer.status_code != 200:
                    return

    try:
        wait_for_status(f"{url}/ready", 200, 120)
        threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
        for one in threads:
            one.start()
        time.sleep(4)
        before = len(codes)
        process.send_signal(signal.SIGTERM)
        for one in threads:
            one.join(60)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert not broken
    assert set(codes) <= {200, 503}
    assert codes.count(200) > before, "what was at work was finished"
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
