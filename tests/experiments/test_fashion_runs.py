"""What a run's log says of it: the curve of its evaluations and the time of an update."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.fashion_runs import heldout_curve, update_seconds


def test_a_log_gives_the_curve_and_the_median_time(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = [
        {"step": 1, "pictures_per_second": 64.0},
        {"step": 2, "pictures_per_second": 640.0, "heldout_nats_per_dim": 0.5, "heldout_train_nats_per_dim": 0.4},
        {"step": 3, "pictures_per_second": 128.0},
        {"step": 4, "heldout_nats_per_dim": 0.3, "heldout_train_nats_per_dim": 0.2},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert heldout_curve(tmp_path) == [(2, 0.5, 0.4), (4, 0.3, 0.2)]
    assert update_seconds(tmp_path, 64) == 0.5
