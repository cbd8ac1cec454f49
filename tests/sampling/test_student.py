"""A student belongs to its flow, and its candidates are judged by that flow's exact density."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.flow.config import ModelConfig, STARFlowConfig, TarFlowConfig
from starflow.flow.model import STARFlow, TarFlow, build
from starflow.sampling.denoise import Denoiser, DenoiserConfig
from starflow.sampling.student import Student, StudentConfig, draw_by_student, fingerprint, group_sizes, inputs_of

CONFIG = STARFlowConfig(
    in_channels=2, img_size=4, channels=32, num_blocks=2, layers_per_block=1, head_dim=16, txt_size=3, txt_dim=5
)
LABELLED = TarFlowConfig(3, 8, 4, 64, num_blocks=2, layers_per_block=1, num_classes=2)


def random_flow(config: ModelConfig = CONFIG, seed: int = 0) -> STARFlow | TarFlow:
    torch.manual_seed(seed)
    flow = build(config)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return flow.requires_grad_(False)


def random_student(flow: STARFlow | TarFlow, temperature: float = 1.0) -> Student:
    torch.manual_seed(1)
    sizes = inputs_of(flow)
    student = Student(StudentConfig(**sizes, channels=32, layers=(1, 1, 1), head_dim=16, temperature=temperature))
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return student.eval().requires_grad_(False)


def test_a_fingerprint_is_the_weights_and_not_their_precision() -> None:
    flow = random_flow()
    own = fingerprint(flow)
    assert own == fingerprint(random_flow())
    assert own == fingerprint(random_flow().bfloat16())
    assert own != fingerprint(random_flow(seed=1))
    with torch.no_grad():
        next(flow.parameters()).mul_(1.02)
    assert own != fingerprint(flow)


@pytest.mark.parametrize("config", [CONFIG, LABELLED], ids=["starflow", "tarflow"])
def test_what_is_saved_is_what_is_loaded(config: ModelConfig, tmp_path: Path) -> None:
    flow = random_flow(config)
    student = random_student(flow, temperature=0.7)
    student.save_pretrained(tmp_path)
    loaded = Student.from_pretrained(tmp_path)
    assert loaded.config == student.config
    loaded.check_teacher(flow)
    shape = (2, config.in_channels, config.img_size, config.img_size)
    condition = torch.randn(2, 3, 5) if config is CONFIG else torch.tensor([1, -1])
    z, weight = torch.randn(shape), torch.tensor([0.0, 2.0])
    one, other = student(z, condition, weight), loaded(z, condition, weight)
    assert torch.equal(one.clean, other.clean)
    assert one.clean.shape == shape
    assert len(one.states) == len(flow.blocks)
    assert all(state.shape == flow.to_tokens(z)[0].shape for state in one.states)


def test_another_flow_or_another_network_is_refused(tmp_path: Path) -> None:
    student = random_student(random_flow())
    with pytest.raises(UserError, match=r"the student was trained beside another flow .* train one by `starflow train"):
        student.check_teacher(random_flow(seed=2))
    sizes = inputs_of(random_flow())
    Denoiser(DenoiserConfig(**sizes, channels=32, layers=(1,), head_dim=16)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a 'denoiser', expected a student"):
        Student.from_pretrained(tmp_path)


def test_sizes_that_cannot_be() -> None:
    sizes = inputs_of(random_flow())
    with pytest.raises(UserError, match="channels is 40 and head_dim 16, expected a multiple"):
        StudentConfig(**sizes, channels=40, layers=(1, 1, 1), head_dim=16)
    with pytest.raises(UserError, match="layers is \\[1, 0\\], expected at least 1"):
        StudentConfig(**sizes, channels=32, layers=(1, 0), head_dim=16)
    with pytest.raises(UserError, match="2 groups of layers for a flow of 2 blocks: give 3"):
        group_sizes((1, 1), 2)
    with pytest.raises(UserError, match=r"the condition's shape is None, expected \(1, 3, 5\)"):
        random_student(random_flow())(torch.zeros(1, 2, 4, 4))


def test_no_weight_is_a_weight_of_zero() -> None:
    student = random_student(random_flow())
    z, condition = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 5)
    unguided, zero, guided = (student(z, condition, w).clean for w in (None, torch.zeros(2), torch.ones(2)))
    assert torch.equal(unguided, zero)
    assert not torch.allclose(unguided, guided, atol=1e-3)


def test_no_class_is_a_class_of_its_own() -> None:
    student = random_student(random_flow(LABELLED))
    z = torch.randn(2, 3, 8, 8)
    none, unnamed, first = (student(z, given).clean for given in (None, torch.tensor([-1, -1]), torch.tensor([0, 0])))
    assert torch.equal(none, unnamed)
    assert not torch.allclose(none, first, atol=1e-3)


def draw(student: Student, flow: STARFlow | TarFlow, noise: Tensor, batch_size: int) -> Tensor:
    condition, weights = torch.ones(len(noise), 3, 5), torch.zeros(len(noise))
    own = 0.3 * torch.randn(noise[:, 0].shape, generator=torch.Generator().manual_seed(3))
    return draw_by_student(student, flow, noise, condition, weights, own, batch_size)


def test_the_likeliest_candidate_under_the_flow_is_kept() -> None:
    flow = random_flow()
    student = random_student(flow)
    noise = torch.randn(3, 5, 2, 4, 4)
    own = 0.3 * torch.randn(noise[:, 0].shape, generator=torch.Generator().manual_seed(3))
    kept = draw(student, flow, noise, batch_size=16)
    for row in range(3):
        condition = torch.ones(5, 3, 5)
        clean = student(noise[row], condition).clean
        best = int(flow.log_prob(clean + own[row], condition).argmax())
        assert torch.allclose(kept[row], clean[best], atol=1e-5)
    assert torch.allclose(kept, draw(student, flow, noise, batch_size=2), atol=1e-5)
    single = draw(student, flow, noise[:, :1], batch_size=2)
    assert torch.allclose(single, student(noise[:, 0], torch.ones(3, 3, 5)).clean, atol=1e-5)


def test_a_candidate_without_a_density_is_never_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = random_flow()
    student, noise = random_student(flow), torch.randn(1, 3, 2, 4, 4)
    monkeypatch.setattr(flow, "log_prob", lambda x, condition: torch.tensor([torch.nan, -5.0, -9.0]))
    kept = draw(student, flow, noise, batch_size=16)
    assert torch.allclose(kept, student(noise[:, 1], torch.ones(1, 3, 5)).clean, atol=1e-5)


def test_progress_counts_candidates() -> None:
    flow, said = random_flow(), []
    own, weights, condition = torch.zeros(2, 2, 4, 4), torch.zeros(2), torch.ones(2, 3, 5)
    noise = torch.randn(2, 3, 2, 4, 4)

    def note(done: int, total: int) -> None:
        said.append((done, total))

    draw_by_student(random_student(flow), flow, noise, condition, weights, own, 4, note)
    assert said == [(4, 6), (6, 6)]
