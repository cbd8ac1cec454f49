"""Bodies of requests and the shape of errors: the dialect of OpenAI's Images API, with extras at the top level.

Contract: every field of a body is known, typed and bounded, or the request is refused with one line that names it. No
path, address or file of the server is ever read from a request. An answer's error has OpenAI's shape.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from starflow.config import Dataclass, from_dict
from starflow.data.images import decode_image, image_errors
from starflow.edit.inpainting import InpaintSettings, Method
from starflow.errors import UserError
from starflow.flow.finite import NotFiniteError
from starflow.serve.drawing import EditRequest
from starflow.serve.queue import ClosingError, DeadlineError, DrawRequest, QueueFullError

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T", bound=Dataclass)

LONGEST_MESSAGE = 400
"""Characters of an error's message."""

LARGEST_SEED = 2**63 - 1

STUDENT_COST = 0.2
"""Of a student's candidate, in rows of the flow."""

LARGEST_GROWTH = 4
"""The most pixels of a drawn picture, in those of the model's own size."""

FORMATS = ("PNG", "JPEG", "WEBP")
"""Of pictures that are taken."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most."""

    body: int = 20 * 2**20
    """Bytes of a request."""
    bodies: int = 20 * 2**24
    """Bytes of all requests that are being received or answered."""
    body_seconds: float = 30.0
    """In which a request's body must arrive."""
    pixels: int = 4096 * 4096
    """Of an uploaded picture, and of all pictures that an edit makes of it."""
    drawn_pixels: int = 2048 * 2048
    """Of a picture that is drawn."""
    pictures: int = 16
    """Of a request: n."""
    candidates: int = 32
    """Of a picture."""
    prompt: int = 2000
    """Characters."""
    prompts: int = 16
    """Of a likelihood."""
    draws: int = 64
    """Of a likelihood's noise."""
    steps: int = 200
    """Of a chain that fills a hole."""
    guidance: float = 100.0
    temperature: float = 10.0
    timeout: float = 600.0
    """Seconds from when a request arrives until it is answered or refused."""


class BodyError(UserError):
    """A field that is wrong; `param` is its name, `status` the answer's."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True)
class GenerationBody:
    """The JSON of `POST /v1/images/generations`. None leaves a choice to the model, and a seed to chance."""

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    """"auto" or "WIDTHxHEIGHT"."""
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    stream: bool | None = None
    partial_images: int | None = None
    user: str | None = None
    safety_identifier: str | None = None
    seed: int | None = None
    guidance: float | None = None
    temperature: float | None = None
    candidates: int | None = None
    sampler: Literal["flow", "student"] | None = None
    """The student is there where the model's folder holds one."""
    timeout: float | None = None


@dataclass(frozen=True)
class EditBody:
    """The fields of `POST /v1/images/edits`: with a source prompt an edit, else the filling of a hole."""

    prompt: str
    model: str | None = None
    n: int | None = None
    size: Literal["auto"] | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = None
    partial_images: int | None = None
    user: str | None = None
    safety_identifier: str | None = None
    seed: int | None = None
    guidance: float | None = None
    source_prompt: str | None = None
    strength: float | None = None
    """Of an edit."""
    method: Method | None = None
    """Of filling a hole, as are the next three."""
    temperature: float | None = None
    candidates: int | None = None
    steps: int | None = None
    invert_mask: bool = False
    timeout: float | None = None


@dataclass(frozen=True)
class LikelihoodBody:
    """The fields of `POST /v1/likelihood`; `prompt` may be given several times."""

    prompt: tuple[str, ...] = ("",)
    model: str | None = None
    seed: int = 0
    draws: int = 1
    map: bool = False
    user: str | None = None
    safety_identifier: str | None = None
    timeout: float | None = None


def read_json(cls: type[T], data: bytes) -> T:
    """A body of JSON.

    Raises:
        BodyError: no JSON, no object, or a field that is unknown, missing or of another type.

    >>> read_json(GenerationBody, b'{"prompt": "a red apple", "n": 2}').n
    2
    >>> read_json(GenerationBody, b'{"prompt": "a red apple", "sed": 2}')
    Traceback (most recent call last):
    starflow.serve.schemas.BodyError: unknown key 'sed': did you mean 'seed'?
    """
    try:
        values = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BodyError(f"the body is no JSON ({error}): send an object") from None
    if not isinstance(values, dict):
        raise BodyError(f"the body is a {type(values).__name__}, expected an object of fields")
    return _build(cls, values)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_form(cls: type[T], fields: Sequence[tuple[str, str]]) -> T:
    """The fields of a form, whose values are texts; a field that is a tuple may come several times.

    Raises:
        BodyError: a field that is unknown, missing, given twice, or of another type.

    >>> read_form(LikelihoodBody, [("prompt", "a cat"), ("prompt", "a car"), ("draws", "4")]).draws
    4
    """
    hints, values = typing.get_type_hints(cls), dict[str, Any]()
    for name, text in fields:
        kind = hints.get(name.removesuffix("[]"))
        if kind is not None and typing.get_origin(kind) is tuple:
            values[name.removesuffix("[]")] = [*values.get(name.removesuffix("[]"), []), text]
        elif name in values:
            raise BodyError(f"'{name}' is given twice, expected once", name)
        else:
            values[name] = text if kind is None else _typed(kind, text)
    return _build(cls, values)


