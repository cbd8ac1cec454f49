"""The scaling experiment's average of weights, in closed form, and its verdicts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from experiments.scaling import SHARPNESS, _power_average, verdict, verdict_table


def test_the_average_counts_late_weights_by_a_power() -> None:
    """Weight t counts t (t + 1) ... (t + SHARPNESS - 1), which is t^SHARPNESS at large t; few of the first matter."""
    model = nn.Linear(1, 1, bias=False)
    average = AveragedModel(model, avg_fn=_power_average)
    values = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for value in values:
        nn.init.constant_(model.weight, float(value))
        average.update_parameters(model)
    times = torch.arange(1, 31, dtype=torch.float64)
    counts = torch.stack([times + k for k in range(SHARPNESS)]).prod(0)
    expected = float((counts * values).sum() / counts.sum())
    assert float(next(average.parameters()).detach()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("gap", "updates", "width", "expected"),
    [
        (0.04, 0.5, 0.5, "closed"),
        (0.5, 1.02, 0.97, "flat"),
        (0.5, 1.2, 0.8, "rose at the last doubling of updates"),
        (0.5, 0.96, 0.6, "flat in updates, not in width"),
        (0.2, 0.5, 1.0, "closing: 0.05 nats after 2 more doublings of updates, if it went on so"),
    ],
)
def test_a_verdict_follows_from_the_shares(gap: float, updates: float, width: float, expected: str) -> None:
    assert verdict(gap, updates, width) == expected


def test_the_verdict_is_of_the_width_that_ends_best() -> None:
    """Beside its checkpoint before and the next narrower width; a wider flow that has diverged does not hide it."""

    def cell(*gaps: float) -> dict[str, object]:
        return {"curve": [{"gap": gap, "error": 0.01, "total_variation": gap / 2} for gap in gaps]}

    widths = {8: cell(0.9, 0.8, 0.8), 32: cell(0.8, 0.6, 0.4), 128: cell(0.3, 0.5, 0.9)}
    assert verdict_table({"rings": {"free 2": widths}})[1][2:7] == ["0.400 ± 0.010", "32", "0.200", "0.67", "0.50"]
    assert verdict_table({"rings": {"free 2": {8: cell(0.8, 0.8)}}})[1][5:] == ["1.00", "1.00", "flat"]
