"""The routes: OpenAI's Images API, likelihoods, health and metrics, as the ASGI application of a `Service`.

A client that goes away is noticed, and its request cancelled, whether it is queued or at work.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

from starflow.pipeline.config import default_size
from starflow.pipeline.editing import Edited
from starflow.serve import schemas
from starflow.serve.drawing import EditRequest, PromptLikelihood, edit_calls, likelihood_call, seen_by, student_calls
from starflow.serve.queue import CancelledError, Drawn, Event, Listener, Ticket
from starflow.serve.schemas import BodyError, Failure
from starflow.serve.service import Guard, Service, failure_of

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from PIL.Image import Image

PNG_LEVEL = 1
"""Of compression: against Pillow's 6 a picture takes a tenth more bytes, and less than half of the time."""

Kind = Literal["image_generation", "image_edit"]
"""What the events of a stream are of."""

Handler = Callable[[Service, "Request"], Awaitable["Response"]]


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service; it starts and closes the service with its own life."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close, 5.0)

    app = FastAPI(title="starflow", openapi_url=None, lifespan=lifespan)
    for method, path, handler in ROUTES:
        app.add_route(path, _answered(service, path, handler), methods=[method])

    async def refuse(request: Request, error: HTTPException) -> Response:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        body = Failure(error.status_code, str(error.detail), kind).body(request.state.request_id)
        return JSONResponse(body, error.status_code)

    app.add_exception_handler(HTTPException, refuse)
    app.add_middleware(Guard, service=service)
    return app