def _typed(kind: Any, text: str) -> Any:
    """A text as the number or truth value that a field wants, or as it is where it is none."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if bool in options and text in ("true", "false"):
        return text == "true"
    if int in options and re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        return int(text)
    if float in options and re.fullmatch(r"[+-]?[0-9.]{1,40}([eE][+-]?[0-9]{1,3})?", text):
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    try:
        return from_dict(cls, values)
    except (UserError, OverflowError) as error:
        named = re.search(r"'([^']{1,64})'", str(error))
        raise BodyError(str(error), named[1] if named else None) from None


def _check(name: str, value: float | None, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:  # NaN is refused too, and no whole number is too large
        raise BodyError(f"'{name}' is {value}, expected {least:g} to {most:g}", name)


def _check_text(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise BodyError(f"'{name}' has {len(text)} characters, expected at most {most}", name)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BodyError(f"'{name}' is no text of Unicode: it holds half a surrogate pair", name) from None


def check_common(body: GenerationBody | EditBody | LikelihoodBody, limits: Limits, model: str) -> None:
    """Check what all bodies have.

    Raises:
        BodyError: another model, a seed that no generator takes, or texts and times over the limits.
    """
    if body.model not in (None, model):
        raise BodyError(f"the model '{body.model}' is not served here, which is '{model}'", "model", 404)
    for prompt in (body.prompt,) if isinstance(body.prompt, str) else body.prompt:
        _check_text("prompt", prompt, limits.prompt)
    for name in ("user", "safety_identifier"):
        _check_text(name, getattr(body, name) or "", 256)
    if body.seed is not None and not 0 <= body.seed <= LARGEST_SEED - max(limits.pictures, limits.draws):
        raise BodyError(f"'seed' is {body.seed}, expected 0 to {LARGEST_SEED - limits.pictures}", "seed")
    _check("timeout", body.timeout, 0.001, limits.timeout)


def draw_request(body: GenerationBody, limits: Limits) -> DrawRequest:
    """What a body asks to draw, with a seed by chance where it has none.

    Raises:
        BodyError: a value outside the limits.
    """
    count = 1 if body.n is None else body.n
    _check("n", count, 1, limits.pictures)
    _check("guidance", body.guidance, 0, limits.guidance)
    _check("temperature", body.temperature, 1e-3, limits.temperature)
    _check("candidates", body.candidates, 1, limits.candidates)
    check_partial_images(body)
    return DrawRequest(
        body.prompt,
        count,
        secrets.randbelow(2**31) if body.seed is None else body.seed,
        body.guidance,
        body.temperature,
        body.candidates,
        parse_size(body.size, limits),
        body.partial_images or 0,
        sampler=body.sampler or "flow",
    )


def check_partial_images(body: GenerationBody | EditBody) -> None:
    """Raises BodyError: too many, or not in a stream."""
    _check("partial_images", body.partial_images, 0, 3)
    if body.partial_images and not body.stream:
        raise BodyError("'partial_images' is given without 'stream': set it to true", "partial_images")


def parse_size(text: str | None, limits: Limits) -> tuple[int, int] | None:
    """(width, height) of "64x48"; None of "auto".

    Raises:
        BodyError: another form, or more pixels than the limit.
    """
    if text in (None, "auto"):
        return None
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text or "")
    if not found:
        raise BodyError(f"'size' is {text!r}, expected 'auto' or WIDTHxHEIGHT in pixels, e.g. '64x64'", "size")
    width, height = int(found[1]), int(found[2])
    if not 0 < width * height <= limits.drawn_pixels:
        raise BodyError(f"'size' is {text}, expected at most {limits.drawn_pixels} pixels in all", "size")
    return width, height


def check_drawn_size(size: tuple[int, int] | None, own: tuple[int, int]) -> None:
    """Refuse pictures of far more pixels than those that the model was trained on: one would take hours, for nothing.

    Raises:
        BodyError: over `LARGEST_GROWTH` times as many as the model's `own` size has.
    """
    if size is not None and size[0] * size[1] > LARGEST_GROWTH * own[0] * own[1]:
        text = f"'size' is {size[0]}x{size[1]}, expected at most {LARGEST_GROWTH} times the pixels of {own[0]}x{own[1]}"
        raise BodyError(text, "size")


def check_edit(body: EditBody, limits: Limits) -> None:
    """Check what an edit asks for, and that each of its options has an effect.

    Raises:
        BodyError: a value outside the limits, or one that does not go with what is asked for.
    """
    _check("n", body.n, 1, limits.pictures)
    _check("guidance", body.guidance, 0, limits.guidance)
    _check("strength", body.strength, 0, 1)
    _check("temperature", body.temperature, 1e-3, limits.temperature)
    _check("candidates", body.candidates, 1, limits.candidates)
    _check("steps", body.steps, 0, limits.steps)
    check_partial_images(body)
    if body.source_prompt is not None:
        _check_text("source_prompt", body.source_prompt, limits.prompt)
        for name in ("method", "temperature", "candidates", "steps"):
            if getattr(body, name) is not None:
                raise BodyError(f"'{name}' is for filling a hole, not for an edit with a 'source_prompt'", name)
    elif body.strength is not None:
        raise BodyError("'strength' is for an edit: give the 'source_prompt', what the picture shows", "strength")


def check_likelihood(body: LikelihoodBody, limits: Limits) -> None:
    """Raises BodyError: prompts or draws over the limits."""
    _check("draws", body.draws, 1, limits.draws)
    if len(body.prompt) > limits.prompts:
        raise BodyError(f"there are {len(body.prompt)} prompts, expected at most {limits.prompts}", "prompt")


def read_picture(data: bytes, name: str, limits: Limits) -> Image:
    """An uploaded picture, decoded only after its size is known.

    Raises:
        BodyError: no picture of a known format, a broken one, or one of too many pixels.
    """
    from pathlib import Path

    from PIL import Image

    try:
        with image_errors(Path(name)), Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
        if width * height > limits.pixels:
            raise BodyError(f"'{name}' is {width}x{height}, expected at most {limits.pixels} pixels in all", name)
        return decode_image(data, name)
    except BodyError:
        raise
    except UserError as error:
        raise BodyError(f"{error} (known are {', '.join(FORMATS)})", name) from None


def edit_request(body: EditBody, files: Mapping[str, bytes], limits: Limits) -> EditRequest:
    """What a form asks to change.

    Raises:
        BodyError: no picture, or one that cannot be read.
    """
    if "image" not in files:
        raise BodyError("the file 'image' is missing: add it", "image")
    default = InpaintSettings()
    settings = InpaintSettings(
        body.method or default.method,
        candidates=default.candidates if body.candidates is None else body.candidates,
        steps=default.steps if body.steps is None else body.steps,
    )
    image, count = read_picture(files["image"], "image", limits), 1 if body.n is None else body.n
    if count * image.width * image.height > limits.pixels:
        size = f"{image.width}x{image.height}"
        raise BodyError(f"'n' is {count}, but {count} times {size} are over {limits.pixels} pixels: ask for fewer", "n")
    return EditRequest(
        image,
        body.prompt,
        read_picture(files["mask"], "mask", limits) if "mask" in files else None,
        body.source_prompt,
        count,
        secrets.randbelow(2**31) if body.seed is None else body.seed,
        body.guidance,
        body.strength or 0.0,
        body.invert_mask,
        body.temperature,
        settings,
        body.partial_images or 0,
    )


@dataclass(frozen=True)
class Failure:
    """An answer that says why there is none."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    def body(self, request_id: str) -> dict[str, Any]:
        """OpenAI's shape, with the request's id."""
        line = " ".join(self.message.split())
        shown = line if len(line) <= LONGEST_MESSAGE else line[: LONGEST_MESSAGE - 3] + "..."
        error = {"message": shown, "type": self.kind, "param": self.param, "code": self.code, "request_id": request_id}
        return {"error": error}


def failure_of(error: BaseException) -> Failure | None:
    """The answer to an expected error; None for a fault of ours."""
    if isinstance(error, BodyError):
        code = "model_not_found" if error.param == "model" and error.status == 404 else "invalid_value"
        return Failure(error.status, str(error), "invalid_request_error", error.param, code)
    if isinstance(error, NotFiniteError):
        return Failure(422, str(error), "invalid_request_error", None, "not_finite")
    if isinstance(error, UserError):
        return Failure(400, str(error), "invalid_request_error", None, "invalid_value")
    if isinstance(error, QueueFullError):
        return Failure(429, str(error), "rate_limit_error", None, "queue_full", error.retry_after)
    if isinstance(error, ClosingError):
        return Failure(503, str(error), "server_error", None, "shutting_down", error.retry_after)
    if isinstance(error, DeadlineError):
        return Failure(504, str(error), "server_error", None, "timeout")
    return None
