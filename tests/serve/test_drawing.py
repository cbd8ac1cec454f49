"""A picture of a crowded batch is the one that a pipeline draws alone."""

from __future__ import annotations

import dataclasses
import math

import numpy
import pytest
import torch

from starflow import StarFlowPipeline, TarFlow
from starflow.conditioning import ClassLabels
from starflow.errors import UserError
from starflow.flow.config import TarFlowConfig
from starflow.flow.finite import NotFiniteError
from starflow.latents import PixelLatents
from starflow.pipeline.config import PipelineConfig
from starflow.serve.drawing import BlockSampler, likelihood_call
from starflow.serve.queue import Drawn, DrawRequest
from starflow.serve.scheduler import Scheduler
from tests.registry import randomised

CROWD = [
    DrawRequest("a red apple", seed=3, guidance=1.0, temperature=0.5, candidates=1),
    DrawRequest("a blue car", seed=3, guidance=3.0, temperature=1.0, candidates=3),
    DrawRequest("", seed=11, guidance=0.5, temperature=0.7, candidates=1),
    DrawRequest("a yellow cat", num_images=3, seed=0, guidance=2.0, temperature=0.5, candidates=2),
    DrawRequest("a green tree", seed=2**62, guidance=0.0, candidates=1),
    DrawRequest("a red apple", seed=5, guidance=0.0, candidates=2),
]


def alone(pipe: StarFlowPipeline, request: DrawRequest, index: int) -> tuple[torch.Tensor, numpy.ndarray]:
    made = pipe(
        request.prompt,
        seed=request.seed + index,
        guidance=request.guidance,
        temperature=request.temperature,
        candidates=request.candidates,
        size=request.size,
    )
    return made.latents, numpy.asarray(made.images[0]).astype(int)


def check(pipe: StarFlowPipeline, request: DrawRequest, drawn: list[Drawn]) -> None:
    for index, one in enumerate(drawn):
        latents, picture = alone(pipe, request, index)
        assert torch.equal(one.latents, latents), (request, index)
        assert abs(numpy.asarray(one.image).astype(int) - picture).max() <= 1
        assert one.seed == request.seed + index


def test_every_picture_is_what_it_is_alone(box: StarFlowPipeline, box_sampler: BlockSampler) -> None:
    """Prompts, seeds, weights, temperatures and candidates differ; some come while the others are on their way."""
    scheduler = Scheduler(box_sampler)
    tickets = [scheduler.draw(request) for request in CROWD[:3]]
    scheduler.turn()
    tickets += [scheduler.draw(request) for request in CROWD[3:]]
    while scheduler.turn():
        pass
    for request, ticket in zip(CROWD, tickets, strict=True):
        check(box, request, ticket.future.result(timeout=0))


def test_so_is_every_picture_of_one_call(box: StarFlowPipeline, box_sampler: BlockSampler) -> None:
    """Of prompts of several lengths; `box_sampler` has built the compiled loop."""
    prompts = ["a red apple", "a blue car on a table", "a cat", "a green tree", "", "a yellow dog"]
    together = box(prompts, seed=4, candidates=1)
    for index, prompt in enumerate(prompts):
        latents, picture = alone(box, DrawRequest(prompt, seed=4, candidates=1), index)
        assert torch.equal(together.latents[index : index + 1], latents), prompt
        assert abs(numpy.asarray(together.images[index]).astype(int) - picture).max() <= 1


def tiny() -> StarFlowPipeline:
    config = TarFlowConfig(3, 8, 4, 64, num_blocks=2, layers_per_block=1, num_classes=2)
    flow = randomised(config, 0)
    assert isinstance(flow, TarFlow)
    labels, pixels = ClassLabels(("circle", "star")), PixelLatents()
    about = PipelineConfig("tiny", 8, 0.1, pixels.spec, labels.spec, guidance=1.0, cleaning="tweedie")
    return StarFlowPipeline(flow, pixels, labels, about)


def test_labels_and_tweedie_steps_work_as_well() -> None:
    """The last class and none in one batch, in a model whose pictures are cleaned by a step that has a gradient."""
    pipe = tiny()
    sampler = BlockSampler(pipe)
    sampler.warm_up()
    scheduler = Scheduler(sampler)
    requests = [DrawRequest("star", num_images=3, seed=4), DrawRequest("circle", guidance=0.5, candidates=4)]
    tickets = [scheduler.draw(request) for request in requests]
    while scheduler.turn():
        pass
    for request, ticket in zip(requests, tickets, strict=True):
        check(pipe, request, ticket.future.result(timeout=0))


