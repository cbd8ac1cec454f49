"""Bodies are read strictly, from JSON and from forms alike."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from starflow.config import to_dict
from starflow.errors import UserError
from starflow.flow.finite import NotFiniteError
from starflow.serve.queue import ClosingError, DeadlineError, QueueFullError
from starflow.serve.schemas import (
    LONGEST_MESSAGE,
    BodyError,
    EditBody,
    Failure,
    GenerationBody,
    LikelihoodBody,
    Limits,
    check_common,
    check_edit,
    draw_request,
    edit_request,
    failure_of,
    read_form,
    read_json,
    read_picture,
)

LIMITS = Limits()
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    st.builds(
        EditBody,
        prompt=TEXTS,
        n=st.none() | st.integers(-5, 2**62),
        seed=st.none() | st.integers(0, 2**63 - 1),
        guidance=st.none() | st.floats(allow_nan=False, allow_infinity=False, min_value=-1e100, max_value=1e100),
        source_prompt=st.none() | TEXTS,
        method=st.none() | st.sampled_from(["auto", "hmc"]),
        invert_mask=st.booleans(),
    )
)
def test_a_form_says_what_json_says(body: EditBody) -> None:
    values = {name: value for name, value in to_dict(body).items() if value is not None}
    texts = [(name, str(value).lower() if isinstance(value, bool) else str(value)) for name, value in values.items()]
    assert read_json(EditBody, json.dumps(values).encode()) == body
    assert read_form(EditBody, texts) == body


def test_a_form_may_have_several_prompts_with_or_without_brackets() -> None:
    for name in ("prompt", "prompt[]"):
        assert read_form(LikelihoodBody, [(name, "a"), (name, "b")]).prompt == ("a", "b")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b"null", b"NaN", b'{"prompt": NaN}', b"[" * 100_000, b"\xff\xfe", b"9" * 5000]
)
def test_what_is_no_object_of_json_is_refused(data: bytes) -> None:
    with pytest.raises(BodyError):
        read_json(GenerationBody, data)


@pytest.mark.parametrize("digits", [1, 400, 4000])
@pytest.mark.parametrize("name", ["n", "seed", "guidance", "temperature", "candidates", "partial_images", "timeout"])
def test_whole_numbers_of_any_length_are_refused(name: str, digits: int) -> None:
    """Some are too large to be floats."""
    data = b'{"prompt": "a", "%s": -%s}' % (name.encode(), b"7" * digits)
    for text in (data, data.replace(b"-", b"") if digits > 1 else data):
        with pytest.raises(BodyError):
            body = read_json(GenerationBody, text)
            check_common(body, LIMITS, "glyphs")
            draw_request(body, LIMITS)


@pytest.mark.parametrize("text", ["", "1", "x64", "64x", "64X64 ", "0x64", "-1x64", "٦٤x٦٤", "99999x99999"])
def test_sizes_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(BodyError) as found:
        draw_request(GenerationBody("a", size=text), LIMITS)
    assert found.value.param == "size"


def test_what_is_not_given_is_the_model_s_choice_and_the_seed_is_chance() -> None:
    first, second = (draw_request(GenerationBody("a"), LIMITS) for _ in range(2))
    assert (first.guidance, first.temperature, first.candidates, first.size, first.num_images) == (None,) * 4 + (1,)
    assert first.seed != second.seed


@pytest.mark.parametrize(
    "body",
    [
        EditBody("a", strength=0.5),
        EditBody("a", source_prompt="b", method="hmc"),
        EditBody("a", source_prompt="b", candidates=2),
        EditBody("a", source_prompt="b", strength=1.5),
        EditBody("a", source_prompt="b" * 3000),
        EditBody("a", steps=-1),
        EditBody("a", n=0),
    ],
)
def test_options_that_would_have_no_effect_or_sense_are_refused(body: EditBody) -> None:
    with pytest.raises(BodyError):
        check_edit(body, LIMITS)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_than_the_three_are_refused(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    with pytest.raises(BodyError, match="PNG, JPEG, WEBP"):
        read_picture(buffer.getvalue(), "image", LIMITS)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BodyError("x", "n"), 400, "invalid_value"),
        (BodyError("x", "model", 404), 404, "model_not_found"),
        (UserError("x"), 400, "invalid_value"),
        (NotFiniteError("x"), 422, "not_finite"),
        (QueueFullError("x", 3), 429, "queue_full"),
        (ClosingError("x", 3), 503, "shutting_down"),
        (DeadlineError("x"), 504, "timeout"),
    ],
)
def test_every_expected_error_has_its_answer(error: Exception, status: int, code: str) -> None:
    failure = failure_of(error)
    assert failure is not None
    assert (failure.status, failure.code) == (status, code)
    assert failure.retry_after == getattr(error, "retry_after", None)


def test_a_fault_of_ours_has_none() -> None:
    assert failure_of(RuntimeError("secret")) is None


def test_a_message_is_one_line_of_bounded_length() -> None:
    found: Any = Failure(400, "a\nb " + "x" * 9999, "invalid_request_error").body("id")["error"]
    assert found["message"].startswith("a b ")
    assert len(found["message"]) == LONGEST_MESSAGE
    assert set(found) == {"message", "type", "param", "code", "request_id"}


def test_a_filling_without_guidance_or_temperature_is_drawn_as_the_model_draws() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    asked = edit_request(EditBody(prompt="a cat"), {"image": buffer.getvalue()}, Limits())
    assert (asked.guidance, asked.temperature) == (None, None)
    given = edit_request(
        EditBody(prompt="a cat", guidance=0.0, temperature=1.0), {"image": buffer.getvalue()}, Limits()
    )
    assert (given.guidance, given.temperature) == (0.0, 1.0)