def _answered(service: Service, path: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """A handler whose errors become answers, and whose answers are counted."""
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    async def answer(request: Request) -> Response:
        try:
            response = await handler(service, request)
        except (CancelledError, ClientDisconnect):
            response = Response(status_code=499)  # nobody reads it
        except HTTPException as error:
            failure = Failure(error.status_code, str(error.detail), "invalid_request_error")
            response = JSONResponse(failure.body(request.state.request_id), failure.status)
        except Exception as error:  # noqa: BLE001  # every error is answered
            failure = failure_of(error, request.state.request_id)
            error.__traceback__ = None  # its frames hold the pictures until the garbage is next collected
            retry = {} if failure.retry_after is None else {"Retry-After": str(failure.retry_after)}
            response = JSONResponse(failure.body(request.state.request_id), failure.status, retry)
        service.metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    return answer


async def _form(request: Request, files: Iterable[str]) -> tuple[list[tuple[str, str]], dict[str, bytes]]:
    """The texts of a multipart form, and the files of the given names.

    Raises:
        BodyError: another kind of body, or a file that is unknown, or twice.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise BodyError("the body is no multipart/form-data: send a form", None, 415)
    texts: list[tuple[str, str]] = []
    found: dict[str, bytes] = {}
    async with request.form(max_files=8, max_fields=64) as form:
        for name, value in form.multi_items():
            known = name.removesuffix("[]")
            if isinstance(value, str):
                if known in files:
                    raise BodyError(f"'{known}' is a text, expected a file", known)
                texts.append((name, value))
            elif known not in files or known in found:
                wrong = "is given twice, expected one" if known in found else "is an unknown file"
                raise BodyError(f"'{known}' {wrong}", known)
            else:
                found[known] = await value.read()
    return texts, found


def _client(request: Request, body: schemas.GenerationBody | schemas.EditBody | schemas.LikelihoodBody) -> str:
    """Whose turns a request takes."""
    return body.safety_identifier or body.user or (request.client.host if request.client else "")


async def _gone(request: Request) -> None:
    """Wait until the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _results(request: Request, ticket: Ticket) -> list[Any]:
    """What a ticket gives; it is cancelled when its client hangs up.

    Raises:
        CancelledError: the client is gone.
    """
    gone = asyncio.create_task(_gone(request))
    waited: asyncio.Future[list[Any]] = asyncio.wrap_future(ticket.future)
    both: list[asyncio.Future[Any]] = [waited, gone]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not waited.done():
            raise CancelledError("the client is gone")
        return waited.result()
    finally:
        gone.cancel()
        ticket.cancel()
        waited.add_done_callback(lambda one: one.cancelled() or one.exception())  # nobody else asks for it


async def generations(service: Service, request: Request) -> Response:
    """`POST /v1/images/generations`."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise BodyError("the body's type is not application/json: say so in Content-Type", None, 415)
    body = schemas.read_json(schemas.GenerationBody, await request.body())
    schemas.check_common(body, service.limits, service.name)
    asked = schemas.draw_request(body, service.limits)
    scheduler, pipeline = service.working()
    schemas.check_drawn_size(asked.size, default_size(pipeline.config, pipeline.flow.config))
    if asked.sampler == "student" and pipeline.student is None:
        raise BodyError(f"'sampler' is 'student', but the model '{service.name}' has none: use 'flow'", "sampler")

    def submit(listener: Listener | None) -> Ticket:
        client, timeout = _client(request, body), body.timeout or service.limits.timeout
        if asked.sampler == "flow":
            return scheduler.draw(asked, client, timeout, listener)
        cost = schemas.STUDENT_COST * (asked.candidates or 1)
        return scheduler.call(student_calls(pipeline, asked), "pictures", cost, client, timeout, listener)

    return await _answer(service, request, body, "image_generation", submit)


async def _answer(
    service: Service,
    request: Request,
    body: schemas.GenerationBody | schemas.EditBody,
    kind: Kind,
    submit: Callable[[Listener | None], Ticket],
) -> Response:
    """Pictures of what `submit` queues, all at the end or as a stream."""
    from fastapi.responses import JSONResponse, StreamingResponse

    if body.stream:
        events = _EventQueue()
        ticket = submit(events.put)
        events.follow(ticket)
        stream = _server_sent(service, request, ticket, events, body.prompt, kind)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    made = await _results(request, submit(None))
    pictures = await asyncio.to_thread(lambda: [picture_json(one, body.prompt, service.name) for one in made])
    return JSONResponse(pictures_json(pictures, picture_of(made[0]).size, service.name))


class _EventQueue:
    """A ticket's events, carried from the model's thread to the event loop; None says that there are no more."""

    def __init__(self) -> None:
        self._loop, self.events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

    def put(self, event: Event | None) -> None:
        """Called from any thread."""
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def follow(self, ticket: Ticket) -> None:
        """Put None when the ticket is done."""
        ticket.future.add_done_callback(lambda _: self.put(None))


async def _server_sent(
    service: Service, request: Request, ticket: Ticket, queue: _EventQueue, prompt: str, kind: Kind
) -> AsyncIterator[str]:
    """Previews and pictures as server-sent events, as OpenAI's streams have them."""
    gone, shown = asyncio.create_task(_gone(request)), dict[int, int]()
    try:
        while True:
            coming = asyncio.create_task(queue.events.get())
            await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return
            event = coming.result()
            if event is None:
                break
            yield _line(await asyncio.to_thread(_event_json, event, prompt, service.name, kind, shown))
        error = ticket.future.exception()
        if error is not None and not isinstance(error, CancelledError):
            failure = failure_of(error, request.state.request_id)
            yield _line({"type": "error", **failure.body(request.state.request_id)})
    finally:
        gone.cancel()
        ticket.cancel()


def _event_json(event: Event, prompt: str, model: str, kind: Kind, shown: dict[int, int]) -> dict[str, Any]:
    """One event as JSON; `shown` counts the previews of each picture."""
    common = {"created_at": int(time.time()), "quality": "auto", "background": "opaque", "output_format": "png"}
    if event.preview is not None:
        number = shown.get(event.index, 0)
        shown[event.index] = number + 1
        size, data = event.preview.size, {"b64_json": to_png(event.preview), "partial_image_index": number}
    else:
        size, data = picture_of(event.result).size, picture_json(event.result, prompt, model)
    name = f"{kind}.partial_image" if event.preview is not None else f"{kind}.completed"
    return {"type": name, **data, "index": event.index, "size": f"{size[0]}x{size[1]}", **common}


def _line(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


async def edits(service: Service, request: Request) -> Response:
    """`POST /v1/images/edits`."""
    texts, files = await _form(request, ("image", "mask"))
    body = schemas.read_form(schemas.EditBody, texts)
    schemas.check_common(body, service.limits, service.name)
    schemas.check_edit(body, service.limits)
    scheduler, pipeline = service.working()

    def read() -> EditRequest:
        asked = schemas.edit_request(body, files, service.limits)
        asked.check()
        return asked

    async with service.reading:
        asked = await asyncio.to_thread(read)

    def submit(listener: Listener | None) -> Ticket:
        calls = edit_calls(pipeline, asked, listener)
        client, timeout = _client(request, body), body.timeout or service.limits.timeout
        return scheduler.call(calls, "edit", asked.cost, client, timeout, listener, places=asked.places)

    return await _answer(service, request, body, "image_edit", submit)


async def likelihood(service: Service, request: Request) -> Response:
    """`POST /v1/likelihood`."""
    from fastapi.responses import JSONResponse

    texts, files = await _form(request, ("image",))
    body = schemas.read_form(schemas.LikelihoodBody, texts)
    schemas.check_common(body, service.limits, service.name)
    schemas.check_likelihood(body, service.limits)
    if "image" not in files:
        raise BodyError("the file 'image' is missing: add it", "image")
    scheduler, pipeline = service.working()

    def read() -> Image:
        return seen_by(pipeline, schemas.read_picture(files["image"], "image", service.limits))

    async with service.reading:
        seen = await asyncio.to_thread(read)
    call = likelihood_call(pipeline, seen, body.prompt, body.seed, body.draws, heat=body.map)
    cost, timeout = float(len(body.prompt) * body.draws), body.timeout or service.limits.timeout
    (found,) = await _results(request, scheduler.call([call], "likelihood", cost, _client(request, body), timeout))
    return JSONResponse(await asyncio.to_thread(likelihood_json, found, service.name))


async def models(service: Service, _: Request) -> Response:
    """`GET /v1/models`."""
    from fastapi.responses import JSONResponse

    model = {"id": service.name, "object": "model", "created": int(service.started), "owned_by": "starflow"}
    return JSONResponse({"object": "list", "data": [model]})


async def health(_service: Service, _: Request) -> Response:
    """`GET /health`: the process is alive."""
    from fastapi.responses import JSONResponse

    return JSONResponse({"status": "alive"})


async def ready(service: Service, _: Request) -> Response:
    """`GET /ready`: requests are taken."""
    from fastapi.responses import JSONResponse

    status = "ready" if service.ready else "draining" if service.draining else "loading"
    return JSONResponse({"status": status}, 200 if service.ready else 503)


async def metrics(service: Service, _: Request) -> Response:
    """`GET /metrics`, for Prometheus."""
    from fastapi.responses import Response

    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def to_png(image: Image, text: Mapping[str, str] | None = None) -> str:
    """A picture as base64 of a PNG, with `text` in its text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    for name, value in (text or {}).items():
        info.add_itxt(name, value)
    image.save(buffer, "PNG", pnginfo=info, compress_level=PNG_LEVEL)
    return base64.b64encode(buffer.getvalue()).decode()


def picture_of(made: Drawn | Edited) -> Image:
    """The picture of one result."""
    return made.image if isinstance(made, Drawn) else made.images[0]


def picture_json(made: Drawn | Edited, prompt: str, model: str) -> dict[str, Any]:
    """One picture of an answer, drawn or changed."""
    seed = made.seed if isinstance(made, Drawn) else made.seeds[0]
    text = {"prompt": prompt, "seed": str(seed), "model": model}
    found: dict[str, Any] = {"b64_json": to_png(picture_of(made), text), "seed": seed}
    if isinstance(made, Edited):
        return {**found, "notes": made.notes, "log_prob": _finite(made.log_prob[0])}
    if made.notes:
        found["notes"] = made.notes
    return found if made.log_prob is None else {**found, "log_prob": made.log_prob}


def likelihood_json(found: Sequence[PromptLikelihood], model: str) -> dict[str, Any]:
    """The answer with likelihoods; `best` is the index of the prompt that fits best."""
    rows = []
    for one in found:
        row = {
            "prompt": one.prompt,
            "nats": one.found.nats,
            "bits_per_dim": one.found.bits_per_dim,
            "error": one.found.standard_error,
            "dimensions": one.found.dimensions,
            "space": one.found.space,
            "draws": one.found.draws,
        }
        rows.append(row if one.heat is None else {**row, "map_b64_png": to_png(one.heat)})
    best = max(range(len(found)), key=lambda index: found[index].found.nats)
    return {"object": "likelihood", "model": model, "best": best, "data": rows}


def pictures_json(pictures: Sequence[Mapping[str, Any]], size: tuple[int, int], model: str) -> dict[str, Any]:
    """The answer with pictures."""
    return {
        "created": int(time.time()),
        "model": model,
        "size": f"{size[0]}x{size[1]}",
        "output_format": "png",
        "data": list(pictures),
    }


def _finite(value: float) -> float | None:
    """A number as JSON has it, which knows no NaN."""
    return value if math.isfinite(value) else None


ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/images/generations", generations),
    ("POST", "/v1/images/edits", edits),
    ("POST", "/v1/likelihood", likelihood),
    ("GET", "/v1/models", models),
    ("GET", "/health", health),
    ("GET", "/ready", ready),
    ("GET", "/metrics", metrics),
)