def test_candidates_come_likeliest_first_each_with_its_log_p(box: StarFlowPipeline, box_sampler: BlockSampler) -> None:
    scheduler = Scheduler(box_sampler)
    ticket = scheduler.draw(DrawRequest("a red apple", candidates=4, keep_candidates=True))
    while scheduler.turn():
        pass
    (drawn,) = ticket.future.result(timeout=0)
    nats = [value for _, value in drawn.candidates]
    assert len(nats) == 4
    assert nats == sorted(nats, reverse=True)
    assert drawn.log_prob == nats[0]
    condition, _ = box._condition(["a red apple"])
    assert float(box.flow.log_prob(drawn.latents, condition)) == pytest.approx(nats[0], abs=0.05)
    assert torch.equal(drawn.latents, alone(box, DrawRequest("a red apple", candidates=4), 0)[0])


def test_previews_come_nearer_to_the_picture(box_sampler: BlockSampler) -> None:
    scheduler, shown = Scheduler(box_sampler), []
    ticket = scheduler.draw(
        DrawRequest("a red apple", candidates=1, previews=9), listener=lambda event: shown.append(event.preview)
    )
    while scheduler.turn():
        pass
    last = numpy.asarray(ticket.future.result()[0].image).astype(int)
    errors = [abs(numpy.asarray(one).astype(int) - last).mean() for one in shown if one is not None]
    assert len(errors) == box_sampler.blocks - 1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 20


def test_what_is_not_finite_is_named_and_the_others_are_drawn(
    box: StarFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poisoned condition, as a broken text encoder would give."""
    sampler = BlockSampler(box)
    encode = sampler._encode

    def poisoned(prompt: str, shape: tuple[int, int, int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        condition, null = encode(prompt, shape)
        assert condition is not None
        return (torch.full_like(condition, math.nan), null) if prompt == "poison" else (condition, null)

    monkeypatch.setattr(sampler, "_encode", poisoned)
    scheduler = Scheduler(sampler)
    good = DrawRequest("a red apple", seed=1, guidance=2.0, candidates=2)
    tickets = [scheduler.draw(good), scheduler.draw(dataclasses.replace(good, prompt="poison")), scheduler.draw(good)]
    while scheduler.turn():
        pass
    with pytest.raises(NotFiniteError, match="not finite"):
        tickets[1].future.result(timeout=0)
    for one in (tickets[0], tickets[2]):
        check(box, good, one.future.result(timeout=0))


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (DrawRequest(size=(65, 64)), "multiples of 8"),
        (DrawRequest(guidance=math.nan), "guidance"),
        (DrawRequest(guidance=-1), "guidance"),
        (DrawRequest(temperature=0), "temperature"),
        (DrawRequest(candidates=0), "candidates"),
        (DrawRequest(seed=-1), "seed"),
        (DrawRequest(seed=2**63 - 1, num_images=2), "seed"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_it_is_queued(
    box_sampler: BlockSampler, request_: DrawRequest, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        Scheduler(box_sampler).draw(request_)


def test_memory_limits_the_rows_of_a_batch(box: StarFlowPipeline) -> None:
    shape = (24, 8, 8)
    assert BlockSampler(box, max_rows=16, memory=2**40).capacity((shape, True)) == 16
    some = BlockSampler(box, max_rows=16, memory=30 * 2**20).capacity((shape, True))
    assert 0 < some < 16
    with pytest.raises(UserError, match="memory"):
        BlockSampler(box, memory=1).begin(DrawRequest(), 0)


def test_more_candidates_than_rows_of_a_batch_are_the_same(box: StarFlowPipeline) -> None:
    request = DrawRequest("a red apple", guidance=1.0, candidates=5)
    scheduler = Scheduler(BlockSampler(box, max_rows=2))
    ticket = scheduler.draw(request)
    while scheduler.turn():
        pass
    check(box, request, ticket.future.result(timeout=0))


def test_a_likelihood_lends_the_model_after_every_draw(box: StarFlowPipeline) -> None:
    seen = box("a red apple", candidates=1).images[0]
    told: list[tuple[int, int]] = []
    call = likelihood_call(box, seen, ["a red apple", "a car"], 5, 3, heat=True)
    found = call(lambda done, total: told.append((done, total)))
    assert len(told) == 12
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (12, 12)
    for one, prompt in zip(found, ("a red apple", "a car"), strict=True):
        assert one.found == box.log_prob(seen, prompt, seed=5, draws=3)
