"""Any network as features: a stub in a module, its weights, torch-fidelity's place, and rows that are not finite."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.evaluate import extract, load_extractor
from starflow.files import write_tensors


class Stub(nn.Module):
    """Mean colours times a weight; two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = images.mean((2, 3)) * self.scale
        return features, features[:, :2]


def number() -> int:
    return 3


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    made: Any = types.ModuleType("stub_features")
    made.Stub, made.number = Stub, number
    monkeypatch.setitem(sys.modules, "stub_features", made)
    return "stub_features"


def test_a_network_of_ones_own_with_its_weights(module: str, tmp_path: Path) -> None:
    scale = torch.tensor([1.0, 2.0, 3.0])
    write_tensors(tmp_path / "w.safetensors", {"scale": scale})
    torch.save({"scale": scale}, tmp_path / "w.pth")
    images = torch.rand(5, 3, 4, 4)
    for file in ("w.safetensors", "w.pth"):
        made = load_extractor(f"inception={module}:Stub", tmp_path / file)
        assert made.names() == ("fid", "kid")  # it is the user who says that this is Inception
        found = extract(made, images.split(2))
        torch.testing.assert_close(found.features, images.mean((2, 3)).double() * scale, check_dtype=False)
        assert found.logits is not None
        assert found.logits.shape == (5, 2)
        assert found.features.dtype == torch.float64
    assert load_extractor(f"mine={module}:Stub").names() == ("fd_mine", "kid_mine")


def test_rows_that_are_not_finite_are_kept_apart_and_counted(module: str) -> None:
    images = torch.rand(5, 3, 4, 4)
    images[3] = torch.nan
    found = extract(load_extractor(f"mine={module}:Stub"), images.split(4))
    assert found.not_finite == 1
    assert len(found.features) == 5
    kept = found.kept()
    assert len(kept.features) == 4
    assert kept.not_finite == 0


def test_torch_fidelitys_network_gets_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Inception(nn.Module):
        def __init__(self, name: str, features: list[str]) -> None:
            super().__init__()
            assert features == ["2048", "logits_unbiased"]

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(images)
            return images.float().flatten(1), images.float().flatten(1)[:, :4]

    fidelity: Any = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    fidelity.FeatureExtractorInceptionV3 = Inception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", fidelity)
    found = extract(load_extractor("inception"), [torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)])
    assert seen[0].dtype == torch.uint8
    assert found.features.tolist() == [[0.0, 128.0, 255.0]]


def test_bad_choices(module: str, tmp_path: Path) -> None:
    for choice, weights, part in (
        ("resnet", None, "unknown features 'resnet'"),
        ("mobilenetv2", tmp_path / "w.pth", "for a network of your own"),
        ("x=nowhere:Net", None, "cannot find 'nowhere:Net'"),
        (f"x={module}:Other", None, "cannot find"),
        (f"x={module}:number", None, "built a int"),
        (f"x={module}:Stub", tmp_path / "w.pth", "no such file"),
    ):
        with pytest.raises(UserError, match=part):
            load_extractor(choice, weights)
    write_tensors(tmp_path / "w.safetensors", {"other": torch.zeros(3)})
    with pytest.raises(UserError, match="does not fit the network"):
        load_extractor(f"x={module}:Stub", tmp_path / "w.safetensors")


def test_inception_without_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        load_extractor("inception")


def test_an_output_of_another_shape(module: str) -> None:
    class Planes(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images

    from starflow.evaluate import Extractor

    with pytest.raises(UserError, match=r"expected \(2, F\)"):
        extract(Extractor("planes", Planes()), [torch.zeros(2, 3, 4, 4)])
    with pytest.raises(UserError, match="no pictures"):
        extract(Extractor("planes", Planes()), [])
