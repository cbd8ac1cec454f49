"""A student learns its flow's states; what is guided is as the formula says; and its run is as any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starflow.cli.main import main
from starflow.data.images import from_pil, save_grid
from starflow.errors import UserError
from starflow.flow.config import TarFlowConfig
from starflow.flow.model import TarFlow
from starflow.flow.tokens import patchify
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.sampler import sample
from starflow.sampling.student import Student, StudentConfig, StudentOutput, group_sizes, inputs_of
from starflow.train.distributed import World
from starflow.train.loop import fit
from starflow.train.run import read_log
from starflow.train.settings import TrainSettings
from starflow.train.tasks.student import StudentBatch, StudentLoss, StudentObjective, StudentTask
from tests.train.distributed.launch import finish, torchrun
from tests.train.distributed.scenario import numbers
from tests.train.tasks.companions import (
    SETTINGS,
    make_cache,
    make_linear,
    make_teacher,
    random_weights,
    save_shapes_teacher,
)

WITH_CRITIC = StudentLoss(perceptual=1.0, adversarial=1.0, adversarial_from=0, guidance=2.0)
PLAIN = StudentLoss(perceptual=0.0, adversarial=0.0, guidance=2.0)


def draw_nothing(student: Student, path: Path) -> None:
    pass


def make_task(
    loss: StudentLoss = PLAIN, settings: TrainSettings = SETTINGS, teacher: StarFlowPipeline | None = None
) -> StudentTask:
    teacher = teacher or make_teacher(random_weights)
    torch.manual_seed(0)
    sizes, side = inputs_of(teacher.flow), teacher.flow.config.img_size
    student = Student(StudentConfig(**sizes, channels=32, layers=group_sizes(1, 2), head_dim=16, largest_guidance=2.0))
    return StudentTask(teacher, student, make_cache(side), loss, settings, draw_nothing, World())


def objective_of(task: StudentTask) -> StudentObjective:
    assert isinstance(task.model, StudentObjective)
    return task.model


def test_the_states_are_those_of_the_flows_own_blocks() -> None:
    task = make_task()
    batch, flow = task.batch(3, range(8)), task.teacher.flow
    rotary = flow.rotary((4, 4))
    tokens = batch.states[0]
    for number, block in enumerate(flow.iter_blocks()):
        assert torch.allclose(tokens, batch.states[number], atol=1e-5)
        tokens, _ = block(batch.states[number], batch.condition, flow.block_rotary(block, rotary))
    assert torch.allclose(tokens, patchify(batch.z, 1), atol=1e-5)
    noise = batch.states[0] - patchify(batch.clean, 1)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.1)
    indices = task._indices(3, range(8))
    assert torch.equal(batch.clean, task.cache.posterior(indices)[0])


def test_the_draws_of_a_row_do_not_depend_on_the_others() -> None:
    task = make_task()
    whole, part = task.batch(2, range(8)), task.batch(2, range(4, 8))
    assert torch.equal(whole.guidance_B[4:], part.guidance_B)
    assert torch.allclose(whole.z[4:], part.z, atol=1e-5)
    assert float(whole.guidance_B.max()) <= 2.0
    assert 0 < int((whole.guidance_B > 0).sum()) < 8


def test_at_weight_zero_the_loss_is_the_plain_one() -> None:
    guided, plain = (make_task(replace(PLAIN, power=0.0, guidance=weight)) for weight in (2.0, 0.0))
    for parameter in guided.model.parameters():
        nn.init.normal_(parameter, std=0.5)
    plain.model.load_state_dict(guided.model.state_dict())
    batch = guided.batch(0, range(8))
    zero = batch._replace(guidance_B=0 * batch.guidance_B)
    one, other = guided.loss(guided.model, zero)[0], plain.loss(plain.model, zero)[0]
    assert float(one.detach()) == pytest.approx(float(other.detach()), rel=1e-5)
    assert float(guided.loss(guided.model, batch)[0].detach()) != pytest.approx(float(other.detach()), rel=1e-4)


class Fixed(nn.Module):
    """A network that answers with numbers of its own, whatever it is asked."""

    def __init__(self, batch: StudentBatch) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        wanted = [batch.clean, *batch.states]
        self.own = nn.ParameterList(one + torch.randn(one.shape, generator=draw) for one in wanted)

    def forward(self, z: Tensor, condition: Tensor | None, guidance_B: Tensor | None = None) -> StudentOutput:
        return StudentOutput(self.own[0], list(self.own)[1:])


def test_the_loss_and_its_gradient_are_those_of_the_formula() -> None:
    task = make_task(replace(PLAIN, power=0.7, floor=0.2, alignment=0.3, guidance=0.0))
    some = task.train[0][:64]
    traced = task._traced(some, 0, 0, range(len(some)), task._conditions(some, None))
    squares = [float(one.square().mean()) for one in (traced[0], *traced[2])]
    batch = task.batch(0, range(8))
    fixed = Fixed(batch)
    objective_of(task).student = fixed  # type: ignore[assignment]
    found, terms = task.loss(task.model, batch)
    found.backward()
    expected = 0.0
    for number, (own, wanted) in enumerate(zip(fixed.own, [batch.clean, *batch.states], strict=True)):
        weight, size = 1.0 if number == 0 else 0.3, own[0].numel()
        each = (own.detach() - wanted).square().flatten(1).mean(1) / squares[number]
        expected += float((weight * each * (each + 0.2) ** -0.7).mean())
        factor = (weight * (each + 0.2) ** -0.7 / len(own)).view(-1, *[1] * (own.ndim - 1))
        slope = factor * 2 * (own.detach() - wanted) / size / squares[number]
        assert own.grad is not None
        assert torch.allclose(own.grad, slope, rtol=1e-3, atol=1e-8)
        name = "clean" if number == 0 else f"state_{number - 1}"
        assert float(terms[name]) == pytest.approx(float(each.mean()), rel=1e-4)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


class Squares:
    """A distance of pictures whose features are the pictures themselves."""

    def features(self, images: Tensor) -> list[Tensor]:
        return [images]

    def between(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        return (ours[0] - theirs[0]).square().mean()


def test_some_pictures_of_a_batch_are_compared_decoded() -> None:
    weights = replace(PLAIN, perceptual=0.25, decode_every=4, guidance=0.0)
    task, distance = make_task(replace(weights, perceptual=0.0)), Squares()

    def decode(latents: Tensor) -> Tensor:
        return 3 * latents[:, :3]

    def loss_of(answer: Fixed, batch: StudentBatch, weights: StudentLoss) -> tuple[Tensor, dict[str, Tensor]]:
        scales = objective_of(task)._scales
        objective: Any = StudentObjective(answer, weights, scales, decode, distance)  # type: ignore[arg-type]
        found: tuple[Tensor, dict[str, Tensor]] = objective(batch)
        return found

    batch = task.batch(0, range(8))
    assert batch.decoded == [0, 4]
    fixed = Fixed(batch)
    loss, terms = loss_of(fixed, batch, weights)
    wanted = 9 * (fixed.own[0] - batch.clean)[[0, 4], :3].square().mean()
    assert float(terms["perceptual"]) == pytest.approx(float(wanted.detach()), rel=1e-4)
    without = loss_of(fixed, batch, replace(weights, perceptual=0.0))[0]
    assert float((loss - without).detach()) == pytest.approx(0.25 * float(wanted.detach()), rel=1e-3)
    # Micro-batches of two, half of which have no picture to decode: their mean is the whole batch's loss.
    parts = []
    for start in range(0, 8, 2):
        part = task.batch(0, range(start, start + 2))
        answer = Fixed(part)
        for own, whole in zip(answer.own, fixed.own, strict=True):
            own.data = whole.data[start : start + 2]
        parts.append(float(loss_of(answer, part, weights)[0].detach()))
    assert sum(parts) / 4 == pytest.approx(float(loss.detach()), rel=1e-3)


def test_what_is_dropped_is_not_guided_and_weights_are_spread() -> None:
    task = make_task(replace(PLAIN, drop_condition=0.5, guided=1.0))
    weights, dropped = task.batch(0, range(8)).guidance_B, task._dropped(0, range(8))
    assert 0 < int(dropped.sum()) < 8
    assert torch.equal(weights == 0, dropped)
    assert len(set(weights[~dropped].tolist())) == int((~dropped).sum())


def test_the_null_branch_of_classes_is_no_class() -> None:
    teacher = make_teacher(random_weights)
    flow = TarFlow(TarFlowConfig(4, 4, 1, 64, num_blocks=2, layers_per_block=1, num_classes=3)).requires_grad_(False)
    task = make_task(teacher=StarFlowPipeline(flow, teacher.autoencoder, teacher.conditioner, teacher.config))
    null = task.batch(0, range(8)).null
    assert null is not None
    assert null.tolist() == [-1] * 8


def test_no_gradient_goes_through_the_null_branch() -> None:
    task = make_task()
    student, asked = objective_of(task).student, []
    forward = student.forward

    def note(*arguments: Any) -> StudentOutput:
        asked.append(torch.is_grad_enabled())
        return forward(*arguments)

    student.forward = note  # type: ignore[assignment,method-assign]
    task.loss(task.model, task.batch(0, range(8)))
    assert asked == [True, False]


def test_an_evaluation_is_the_mean_over_held_out_latents() -> None:
    task = make_task(replace(PLAIN, guidance=0.0))
    rows, objective = task.heldout[0], objective_of(task)
    condition = task._conditions(rows, None)
    clean, z, states = task._traced(rows, 0, 0, range(len(rows)), condition)
    with torch.no_grad():
        found, out = task.evaluate(objective), objective.student(z, condition)
    pairs = [(out.clean, clean), *zip(out.states, states, strict=True)]
    expected = [float((a - b).square().mean()) / scale for (a, b), scale in zip(pairs, objective._scales, strict=True)]
    assert [found["clean"], found["state_0"], found["state_1"]] == pytest.approx(expected, rel=1e-4)
    assert found["loss"] == found["clean"]


class Extrapolating(nn.Module):
    """What a perfect student gives: (1 + w) x - w u, where u is its own unguided answer without a condition."""

    def __init__(self, batch: StudentBatch, null: Tensor) -> None:
        super().__init__()
        self.batch, self.null = batch, null

    def forward(self, z: Tensor, condition: Tensor | None, guidance_B: Tensor | None = None) -> StudentOutput:
        if guidance_B is None:
            assert condition is not None
            assert torch.equal(condition, self.null.expand_as(condition))
            return StudentOutput(0.5 * z, [0.5 * patchify(z, 1)] * 2)
        w = guidance_B.view(-1, 1, 1)
        unguided = 0.5 * patchify(z, 1)
        states = [(1 + w) * state - w * unguided for state in self.batch.states]
        clean = (1 + w[..., None]) * self.batch.clean - w[..., None] * 0.5 * z
        return StudentOutput(clean, states)


def test_what_is_guided_lies_beyond_the_null_branch_by_the_weight() -> None:
    task = make_task()
    batch = task.batch(0, range(8))
    assert task.cache.null is not None
    objective_of(task).student = Extrapolating(batch, task.cache.null.float())  # type: ignore[assignment]
    loss, terms = task.loss(task.model, batch)
    assert float(loss) == pytest.approx(0.0, abs=1e-8)
    assert all(float(term) < 1e-10 for term in terms.values())


def test_each_picture_term_moves_one_network_alone() -> None:
    task = make_task(WITH_CRITIC, teacher=make_teacher(random_weights, pixels=16))
    batch = task.batch(0, range(8))
    assert batch.decoded == [0, 2, 4, 6]
    objective = objective_of(task)
    assert objective.critic is not None
    student, critic = list(objective.student.parameters()), list(objective.critic.parameters())
    terms = objective.picture_terms(objective.guided(batch).clean, batch)
    for name, moved, kept in (("adversarial", student, critic), ("critic", critic, student)):
        gradients = torch.autograd.grad(terms[name], [*moved, *kept], allow_unused=True, retain_graph=True)
        assert any(one is not None and float(one.abs().sum()) > 0 for one in gradients[: len(moved)])
        assert all(one is None for one in gradients[len(moved) :])


def test_the_picture_terms_are_added_by_their_weights_once_the_critic_has_started() -> None:
    weights = replace(WITH_CRITIC, perceptual=3.0, adversarial=0.7, adversarial_from=2, guidance=0.0)
    task = make_task(weights, teacher=make_teacher(random_weights, pixels=16))
    plain = make_task(replace(PLAIN, guidance=0.0), teacher=task.teacher)
    before, after = task.loss(task.model, task.batch(1, range(8)))[1], task.batch(2, range(8))
    assert "perceptual" in before
    assert "critic" not in before
    objective_of(plain).student.load_state_dict(objective_of(task).student.state_dict())
    loss, terms = task.loss(task.model, after)
    others = plain.loss(plain.model, after)[0].detach()
    expected = others + 3.0 * terms["perceptual"] + 0.7 * terms["adversarial"] + terms["critic"]
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)


def test_the_critic_learns_which_pictures_are_the_students() -> None:
    task = make_task(WITH_CRITIC, teacher=make_teacher(random_weights, pixels=16))
    critic = objective_of(task).critic
    assert critic is not None
    optimiser = torch.optim.AdamW(critic.parameters(), lr=1e-2)
    hinge = []
    for step in range(20):
        terms = task.loss(task.model, task.batch(step, range(8)))
        terms[0].backward()
        optimiser.step()
        optimiser.zero_grad()
        hinge.append(float(terms[1]["critic"]))
    assert hinge[-1] < hinge[0] - 0.3


def test_a_linear_flows_student_reaches_its_exact_inverse(tmp_path: Path) -> None:
    teacher = make_teacher(lambda parameter: None)
    make_linear(teacher)
    settings = replace(
        SETTINGS, steps=150, batch=8, lr=1e-2, warmup=10, average=0.9, evaluate_every=150, checkpoint_every=150
    )
    task = make_task(replace(PLAIN, guidance=0.0, power=0.5), settings, teacher)
    fit(task, settings, tmp_path, show_progress=False)
    student = Student.from_pretrained(tmp_path / "model")
    z = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    condition = teacher.conditioner.encode(["a"] * 16) if teacher.conditioner else None
    exact = sample(teacher.flow, z, condition)
    drawn = teacher.flow.from_tokens(student(z, condition).states[0], (4, 4))
    assert float((drawn - exact).norm() / exact.norm()) < 0.03
    assert float((z - exact).norm() / exact.norm()) > 0.3


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    fit(make_task(), SETTINGS, tmp_path / "whole", show_progress=False)
    short = replace(SETTINGS, steps=5, schedule="trapezoid", decay=0.0)
    long = replace(short, steps=8)
    for settings in (short, long):
        fit(make_task(settings=settings), settings, tmp_path / "parts", show_progress=False)
    fit(make_task(settings=long), long, tmp_path / "long", show_progress=False)
    parts, whole = (
        [line["loss"] for line in read_log(tmp_path / name / "log.jsonl") if "loss" in line]
        for name in ("parts", "long")
    )
    assert parts == whole
    assert len(whole) == 8


RECIPE = """
name: small-student
teacher: {teacher}
data: {{source: shapes, shapes: 60, views: {{size: 8}}}}
network: {{channels: 32, layers: 1, head_dim: 16}}
loss: {{perceptual: {pictures}, adversarial: {pictures}, guidance: 2.0}}
train:
  precision: float32
  steps: 4
  batch: 8
  lr: 1.0e-2
  warmup: 1
  evaluate_every: 2
  sample_every: 4
  checkpoint_every: 2
