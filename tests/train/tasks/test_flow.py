"""The flow's objective and its draws.

Pictures that are encoded when it is their turn: the batches of the cached training, and what the log says.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from starflow.conditioning import ClassLabels
from starflow.data.index import IndexedDataset
from starflow.data.latent_cache import CachedLatents, InMemoryLatents, LatentEntry
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.flow.model import Flow, STARFlow, TarFlow
from starflow.train.distributed import World
from starflow.train.loader import LoaderSettings
from starflow.train.loop import fit
from starflow.train.recipe import Objective
from starflow.train.run import read_log
from starflow.train.settings import TrainSettings
from starflow.train.tasks.flow import FlowLoss, FlowTask, LiveFlowTask, LiveLatents, bits_per_dim, nats_per_dim
from tests.train.tasks.test_cache_latents import Means, fill
from tests.train.tasks.test_cache_latents import pictures as pictures  # a fixture

CONFIG = STARFlowConfig(
    in_channels=2,
    img_size=4,
    channels=32,
    num_blocks=3,
    layers_per_block=1,
    head_dim=32,
    txt_size=1,
    txt_dim=4,
)


def make_cache(count: int = 12, heldout: int = 3, std: float | None = None) -> InMemoryLatents:
    torch.manual_seed(1)
    mean = torch.randn(count, 2, 4, 4).half()
    pictures = [
        LatentEntry(f"p{i}", f"caption {i % 3}", "heldout" if i < heldout else "train", i % 3) for i in range(count)
    ]
    states = torch.eye(4)[:3, None].half()
    spread = None if std is None else torch.full_like(mean, std)
    return InMemoryLatents(mean, spread, states, torch.eye(4)[3:].half(), pictures, {})


def make_task(cache: InMemoryLatents, objective: Objective, flow: STARFlow | TarFlow | None = None) -> FlowTask:
    torch.manual_seed(0)
    settings = TrainSettings(steps=3, batch=8, precision="float32")
    return FlowTask(flow or random_flow(), cache, objective, settings, draw=do_nothing, save=do_nothing)


def do_nothing(flow: Flow, path: Path) -> None:
    """Stand in for drawing and saving."""


def random_flow() -> STARFlow:
    torch.manual_seed(0)
    flow = STARFlow(CONFIG)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return flow


def test_loss_is_the_negative_log_likelihood_per_dimension() -> None:
    flow, x, condition = random_flow(), torch.randn(5, 2, 4, 4), torch.randn(5, 1, 4)
    loss, squares, logdet, _ = FlowLoss(flow, latent_penalty=0.0)(x, condition)
    expected = -flow.log_prob(x, condition).mean() / 32
    assert nats_per_dim(float(squares - logdet)) == pytest.approx(float(expected), rel=1e-5)
    assert bits_per_dim(float(loss)) == pytest.approx(float(expected) / math.log(2), rel=1e-5)


def test_penalty_is_the_mean_square_of_what_flows_between_blocks() -> None:
    flow, x, condition = random_flow(), torch.randn(5, 2, 4, 4), torch.randn(5, 1, 4)
    trace = flow.trace(x, condition)
    between = sum(float(state.square().mean()) for state in trace.states[1:-1])
    plain = FlowLoss(flow, 0.0)(x, condition)[0]
    loss, _, _, penalty = FlowLoss(flow, 0.5)(x, condition)
    assert float(penalty) == pytest.approx(between, rel=1e-5)
    assert float(loss - plain) == pytest.approx(0.5 * between, rel=1e-4)


def test_draws_depend_on_seed_and_step_alone() -> None:
    task = make_task(make_cache(std=0.5), Objective(noise_std=0.3))
    rows = range(8)
    first = [task.loss(task.model, task.batch(step, rows))[0].item() for step in (0, 1, 2)]
    again = [task.loss(task.model, task.batch(step, rows))[0].item() for step in (2, 1, 0)]
    assert first == again[::-1]
    assert len(set(first)) == 3


def test_draws_of_a_batch_do_not_depend_on_how_it_is_cut() -> None:
    task = make_task(make_cache(std=0.5), Objective(noise_std=0.3, drop_condition=0.5))
    x, condition = task.batch(1, range(8))
    assert condition is not None
    for rows in (range(3), range(3, 8)):
        part, states = task.batch(1, rows)
        assert states is not None
        assert torch.equal(part, x[rows.start : rows.stop])
        assert torch.equal(states, condition[rows.start : rows.stop])
        assert task.batch_names(1, rows) == task.batch_names(1, range(8))[rows.start : rows.stop]


@pytest.mark.parametrize("std", [None, 0.4])
def test_noise_and_posterior_have_their_spread(std: float | None) -> None:
    cache = make_cache(count=2000, std=std)
    task = make_task(cache, Objective(noise_std=0.3))
    indices = torch.arange(2000)
    added = task._noised(indices, 0, 0, range(2000)) - cache.mean.float()
    assert float(added.std()) == pytest.approx(math.hypot(0.3, std or 0.0), rel=0.02)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_dropped_conditions_are_the_null_condition(share: float) -> None:
    cache = make_cache()
    task = make_task(cache, Objective(drop_condition=share))
    _, terms = task.loss(task.model, task.batch(0, range(8)))
    rows = task._indices(0, range(8))
    noised = task._noised(rows, 0, 0, range(8))
    null = torch.eye(4)[3].expand(8, 1, 4)
    own = torch.eye(4)[[cache.entries[i].condition for i in rows.tolist()]][:, None]
    _, squares, _, _ = task.model(noised, null if share else own)
    assert float(terms["squares"]) == pytest.approx(float(squares), rel=1e-6)


def test_the_loss_in_bfloat16_is_that_in_float32_within_rounding() -> None:
    """And so are its gradients, which reach weights in float32."""
    found = {}
    for precision in ("float32", "bfloat16"):
        task = make_task(make_cache(), Objective(drop_condition=0.0))
        task.settings = replace(task.settings, precision=precision)
        loss, _ = task.loss(task.model, task.batch(0, range(8)))
        loss.backward()
        gradients = [one.grad.flatten() for one in task.model.parameters() if one.grad is not None]
        assert all(one.dtype == torch.float32 for one in gradients)
        found[precision] = loss.detach(), torch.cat(gradients)
    (exact, slope), (low, low_slope) = found["float32"], found["bfloat16"]
    assert 0 < abs(low - exact) < 2e-2 * abs(exact) + 1e-2
    assert torch.linalg.vector_norm(low_slope - slope) < 5e-2 * torch.linalg.vector_norm(slope)


def test_a_tarflow_reads_the_cached_rows_as_labels() -> None:
    torch.manual_seed(0)
    flow = TarFlow(TarFlowConfig(2, 4, 2, 64, 2, 1, num_classes=3))
    task = make_task(make_cache(), Objective(drop_condition=0.0), flow)
    labels = task._conditions(torch.arange(6), dropped=torch.tensor([True, False] * 3))
    assert labels is not None
    assert labels.tolist() == [-1, 1, -1, 0, -1, 2]


def test_evaluation_reports_both_splits_of_an_identity_flow() -> None:
    """A new flow is the identity: its likelihood of noised standard normal latents has a closed form."""
    task = make_task(make_cache(count=4000, heldout=2000), Objective(noise_std=0.5), STARFlow(CONFIG))
    measures = task.evaluate(task.model)
    expected = 0.5 * math.log(2 * math.pi) + 0.5 * (1 + 0.25)
    assert measures["nats_per_dim"] == pytest.approx(expected, rel=0.01)
    assert measures["train_nats_per_dim"] == pytest.approx(expected, rel=0.01)
    assert measures["bits_per_dim"] == pytest.approx(expected / math.log(2), rel=0.01)


def test_a_split_without_pictures_is_refused() -> None:
    with pytest.raises(UserError, match="12 training and 0 held-out pictures"):
        make_task(make_cache(heldout=0), Objective())


def test_saving_and_drawing_reach_their_callables(tmp_path: Path) -> None:
    called: list[tuple[Flow, Path]] = []
    note = lambda flow, path: called.append((flow, path))  # noqa: E731
    task = FlowTask(random_flow(), make_cache(), Objective(), TrainSettings(steps=1), note, note)
    other = FlowLoss(random_flow(), 0.0)
    task.draw(task.model, tmp_path / "a")
    task.save(other, tmp_path / "b")
    assert isinstance(task.model, FlowLoss)
    assert called == [(task.model.flow, tmp_path / "a"), (other.flow, tmp_path / "b")]


def test_an_evaluation_may_read_some_of_the_heldout_pictures() -> None:
    cache = make_cache(heldout=5)

    def task(count: int) -> FlowTask:
        settings = TrainSettings(steps=3, batch=4, evaluate_pictures=count)
        return FlowTask(random_flow(), cache, Objective(), settings, draw=do_nothing, save=do_nothing)

    chosen = torch.cat(task(2).heldout).tolist()
    assert len(set(chosen)) == 2
    assert set(chosen) < set(range(5))
    assert torch.cat(task(2).heldout).tolist() == chosen
    assert torch.cat(task(0).heldout).tolist() == torch.cat(task(9).heldout).tolist() == list(range(5))
    few = task(2)
    assert few.evaluate(few.model)["nats_per_dim"] != task(0).evaluate(few.model)["nats_per_dim"]
    with pytest.raises(UserError, match="'evaluate_pictures' is -1, expected at least 0"):
        TrainSettings(steps=1, evaluate_pictures=-1)


LIVE_CONFIG = STARFlowConfig(
    in_channels=3, img_size=2, channels=16, num_blocks=2, layers_per_block=1, head_dim=16, txt_size=1, txt_dim=3
)
LIVE_SETTINGS = TrainSettings(steps=5, batch=4, warmup=1, evaluate_every=2, sample_every=100, checkpoint_every=2)


def live_task(
    pictures: IndexedDataset, loading: LoaderSettings | None = None, world: World | None = None
) -> LiveFlowTask:
    latents = LiveLatents(pictures, Means(), ClassLabels(["class 0", "class 1"]))
    torch.manual_seed(0)
    flow = STARFlow(LIVE_CONFIG)
    return LiveFlowTask(flow, latents, Objective(), LIVE_SETTINGS, do_nothing, do_nothing, world, loading)


def test_it_sees_what_the_cached_training_sees(pictures: IndexedDataset, tmp_path: Path) -> None:
    broken = tmp_path / "set" / "class 1" / "05.png"
    Image.new("RGB", (16, 16)).save(broken)  # a cache leaves out what a live batch replaces
    fill(pictures, tmp_path / "cache", Means())
    live, cache = live_task(pictures), CachedLatents(tmp_path / "cache")
    cached = FlowTask(STARFlow(LIVE_CONFIG), cache, Objective(), LIVE_SETTINGS, do_nothing, do_nothing)
    for step in range(12):
        for mine, other in zip(live.batch(step, range(4)), cached.batch(step, range(4)), strict=True):
            assert mine is not None
            assert other is not None
            assert torch.allclose(mine, other, atol=2e-3)
        assert live.batch_names(step, range(4)) == cached.batch_names(step, range(4))
    a, b = live.evaluate(live.model), cached.evaluate(cached.model)
    assert a == pytest.approx(b, abs=1e-3)


def test_a_resumed_live_run_is_the_uninterrupted_one(pictures: IndexedDataset, tmp_path: Path) -> None:
    loading = LoaderSettings(flip=True, notify=lambda _: None)
    fit(live_task(pictures, loading), LIVE_SETTINGS, tmp_path / "whole", show_progress=False)
    fit(live_task(pictures, loading), replace(LIVE_SETTINGS, steps=2), tmp_path / "cut", show_progress=False)
    (tmp_path / "cut" / "checkpoints").rename(tmp_path / "kept")
    task = live_task(pictures, loading)
    (tmp_path / "again").mkdir()
    (tmp_path / "kept").rename(tmp_path / "again" / "checkpoints")
    fit(task, LIVE_SETTINGS, tmp_path / "again", show_progress=False)
    whole = [line["squares"] for line in read_log(tmp_path / "whole" / "log.jsonl") if "loss" in line]
    again = [line["squares"] for line in read_log(tmp_path / "again" / "log.jsonl") if "loss" in line]
    assert again == whole[2:]


def test_unreadable_pictures_are_counted_in_the_log(pictures: IndexedDataset, tmp_path: Path) -> None:
    said: list[str] = []
    task = live_task(pictures, LoaderSettings(notify=said.append))
    for step in range(15):
        _, terms = task.loss(task.model, task.batch(step, range(4)))
    assert float(terms["unreadable"]) == 1.0
    assert len(said) == 1
    assert said[0].startswith("skipped class 1/05.png")


def test_half_of_the_images_are_flipped(pictures: IndexedDataset) -> None:
    plain, turned = live_task(pictures), live_task(pictures, LoaderSettings(flip=True, notify=lambda _: None))
    shares = []
    for step in range(12):
        a, b = plain._images(step, range(4))[0], turned._images(step, range(4))[0]
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one, other) or torch.equal(one.flip(-1), other)
            shares.append(not torch.equal(one, other))
        (part,) = (turned._images(step, range(2, 4))[0],)
        assert torch.equal(part, b[2:]), "whoever draws it"
    assert 10 < sum(shares) < 38
