"""The flow as a user meets it: fitting to densities with a closed form, saving, and what a mistake says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from torch.distributions import MultivariateNormal

from starflow.density import SequenceFlow
from starflow.density.sequence_flow import moments_of
from starflow.errors import UserError
from tests.density.cases import SMALL, cases, make_flow

TINY: dict[str, Any] = {"channels": 16, "head_dim": 16, "num_blocks": 2, "layers_per_block": 1}


def kernel(steps: int) -> MultivariateNormal:
    """A Gaussian process on a grid, whose log-density is known."""
    times = torch.arange(steps) / 3
    covariance = torch.exp(-0.5 * (times[:, None] - times).square()) + 0.1 * torch.eye(steps)
    return MultivariateNormal(torch.zeros(steps), 4 * covariance)


def test_a_gaussian_process_is_fitted_to_its_entropy() -> None:
    """An affine flow holds every Gaussian: one block is enough, and held-out nats approach the process's own."""
    torch.manual_seed(0)
    process = kernel(6)
    x = process.sample((1200,))[..., None]
    flow = SequenceFlow((6, 1), **TINY)
    before = -flow().log_prob(x).mean()
    result = flow.fit(x, max_epochs=15, batch_size=100, lr=5e-3, progress=False)
    fresh = process.sample((1000,))
    gap = float((process.log_prob(fresh) - flow().log_prob(fresh[..., None]).detach()).mean())
    assert -0.05 < gap < 0.25
    assert -result.heldout_nats < before - 3
    deviation = flow().sample((2000,), generator=torch.Generator().manual_seed(0)).std(0)
    assert (deviation / (4.4**0.5) - 1).abs().max() < 0.15


def test_a_context_moves_the_density() -> None:
    torch.manual_seed(0)
    context = torch.rand(1000, 1) * 4 - 2
    x = context + 0.3 * torch.randn(1000, 2)
    flow = SequenceFlow((2,), (1,), **TINY)
    flow.fit(x, context, max_epochs=15, batch_size=100, lr=3e-3, progress=False)
    means = flow(torch.tensor([[-1.0], [1.0]])).sample((500,)).mean(0)
    assert (means - torch.tensor([[-1.0], [1.0]])).abs().max() < 0.2


def test_standardisation_is_fitted_once_and_counts_in_the_density() -> None:
    torch.manual_seed(0)
    x = torch.tensor([100.0, -3.0]) + torch.tensor([20.0, 0.01]) * torch.randn(500, 2)
    flow = SequenceFlow((2,), **TINY)
    flow.standardise(x)
    torch.testing.assert_close(flow.shift, x.mean(0))
    torch.testing.assert_close(flow.scale, x.std(0, correction=0), rtol=1e-3, atol=0)
    nats = float(flow().log_prob(x).detach().mean())
    assert nats == pytest.approx(-math.log(2 * math.pi * math.e) - math.log(20.0 * 0.01), abs=0.1)
    flow.fit(x + 1000, max_epochs=1, progress=False)
    torch.testing.assert_close(flow.shift, x.mean(0))


def test_only_training_rows_and_what_is_no_padding_are_standardised() -> None:
    x = torch.randn(50, 4, 2)
    lengths = torch.randint(1, 5, (50,))
    known = torch.arange(4) < lengths[:, None]
    flow = SequenceFlow((4, 2), variable_length=True, **TINY)
    flow.standardise(torch.where(known[..., None], x, 1e6), lengths=lengths)
    torch.testing.assert_close(flow.shift, x[known].mean(0))
    vector = SequenceFlow((4,), variable_length=True, **TINY)
    vector.standardise(torch.where(known, x[..., 0], 1e6), lengths=lengths)
    expected = torch.stack([x[known[:, n], n, 0].mean() for n in range(4)])
    torch.testing.assert_close(vector.shift, expected)


def test_a_column_that_does_not_vary_is_left_as_it_is() -> None:
    _, deviation = moments_of(torch.tensor([[1.0, 1e8, 0.0], [2.0, 1e8, 0.0]]))
    assert deviation.tolist() == [0.5, 1.0, 1.0]
    _, rounded = moments_of(torch.tensor([[1e8], [1e8], [1e8 + 8]]))  # the next number in float32
    assert rounded.item() == 1.0


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e25])
def test_moments_are_those_of_any_unit(unit: float) -> None:
    """Squares of such numbers are 0 or infinite in float32."""
    rows = torch.randn(100, 2)
    mean, deviation = moments_of(unit * (rows + 3))
    torch.testing.assert_close(mean / unit, rows.mean(0) + 3)
    torch.testing.assert_close(deviation / unit, rows.std(0, correction=0))


