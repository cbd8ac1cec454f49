"""Prompts become what each kind of flow takes, and examples are of the kind that a model reads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from starflow.conditioning import ClassLabels
from starflow.errors import UserError
from starflow.flow.config import TarFlowConfig
from starflow.flow.model import TarFlow
from starflow.latents import PixelLatents
from starflow.pipeline.config import PipelineConfig
from starflow.pipeline.inputs import PromptConditions, encode_prompts, example_prompts
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


class Listed(ClassLabels):
    """Lists what it encodes; with `rounding` a row depends on how many there are."""

    def __init__(self, *, rounding: bool = False) -> None:
        super().__init__(CLASSES)
        self.calls: list[list[str]] = []
        self.rounding = rounding

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        self.calls.append(list(prompts))
        return super().encode(prompts) + (1e-6 * len(prompts) if self.rounding else 0.0)


@pytest.mark.parametrize("rounding", [False, True])
def test_prompts_are_encoded_together_where_that_makes_no_difference(rounding: bool) -> None:
    labels = Listed(rounding=rounding)
    pipeline = random_pipeline("pixels", PixelLatents(), labels)
    conditions, shape = PromptConditions(labels, pipeline.flow, pipeline.config, 4), (3, 8, 8)
    conditions.try_together()
    labels.calls.clear()
    conditions.prepare(["star", "circle", "star"], shape)
    asked = [call for call in labels.calls if set(call) != {""}]
    assert asked == ([["star"], ["circle"]] if rounding else [["star", "circle"]])
    labels.calls.clear()
    for name in ("star", "circle"):
        condition, null = conditions.of(name, shape)
        assert not labels.calls, "it was encoded already"
        assert condition is not None
        assert null is not None
        assert torch.equal(condition, labels.encode([name]))
        labels.calls.clear()


def test_the_conditions_asked_for_last_are_kept_for_each_size() -> None:
    labels = Listed()
    pipeline = random_pipeline("pixels", PixelLatents(), labels)
    conditions = PromptConditions(labels, pipeline.flow, pipeline.config, 2)
    for name, side in (("star", 8), ("circle", 8), ("star", 8), ("star", 16), ("star", 8), ("circle", 8)):
        conditions.of(name, (3, side, side))
    asked = [call for call in labels.calls if call != [""]]
    assert asked == [["star"], ["circle"], ["star"], ["circle"]], "the second 'circle' had been dropped"


def test_a_prompt_that_is_unknown_leaves_the_others_as_they_were() -> None:
    labels = Listed()
    pipeline = random_pipeline("pixels", PixelLatents(), labels)
    conditions = PromptConditions(labels, pipeline.flow, pipeline.config, 4)
    conditions.try_together()
    with pytest.raises(UserError, match="unknown class 'moon'"):
        conditions.prepare(["star", "moon"], (3, 8, 8))
    assert conditions.of("star", (3, 8, 8))[0] is not None
