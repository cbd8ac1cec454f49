"""A service: a model that is being loaded or is there, its scheduler, its metrics, and the guard before its routes."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from starflow.errors import UserError
from starflow.serve import schemas
from starflow.serve.drawing import BlockSampler
from starflow.serve.queue import ClosingError, QueueFullError
from starflow.serve.scheduler import PLACES, Observer, Scheduler
from starflow.serve.schemas import BodyError, Failure, Limits

if TYPE_CHECKING:
    from starflow.pipeline.pipeline import StarFlowPipeline

LOGGER = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""Ids of a client's own that are echoed."""

CONNECTIONS = 1000
"""At once; more are answered 503."""

READERS = 2
"""Uploads that are decoded at once: one of 16 million pixels takes some hundred megabytes on the way."""

ANSWER_SECONDS = 10
"""For the last answers to be written when the work is done."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Metrics(Observer):
    """What Prometheus reads, of one service."""

    def __init__(self, service: Service) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        self.requests = Counter(
            "starflow_requests", "Answers by path and status", ("path", "status"), registry=self.registry
        )
        self._waits = Histogram("starflow_wait_seconds", "Seconds until a picture begins", registry=self.registry)
        sizes = (1, 2, 4, 8, 12, 16, 24, 32, 64)
        self._rows = Histogram("starflow_batch_rows", "Rows at once", ("stage",), registry=self.registry, buckets=sizes)
        self._stages = Histogram("starflow_stage_seconds", "Seconds of a stage", ("stage",), registry=self.registry)
        self._ended = Counter(
            "starflow_ended", "Requests by kind and outcome", ("kind", "outcome"), registry=self.registry
        )
        self._pictures = Counter("starflow_pictures", "Pictures that were made", registry=self.registry)
        for name, text, read in (
            ("starflow_queue_depth", "Pictures and calls that wait", lambda: _count(service, "waiting")),
            ("starflow_at_work", "Pictures and calls that have begun", lambda: _count(service, "at_work")),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def waited(self, seconds: float) -> None:
        self._waits.observe(seconds)

    def worked(self, stage: str, rows: int, seconds: float) -> None:
        self._rows.labels(stage).observe(rows)
        self._stages.labels(stage).observe(seconds)

    def ended(self, kind: str, outcome: str, parts: int) -> None:
        self._ended.labels(kind, outcome).inc()
        if outcome == "done" and kind != "likelihood":
            self._pictures.inc(parts)

    def text(self) -> bytes:
        """The metrics as they are scraped."""
        from prometheus_client import generate_latest

        written: bytes = generate_latest(self.registry)
        return written


def _count(service: Service, name: str) -> int:
    return 0 if service.scheduler is None else int(getattr(service.scheduler, name))


class Service:
    """A model that is being loaded or is there, its scheduler, and what the routes need to know.

    Args:
        load: gives the pipeline; runs in a thread.
        name: of the model, as clients call it.
        limits: of requests.
        api_key: that requests must carry; "" is none.
        places: of the queue.
        max_rows: rows of a batch.
    """

    def __init__(
        self,
        load: Callable[[], StarFlowPipeline],
        name: str,
        *,
        limits: Limits | None = None,
        api_key: str = "",
        places: int = PLACES,
        max_rows: int = 16,
    ) -> None:
        self.name, self.limits, self.api_key = name, limits or Limits(), api_key
        self.scheduler: Scheduler | None = None
        self.failure: Exception | None = None
        """Why there is no model."""
        self.loaded = threading.Event()
        """Set when loading is over, either way."""
        self.started, self.draining = time.time(), False
        self.metrics = Metrics(self)
        self.reading = asyncio.Semaphore(READERS)
        """Held while an upload is decoded."""
        self._load, self._places, self._max_rows = load, places, max_rows
        self._pipeline: StarFlowPipeline | None = None
        self._begun = False

    def start(self) -> None:
        """Load the model and begin to work, in a thread; a second call does nothing."""
        if self._begun:
            return
        self._begun = True
        threading.Thread(target=self._run, name="starflow-model", daemon=True).start()

    def _run(self) -> None:
        """Load, and work; all in one thread, see `Scheduler.work`."""
        try:
            self._pipeline = self._load()
            sampler = BlockSampler(self._pipeline, self._max_rows)
            sampler.warm_up()
            scheduler = Scheduler(sampler, places=self._places, observer=self.metrics)
        except Exception as error:  # noqa: BLE001  # whoever started the service is told
            self.failure = error
            self.loaded.set()
            return
        if self.draining:
            self.loaded.set()
            return
        self.scheduler = scheduler
        scheduler.work(begun=self.loaded.set)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.scheduler is not None and not self.draining

    def working(self) -> tuple[Scheduler, StarFlowPipeline]:
        """The scheduler and the pipeline.

        Raises:
            ClosingError: they are not there yet, or not for long.
        """
        if self.draining:
            raise ClosingError("the service is shutting down: ask again in a moment", 5)
        if self.scheduler is None or self._pipeline is None:
            raise ClosingError("the model is being loaded: ask again in a moment", 2)
        return self.scheduler, self._pipeline

    def close(self, timeout: float) -> bool:
        """Take nothing more and finish what is here, loading as well; whether that was done in time."""
        self.draining, until = True, time.monotonic() + timeout
        if self._begun and not self.loaded.wait(timeout):
            return False
        return self.scheduler is None or self.scheduler.close(max(0.0, until - time.monotonic()))

    @property
    def computing(self) -> bool:
        """Whether a thread of it loads or draws."""
        loading = self._begun and not self.loaded.is_set()
        return loading or (self.scheduler is not None and self.scheduler.running)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free.

    Raises:
        UserError: there is no such address, or the port is taken.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        bound = socket.socket(family, kind, protocol)  # asyncio sets TCP_NODELAY only where the protocol is named
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # or another service that starts at this moment could have the port as well
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}): choose another --host or --port") from None
    return bound


def run(app: Any, service: Service, bound: socket.socket, drain_seconds: float) -> None:
    """Serve an application of a service until a signal comes; then it finishes what it has, in so many seconds at most.

    While it does, `/ready` says no and new requests are refused with 503. A second signal ends it at once. Where the
    model is still at work then, the process ends here, with code 1.

    Raises:
        UserError: the model cannot be loaded.
    """
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=ANSWER_SECONDS,
        )
    )

    def drain() -> None:
        if not service.close(drain_seconds):
            LOGGER.warning("not all requests were done in %g s", drain_seconds)
        server.should_exit = True

    def handle_exit(_signal: int, _frame: Any) -> None:
        if service.draining:
            server.should_exit = server.force_exit = True
            return
        service.draining = True
        threading.Thread(target=drain, name="starflow-drain", daemon=True).start()

    def watch() -> None:
        service.loaded.wait()
        if service.failure is not None:
            server.should_exit = True

    server.handle_exit = handle_exit
    threading.Thread(target=watch, name="starflow-watch", daemon=True).start()
    server.run(sockets=[bound])
    if service.failure is not None:
        raise service.failure
    if service.computing:  # compiled code aborts a process whose interpreter ends beside it
        logging.shutdown()
        os._exit(1)


class Guard:
    """Every request gets an id, which is answered; those of the API are checked before their body is read."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], service: Service) -> None:
        self.app, self.service = app, service
        self.held = 0  # bytes of bodies that are being received or answered

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        if not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send_with_id)
            return
        failure = self._refusal(headers)
        if failure is None:
            body = _Body(self)
            try:
                await self.app(scope, body.limited(receive), send_with_id)
            finally:
                self.held -= body.taken
            return
        self.service.metrics.requests.labels("refused", str(failure.status)).inc()
        answer = json.dumps(failure.body(request_id)).encode()
        start = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        if failure.status == 413:
            start.append((b"connection", b"close"))  # its body is not read
        await send_with_id({"type": "http.response.start", "status": failure.status, "headers": start})
        await send_with_id({"type": "http.response.body", "body": answer})

    def _refusal(self, headers: dict[str, str]) -> Failure | None:
        key, limit = self.service.api_key, self.service.limits.body
        given = headers.get("authorization", "").encode("latin-1")
        if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            text = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
            return Failure(401, text, "authentication_error", None, "invalid_api_key")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            return Failure(403, "requests of other sites' pages are not answered", "permission_error")
        length = headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            return Failure(413, f"the body has {length[:20]} bytes, expected at most {limit}", "invalid_request_error")
        return None