temperature: 0.8
guidance: 0.5
prompts: [circle, star]
"""


def write_recipe(folder: Path, pictures: float) -> Path:
    teacher = save_shapes_teacher(folder / "teacher")
    path = folder / "student.yaml"
    path.write_text(RECIPE.format(teacher=teacher, pictures=pictures))
    return path


def test_the_command_trains_a_student_that_the_pipeline_draws_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = write_recipe(tmp_path, pictures=0.0), tmp_path / "run"
    assert main(["train-student", str(recipe), "--output", str(run)]) == 0
    pipe = StarFlowPipeline.from_pretrained(run / "pipeline")
    assert pipe.student is not None
    assert pipe.student.config.temperature == 0.8
    assert pipe.student.config.largest_guidance == 2.0
    rows = [pipe(["circle", "star"], sampler="student", guidance=weight).images for weight in (0.0, 0.5)]
    save_grid(torch.cat([from_pil(image) for row in rows for image in row]), tmp_path / "grid.png", columns=2)
    assert (run / "samples" / "step_00000004.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    made = pipe("star", num_images=2, seed=3, sampler="student")
    z = 0.8 * torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    condition = pipe.conditioner.encode(["star"] * 2) if pipe.conditioner else None
    assert torch.allclose(made.latents, pipe.student(z, condition, torch.full((2,), 0.5)).clean, atol=1e-5)
    assert main(["train-student", str(recipe), "--output", str(run), "--network.channels", "64"]) == 2
    assert "was started with another network.channels" in capsys.readouterr().err


def test_a_cache_of_other_latents_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, pictures=0.0)
    assert main(["train-student", str(recipe), "--output", str(tmp_path / "run")]) == 0
    again = ["train-student", str(recipe), "--latents", str(tmp_path / "run" / "latents")]
    assert main([*again, "--output", str(tmp_path / "again")]) == 0
    assert numbers(tmp_path / "run") == numbers(tmp_path / "again")
    assert not (tmp_path / "again" / "latents").exists()
    capsys.readouterr()
    make_teacher(random_weights, ("x",)).save_pretrained(tmp_path / "teacher")
    assert main([*again, "--output", str(tmp_path / "other")]) == 2
    assert "name a cache that it was trained on" in capsys.readouterr().err


def test_a_student_goes_on_from_the_weights_that_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, pictures=0.0)
    run = ["train-student", str(recipe), "--output"]
    assert main([*run, str(tmp_path / "first")]) == 0
    given = ["--latents", str(tmp_path / "first" / "latents"), "--train.init_from", str(tmp_path / "first" / "model")]
    assert main([*run, str(tmp_path / "second"), *given, "--train.lr", "1e-12"]) == 0
    first, second = (Student.from_pretrained(tmp_path / name / "model") for name in ("first", "second"))
    for name, weight in first.state_dict().items():
        assert torch.allclose(weight, second.state_dict()[name], atol=1e-6)
    capsys.readouterr()
    assert main([*run, str(tmp_path / "third"), *given, "--network.channels", "64"]) == 2
    assert "has another channels (32) than the recipe (64)" in capsys.readouterr().err


def test_numbers_that_cannot_be() -> None:
    with pytest.raises(UserError, match="decode_every >= 1"):
        StudentLoss(decode_every=0)
    with pytest.raises(UserError, match="guided and drop_condition"):
        StudentLoss(guided=2.0)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, pictures=0.0)
    assert main(["train-student", str(recipe), "--output", str(tmp_path / "one")]) == 0
    arguments = (recipe, "--output", tmp_path / "two", "--train.parallel.layout", "sharded")
    finish(torchrun(2, "starflow", "train-student", *arguments))
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for mine, other in zip(one, two, strict=True):
        assert other == pytest.approx(mine, rel=2e-3, abs=2e-4)
    assert (tmp_path / "two" / "pipeline" / "student" / "config.json").is_file()