def test_what_float64_can_tell_apart_is_standardised() -> None:
    rows = 1e6 + 1e-3 * torch.randn(500, 1, dtype=torch.float64)
    flow = SequenceFlow((1,), **TINY).double()
    flow.standardise(rows)
    torch.testing.assert_close(flow.scale, rows.std(0, correction=0), rtol=1e-6, atol=0)


def test_a_step_that_no_row_has_is_a_standard_normal() -> None:
    flow = SequenceFlow((4,), variable_length=True, **TINY)
    flow.standardise(torch.randn(9, 4), lengths=torch.tensor([1, 2, 3] * 3))
    assert flow.shift[3] == 0
    assert flow.scale[3] == 1
    assert flow(lengths=torch.tensor(4)).sample((5,)).isfinite().all()
    with pytest.raises(UserError, match="no rows to standardise by"):
        flow.standardise(torch.zeros(0, 4), lengths=torch.ones(0, dtype=torch.int64))


@settings(max_examples=10, derandomize=True, deadline=None)
@given(case=cases())
def test_saving_keeps_every_bit(tmp_path_factory: pytest.TempPathFactory, case: Any) -> None:
    folder = tmp_path_factory.mktemp("flow")
    case.flow.save_pretrained(folder)
    again = SequenceFlow.from_pretrained(folder)
    assert again.config == case.config
    assert bool(again.standardised)
    for name, tensor in case.flow.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    expected = case.flow(case.context, case.lengths).log_prob(case.x)
    found = again(case.context, case.lengths).log_prob(case.x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)


def test_sizes_and_bounds_of_numpy_and_torch_are_saved(tmp_path: Path) -> None:
    """A prior's bounds are tensors, a shape may be NumPy's; JSON takes neither, and training would be lost."""
    low, high = torch.tensor([0.0, -1.0]), numpy.array([1.0, 2.0], numpy.float32)
    steps: Any = numpy.int64(3)
    flow = SequenceFlow((steps, 2), bounds=tuple(zip(low, high, strict=True)), **{**TINY, "num_blocks": steps})
    flow.save_pretrained(tmp_path)
    again = SequenceFlow.from_pretrained(tmp_path).config
    assert again == flow.config
    assert (again.event_shape, again.bounds) == ((3, 2), ((0.0, 1.0), (-1.0, 2.0)))


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    flow = make_flow((3,))
    flow.save_pretrained(tmp_path)
    options = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**options, "kind": "starflow"}))
    with pytest.raises(UserError, match="holds no flow on sequences"):
        SequenceFlow.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**options, "chanels": 3}))
    with pytest.raises(UserError, match="unknown key 'chanels': did you mean 'channels'"):
        SequenceFlow.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**options, "num_blocks": 9}))
    with pytest.raises(UserError, match="missing"):
        SequenceFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"no context, expected one of shape \(\.\.\., 3\): pass it"),
        ({"context": torch.zeros(2, 4)}, r"the context has shape \(2, 4\), expected \(\.\.\., 3\)"),
        ({"context": torch.tensor([[0.0, math.nan, 0.0]])}, "the context has 1 values that are NaN or infinite"),
        ({"context": torch.tensor([[0.0, math.inf, -math.inf]])}, "the context has 2 values that are NaN or infinite"),
        (
            {"context": torch.full((3,), 1e300, dtype=torch.float64)},
            "the context has 3 values that are NaN or infinite",
        ),
        ({"context": [0.0, 1.0, 2.0]}, "the type of context is list, expected a tensor"),
        ({"context": torch.zeros(3, dtype=torch.complex64)}, "context of complex numbers, expected real ones"),
        (
            {"context": torch.zeros(2, 3), "lengths": torch.tensor(2)},
            "expected none: variable_length is False",
        ),
    ],
)
def test_contexts_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SequenceFlow((4, 2), (3,), **SMALL)(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no lengths, expected some"),
        ({"lengths": torch.tensor([0, 2])}, r"the lengths are \[0, 2\], expected whole numbers from 1 to 4"),
        ({"lengths": torch.tensor([5])}, r"the lengths are \[5\]"),
        ({"lengths": torch.tensor([2.0])}, "whole numbers"),
        ({"lengths": torch.tensor([True])}, "whole numbers"),
        ({"lengths": 3}, "the type of lengths is int, expected a tensor"),
        ({"context": torch.zeros(3), "lengths": torch.tensor([2])}, "expected none: context_shape is"),
    ],
)
def test_lengths_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SequenceFlow((4, 2), variable_length=True, **SMALL)(**arguments)


