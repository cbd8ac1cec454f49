"""Flows on vectors and sequences, as distributions of PyTorch; with an adapter to `sbi`."""

from __future__ import annotations

from starflow.density.blocks import SequenceFlowConfig
from starflow.density.distribution import SequenceDistribution
from starflow.density.fit import FitResult
from starflow.density.sequence_flow import SequenceFlow

__all__ = ["FitResult", "SequenceDistribution", "SequenceFlow", "SequenceFlowConfig"]
