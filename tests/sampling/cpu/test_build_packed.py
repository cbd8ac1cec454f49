"""Packed weights: where the library reads each number, and the files that keep them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from starflow import STARFlow
from starflow.flow.quantize import set_weight_format
from starflow.nn.quantize import WeightFormat, quantize, rounded
from starflow.sampling.cpu import build as packed_module
from starflow.sampling.cpu.build import KEPT_SECONDS, Library, PackedWeights
from starflow.sampling.cpu.engine import CpuEngine
from starflow.sampling.cpu.pack import MATRICES, PanelLayout, matrices_bytes, pack
from starflow.sampling.policy import SampleSettings
from tests.sampling.cpu.common import drawn, engine_for
from tests.sampling.cpu.test_engine import text_case

FORMS: tuple[WeightFormat, ...] = ("float32", "bfloat16", "int8", "int4")


@pytest.mark.parametrize("inputs", [5, 64, 100])
@pytest.mark.parametrize("form", FORMS)
def test_a_packed_matrix_holds_every_number_in_its_place(form: WeightFormat, inputs: int) -> None:
    weight = torch.randn(6, inputs, generator=torch.Generator().manual_seed(0))
    panels = PanelLayout(4)
    packed = panels.pack_matrix(weight, form)
    assert packed.shape == panels.matrix_shape(6, inputs, form)
    expected = rounded(weight, form)
    for output in range(6):
        for number in range(inputs):
            found = read(packed, form, output // 4, output % 4, number)
            assert found == pytest.approx(float(expected[output, number]), rel=1e-6)


def read(packed: Tensor, form: WeightFormat, panel: int, output: int, number: int) -> float:
    """A weight as step.cpp finds it, with panels of 4 outputs."""
    if form == "float32":
        return float(packed[panel, number, output])
    if form == "bfloat16":
        return float(packed[panel, number // 2, output, number % 2])
    size = 64 if form == "int8" else 32
    group, within = packed[panel, number // size], number % size
    scale = float(group[-8:].view(torch.bfloat16)[output])
    if form == "int8":
        return scale * float(group.view(torch.int8)[within // 2 * 8 + output * 2 + within % 2])
    byte = int(group[within // 4 * 8 + output * 2 + within % 2])
    return scale * ((byte >> 4 if within % 4 > 1 else byte & 15) - 8)


def engine_of(library: Library, size: int = 0) -> CpuEngine:
    return CpuEngine(1.0, library, weights=PackedWeights(size))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_integers_are_packed_once_a_machine(
    library: Library, empty_cache: Path, form: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = text_case()
    set_weight_format(case.model.eval().requires_grad_(False), form)
    first = drawn(case, SampleSettings(1.0), library)
    assert len(list(empty_cache.glob("packed-*.bin"))) == len(list(empty_cache.iterdir())) == 2

    def pack_again(*_given: object) -> None:
        raise AssertionError("it is there")

    monkeypatch.setattr(packed_module, "write_matrices", pack_again)
    again = text_case()
    set_weight_format(again.model.eval().requires_grad_(False), form)
    assert torch.equal(drawn(again, SampleSettings(1.0), library), first)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("large", [False, True])
def test_matrices_from_a_file_are_those_that_are_packed(
    library: Library, empty_cache: Path, form: WeightFormat, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "MAPPED_BYTES", 1)
    block = next(text_case(use_swiglu=True).model.eval().iter_blocks())
    found, expected = engine_of(library, 2 * large).packed(block, form), pack(block, library.panels, form)
    assert found.mapped is large
    assert len(list(empty_cache.glob("packed-*.bin"))) == (large or form.startswith("int"))
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(ours[name].data_ptr() % 64 == 0 for name in MATRICES)


def test_a_file_that_is_not_whole_is_written_anew(library: Library, empty_cache: Path) -> None:
    block = next(text_case().model.eval().iter_blocks())
    expected = engine_of(library).packed(block, "int8")
    (file,) = empty_cache.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    found = engine_of(library).packed(block, "int8")
    assert file.stat().st_size == matrices_bytes(block, library.panels, "int8")
    assert torch.equal(found.layers[0]["qkv"], expected.layers[0]["qkv"])


def test_other_weights_have_another_file(library: Library, empty_cache: Path) -> None:
    block, engine = next(text_case().model.eval().iter_blocks()), engine_of(library)
    engine.packed(block, "int8")
    block.proj_out.weight.data.add_(1.0)
    engine.drop_changed()
    engine.packed(block, "int8")
    assert len(list(empty_cache.iterdir())) == 2


def test_weights_in_training_and_a_full_disk_leave_no_file(
    library: Library, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = next(text_case().model.iter_blocks()).train().requires_grad_(True)
    expected = engine_for(library).packed(block, "int8")
    assert not empty_cache.exists()

    def full(*_given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_module, "write_matrices", full)
    with pytest.warns(UserWarning, match="packed weights stay in memory: cannot write .*No space left"):
        found = engine_for(library).packed(block.eval(), "int8")
    assert list(empty_cache.iterdir()) == []
    assert torch.equal(found.layers[0]["down"], expected.layers[0]["down"])


def test_mapped_weights_are_looked_at_only_where_the_mapping_was_written_to(
    library: Library, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "MAPPED_BYTES", 1)
    text_case().model.save_pretrained(tmp_path)
    model = STARFlow.from_pretrained(tmp_path).requires_grad_(False).eval()
    looked_at: list[Tensor] = []

    def look(_self: Library, values: Tensor) -> int:
        looked_at.append(values)
        return len(looked_at)

    monkeypatch.setattr(Library, "checksum", look)
    engine, block = engine_of(library, 2), next(model.iter_blocks())
    first = engine.packed(block, "int8")
    engine.drop_changed()
    assert engine.packed(block, "int8") is first
    assert looked_at == []
    block.proj_out.weight.data[0, 0] += 1.0
    engine.drop_changed()
    assert engine.packed(block, "int8") is not first
    assert looked_at


def test_files_that_nobody_used_for_long_are_removed(library: Library, empty_cache: Path) -> None:
    block, other = text_case().model.eval().iter_blocks()
    engine_of(library).packed(block, "int8")
    (old,) = empty_cache.iterdir()
    os.utime(old, (0, time.time() - KEPT_SECONDS - 60))
    engine_of(library).packed(block, "int8")
    assert old.exists(), "it was used"
    os.utime(old, (0, time.time() - KEPT_SECONDS - 60))
    engine_of(library).packed(other, "int8")
    assert not old.exists()


def test_the_sizes_of_files_are_known_before(library: Library) -> None:
    for form in FORMS:
        block = next(text_case(use_swiglu=True).model.iter_blocks())
        packed = pack(block, library.panels, form)
        size = sum(layer[name].nbytes for layer in packed.layers for name in MATRICES)
        assert size == matrices_bytes(block, library.panels, form)


def test_codes_are_those_of_the_rounded_weights() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    packed = PanelLayout(4).pack_matrix(weight, "int8")
    codes = packed[0, 0, :-8].view(torch.int8).view(32, 4, 2).transpose(0, 1).flatten(1)
    assert torch.equal(codes, quantize(weight, "int8").codes_NGS[:, 0])