class _Body:
    """The body of one request as it arrives: it has a largest size, a time, and a share of what all bodies may hold."""

    def __init__(self, guard: Guard) -> None:
        self.guard, self.limits = guard, guard.service.limits
        self.taken, self.complete = 0, False
        self.deadline = time.monotonic() + self.limits.body_seconds

    def limited(self, receive: Receive) -> Receive:
        """`receive` within the limits; after the body, anything may take as long as it takes."""
        limits = self.limits

        async def limited() -> Message:
            if self.complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.001, self.deadline - time.monotonic()))
            except TimeoutError:
                raise BodyError(f"the body did not arrive in {limits.body_seconds:g} s", None, 408) from None
            size = len(message.get("body", b""))
            self.taken += size
            self.guard.held += size
            self.complete = not message.get("more_body", False)
            if self.taken > limits.body:
                raise BodyError(f"the body has over {limits.body} bytes, expected fewer", None, 413)
            if self.guard.held > limits.bodies:
                raise QueueFullError("too many bytes are being received: ask again later", 5)
            return message

        return limited


def failure_of(error: BaseException, request_id: str) -> Failure:
    """The answer to an error; one that is a fault of ours goes to the log, not to the client."""
    failure = schemas.failure_of(error)
    if failure is None:
        LOGGER.error("request %s failed", request_id, exc_info=error)
        failure = Failure(500, "the service failed: its log says why", "server_error", None, "internal_error")
    return failure