def test_lengths_and_contexts_of_batches_that_do_not_fit() -> None:
    flow = SequenceFlow((4, 2), (3,), variable_length=True, **SMALL)
    with pytest.raises(UserError, match=r"lengths of shape \(2,\) for contexts of batch shape \(5,\)"):
        flow(torch.zeros(5, 3), torch.tensor([1, 2]))
    assert flow(torch.zeros(5, 1, 3), torch.tensor([1, 2])).batch_shape == (5, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(5, 3)}, r"data of shape \(5, 3\), expected \(rows, 2\)"),
        ({"x": torch.tensor(1.0)}, r"data of shape \(\), expected \(rows, 2\)"),
        ({"x": torch.zeros(5, 2).numpy()}, "the type of data is ndarray, expected a tensor"),
        ({"x": torch.full((5, 2), 0.5), "context": torch.zeros(5, 2, 1)}, r"contexts of shape \(5, 2, 1\), expected"),
        ({"x": torch.full((5, 2), 0.5)}, "no context, expected one of shape"),
        ({"x": torch.tensor([[0.5, 1.0], [0.5, math.inf]]), "context": torch.zeros(2, 1)}, "1 of 2 rows have infinite"),
        (
            {"x": torch.tensor([[0.5, 1.0], [0.0, 1.0]]), "context": torch.zeros(2, 1)},
            "1 of 2 rows are outside .* on one",
        ),
        (
            {"x": torch.tensor([[0.5, 1.0], [1 - 1e-12, 1.0]], dtype=torch.float64), "context": torch.zeros(2, 1)},
            "1 of 2 rows are outside .* in float32 on one",
        ),
        (
            {"x": torch.zeros(5, 2), "context": torch.zeros(4, 1)},
            "5 rows of data with 4 contexts: give one for each",
        ),
        ({"x": torch.full((5, 2), -1.0), "context": torch.zeros(5, 1)}, "5 of 5 rows are outside the bounds"),
        ({"x": torch.full((5, 2), math.nan), "context": torch.zeros(5, 1)}, "10 values are missing"),
    ],
)
def test_data_that_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SequenceFlow((2,), (1,), bounds=((0.0, 1.0), (0.0, None)), **SMALL).fit(**arguments, progress=False)


@pytest.mark.parametrize("shape", [(5, 1), (5, 5), ()])
def test_lengths_of_another_shape_are_not_broadcast(shape: tuple[int, ...]) -> None:
    flow = SequenceFlow((4, 2), variable_length=True, **SMALL)
    with pytest.raises(UserError, match=r"lengths of shape \(.*\), expected \(rows,\)"):
        flow.fit(torch.zeros(5, 4, 2), lengths=torch.ones(shape, dtype=torch.int64), progress=False)


@pytest.mark.gpu
def test_data_of_the_processor_fits_a_flow_of_a_gpu() -> None:
    flow = SequenceFlow((4, 1), (2,), bounds=((0.0, 1.0),), variable_length=True, **TINY).to("cuda")
    x, context, lengths = torch.rand(64, 4, 1).clamp(0.01, 0.99), torch.randn(64, 2), torch.randint(1, 5, (64,))
    assert math.isfinite(flow.fit(x, context, lengths, max_epochs=1, progress=False).heldout_nats)


def test_a_mapped_file_is_read_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives what the tensor gives, and no read asks for more rows than a part or a batch has."""
    rows, contexts = torch.randn(200, 3, 2).numpy(), torch.randn(200, 1)
    numpy.save(tmp_path / "x.npy", rows)
    monkeypatch.setattr("starflow.density.sequence_flow.CHECKED_ROWS", 50)
    monkeypatch.setattr("starflow.density.sequence_flow.STANDARDISED_ROWS", 50)
    monkeypatch.setattr("starflow.density.fit.EVALUATION_ROWS", 50)
    asked = []

    class Counted(torch.Tensor):
        def __getitem__(self, index: Any) -> torch.Tensor:
            found = torch.Tensor.__getitem__(self, index).as_subclass(torch.Tensor)
            asked.append(len(found))
            return found

    histories = []
    for x in (torch.from_numpy(rows), torch.from_numpy(numpy.load(tmp_path / "x.npy", mmap_mode="c"))):
        torch.manual_seed(0)
        flow = SequenceFlow((3, 2), (1,), **TINY)
        result = flow.fit(x.as_subclass(Counted), contexts, max_epochs=2, batch_size=40, progress=False)
        histories.append(result.heldout_history)
    assert histories[0] == histories[1]
    assert 0 < max(asked) <= 50


def test_float64_is_kept_throughout() -> None:
    flow = make_flow((3, 2), (2,))
    dist = flow(torch.zeros(2, 2))
    assert dist.sample().dtype == dist.log_prob(torch.zeros(3, 2)).dtype == torch.float64
    assert SequenceFlow((3, 2), **SMALL)().sample().dtype == torch.float32
