"""Prompts become what each kind of flow takes, and examples are of the kind that a model reads."""

from __future__ import annotations

import pytest
import torch

from starflow.conditioning import ClassLabels
from starflow.errors import UserError
from starflow.flow.config import TarFlowConfig
from starflow.flow.model import TarFlow
from starflow.latents import PixelLatents
from starflow.pipeline.config import PipelineConfig
from starflow.pipeline.inputs import encode_prompts, example_prompts
from tests.cli.conftest import CLASSES, random_pipeline


def test_classes_are_vectors_for_a_starflow_and_labels_for_a_tarflow() -> None:
    labels = ClassLabels(CLASSES)
    pipeline = random_pipeline("pixels", PixelLatents(), labels)
    prompts = ["star", "", "circle"]
    condition, null = encode_prompts(prompts, labels, pipeline.flow, pipeline.config)
    assert condition is not None
    assert null is not None
    assert torch.equal(condition, labels.encode(prompts))
    assert torch.equal(condition[1], null[1])
    flow = TarFlow(TarFlowConfig(3, 8, 4, 64, 2, 1, num_classes=3))
    config = PipelineConfig("tarflow", 8, 0.1, PixelLatents().spec, labels.spec)
    found, nothing = encode_prompts(prompts, labels, flow, config)
    assert found is not None
    assert found.tolist() == [CLASSES.index("star"), -1, CLASSES.index("circle")]
    assert nothing is None


def test_a_model_without_a_conditioner_takes_no_prompt() -> None:
    pipeline = random_pipeline("nothing", PixelLatents(), None)
    assert encode_prompts(["", ""], None, pipeline.flow, pipeline.config) == (None, None)
    with pytest.raises(UserError, match="'nothing' takes no prompt, got 'a car': leave it empty"):
        encode_prompts(["", "a car"], None, pipeline.flow, pipeline.config)


def test_examples_go_round_the_classes() -> None:
    labels = ClassLabels(CLASSES)
    assert example_prompts(labels, 5) == [CLASSES[index % len(CLASSES)] for index in range(5)]
    assert example_prompts(None, 2) == ["", ""]
    random_pipeline("pixels", PixelLatents(), labels)(example_prompts(labels, 2), solver="sequential")
