"""The compiled loop is the eager one: every option of every block, any batch, any number of threads."""

from __future__ import annotations

import copy
import dataclasses
import math
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from starflow.flow.config import STARFlowConfig
from starflow.flow.model import Flow
from starflow.flow.quantize import set_weight_format
from starflow.nn.attention import CachePool, CacheShape, CacheSlice
from starflow.nn.quantize import WeightFormat
from starflow.sampling.cpu import build as packed_module
from starflow.sampling.cpu import engine as engine_module
from starflow.sampling.cpu.build import Library
from starflow.sampling.cpu.engine import covers_block, cpu_engine_of
from starflow.sampling.cpu.pack import address_of, layers_of, pack
from starflow.sampling.policy import SampleSettings
from starflow.sampling.predictor import Predictor, make_draft, select_pictures
from starflow.sampling.sampler import best_candidates, noise_from_seeds, run
from starflow.sampling.solvers import solve_token
from tests.registry import Case, cases, randomised
from tests.sampling.cpu.common import Solving, assert_close, drawn, engine_for, guided, solving

DRAWN = settings(max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEWER = settings(DRAWN, max_examples=15)
BFLOAT16_STEP = 2**-8
FORMS: tuple[WeightFormat, ...] = ("float32", "bfloat16", "int8", "int4")


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many as a test asks for, however little there is to do; after it as many as before."""
    monkeypatch.setattr(engine_module, "THREAD_BYTES", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@DRAWN
@given(
    case=cases(torch.float32),
    weights=st.sampled_from([0.0, 1.5, (0.0, 3.0)]),
    rule=st.sampled_from(["gaussian", "linear"]),
    schedule=st.sampled_from(["constant", "linear"]),
    temperature=st.sampled_from([1.0, 0.7]),
    threads=st.sampled_from([1, 3]),
)
def test_compiled_equals_eager(
    library: Library, case: Case, weights: float | tuple[float, ...], rule: str, schedule: str, temperature: float,
    threads: int,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    weight = torch.tensor(weights) if guided(case) else 0.0
    chosen = SampleSettings(weight, "sequential", rule, schedule, temperature)  # type: ignore[arg-type]
    assert_close(drawn(case, chosen, library), drawn(case, chosen, None))


@settings(DRAWN, max_examples=60)
@given(
    case=cases(torch.float32), threads=st.sampled_from([1, 2, 3]), number=st.integers(0, 2), form=st.sampled_from(FORMS)
)
def test_a_picture_is_bit_for_bit_what_it_is_alone(
    library: Library, case: Case, threads: int, number: int, form: WeightFormat
) -> None:
    """Nine pictures, which no tile of rows divides evenly, each with its own weight; alone on one thread."""
    in_format(case, form)
    index = torch.arange(9) % 2
    many = Case(
        case.model,
        torch.randn(9, *case.x.shape[1:], generator=torch.Generator().manual_seed(0)),
        *(None if one is None else one[index] for one in (case.condition, case.null_condition)),
    )
    whole = solving(many, number % len(case.model.blocks), torch.linspace(0, 4, 9))
    torch.set_num_threads(threads)
    together = whole.compiled(library)
    torch.set_num_threads(1)
    for row in range(9):
        alone = Solving(select_pictures(whole.predictor, torch.tensor([row]), 0), whole.noise_BNC[row : row + 1])
        assert torch.equal(together[row : row + 1], alone.compiled(library))


def in_format(case: Case, form: WeightFormat) -> None:
    """Round a case's model; in "bfloat16" its arithmetic is so as well."""
    if form == "bfloat16":
        case.model.bfloat16()
    set_weight_format(case.model, form)


@DRAWN
@given(
    case=cases(torch.float32),
    form=st.sampled_from(["bfloat16", "int8", "int4"]),
    weight=st.sampled_from([0.0, 1.5]),
    threads=st.sampled_from([1, 3]),
)
def test_every_format_is_the_eager_network_of_the_same_rounded_weights(
    library: Library, case: Case, form: WeightFormat, weight: float, threads: int
) -> None:
    """Inputs of integer products have 16 bits, which is off by a little more than float32."""
    torch.set_num_threads(threads)
    set_weight_format(case.model, form)
    chosen = SampleSettings(weight if guided(case) else 0.0)
    ours, expected = drawn(case, chosen, library), drawn(case, chosen, None)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 if form.startswith("int") else 2e-5)


@FEWER
@given(case=cases(torch.float32), count=st.integers(1, 3), at_once=st.integers(1, 8), threads=st.sampled_from([1, 2]))
def test_the_default_solver_gives_a_picture_bit_for_bit_in_any_batch_alone_and_among_candidates(
    library: Library, case: Case, count: int, at_once: int, threads: int
) -> None:
    """Three pictures with weights of their own, one of them 0, each with the likeliest of its candidates kept."""
    engine = case.model.runtime_cache["engine"] = engine_for(library)
    torch.set_num_threads(threads)
    index = torch.arange(3) % 2
    condition, null = (None if one is None else one[index] for one in _conditions(case))
    weights = torch.tensor([0.0, 1.5, 3.0]) if guided(case) else torch.zeros(3)
    noise = torch.randn(3, count, *case.x.shape[1:], generator=torch.Generator().manual_seed(0))

    def draw(rows: slice, at_once: int) -> Tensor:
        given, none = (None if one is None else one[rows] for one in (condition, null))
        chosen = SampleSettings(weights[rows], solver="auto")
        return best_candidates(case.model, noise[rows], given, none, chosen, at_once)

    together = draw(slice(None), at_once)
    for row in range(3):
        assert torch.equal(draw(slice(row, row + 1), 4)[0], together[row])
    assert engine.weights.blocks


@FEWER
@given(case=cases(torch.float32), number=st.integers(0, 2), threads=st.sampled_from([1, 2]))
def test_extend_is_the_blocks_own(library: Library, case: Case, number: int, threads: int) -> None:
    """Hidden states after others, of any count; more rows than the threads norm for themselves among them."""
    torch.set_num_threads(threads)
    index = torch.arange(24) % 2
    many = Case(case.model, case.x[index], *(None if one is None else one[index] for one in _conditions(case)))
    number %= len(case.model.blocks)
    ours, theirs = (solving(many, number, 1.5).predictor for _ in range(2))
    engine = engine_for(library)
    rows, length = ours.cache.layers[0].keys_BNLH.shape[::2]
    hidden = torch.randn(rows, length, ours.block.spec.layer.width, generator=torch.Generator().manual_seed(0))
    start = 0
    for count in (1, length // 2, length):
        some = hidden[:, start : start + count]
        table = None if theirs.rotary is None else theirs.rotary[start : start + count]
        with torch.no_grad():
            onto = CacheSlice.at(theirs.cache, start, some.shape[1], theirs.query_scale)
            assert_close(engine.extend(ours, some, start), theirs.block.extend(some, table, onto))
        for mine, own in zip(ours.cache.layers, theirs.cache.layers, strict=True):
            assert_close(mine.keys_BNLH, own.keys_BNLH)
            assert_close(mine.values_BNLH, own.values_BNLH)
        start = min(start + count, length - 1)


def _conditions(case: Case) -> tuple[Tensor | None, Tensor | None]:
    return case.condition, case.null_condition


def test_where_it_would_leave_the_cache_it_stops(library: Library) -> None:
    predictor, engine = solving(text_case(), 0).predictor, engine_for(library)
    hidden = torch.zeros(2, 2, 48)
    for position in (-1, 15):
        with pytest.raises(ValueError, match=f"at {position} of 16"):
            engine.extend(predictor, hidden, position)
    with pytest.raises(ValueError):
        engine.extend(predictor, hidden[:1], 0)
    with pytest.raises(ValueError):
        engine.solve(predictor, torch.zeros(2, 15, 2), torch.zeros(2, 15, 2), lambda _: None)


def text_case(model_seed: int = 0, **options: Any) -> Case:
    """A model with a text condition in its last block, and two pictures for it."""
    config = STARFlowConfig(
        in_channels=2, img_size=4, channels=48, num_blocks=2, layers_per_block=2, head_dim=24, txt_size=3, txt_dim=5,
        **options,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    condition, null = torch.randn(2, 2, 3, 5, generator=draw)
    return Case(randomised(config, model_seed), torch.randn(2, 2, 4, 4, generator=draw), condition, null)


@DRAWN
@given(case=cases(torch.float32), number=st.integers(0, 2))
def test_weights_and_cache_in_bfloat16(library: Library, case: Case, number: int) -> None:
    """As a float32 network of the same rounded weights, but for what the cache rounds away."""
    number %= len(case.model.blocks)
    case.model.bfloat16()
    given = solving(case, number, 1.5)
    assert given.predictor.cache.layers[0].keys_BNLH.dtype == torch.bfloat16
    ours = given.compiled(library)
    case.model.float()
    exact = solving(case, number, 1.5).eager()
    change = torch.linalg.vector_norm(ours - exact) / torch.linalg.vector_norm(exact)
    assert change < 4 * BFLOAT16_STEP


@DRAWN
@given(case=cases(torch.float32), number=st.integers(0, 2))
def test_bfloat16_weights_alone_are_exact(library: Library, case: Case, number: int) -> None:
    """With a float32 cache the same weights and, where the processor multiplies bfloat16, inputs are rounded.

    An input that another order of sums moves over the middle between two bfloat16 numbers is off by a step.
    """
    number %= len(case.model.blocks)
    case.model.bfloat16()
    ours = solving(case, number, pool=CachePool(torch.float32))
    wide = _in_float32(ours.predictor)
    if library.multiplies_bfloat16:
        _round_inputs(wide.block)
    exact = dataclasses.replace(ours, predictor=wide).eager()
    change = torch.linalg.vector_norm(ours.compiled(library) - exact) / torch.linalg.vector_norm(exact)
    assert change < (BFLOAT16_STEP / 4 if library.multiplies_bfloat16 else 1e-5)


def _round_inputs(block: torch.nn.Module) -> None:
    """Make the layers' linear maps round what they multiply."""
    for part in block.get_submodule("attn_blocks").modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_pre_hook(lambda module, inputs: (inputs[0].bfloat16().float(),))


def _in_float32(predictor: Predictor) -> Predictor:
    """The same with its weights, rounded as they are, in float32."""
    block, pool = copy.deepcopy(predictor.block).float(), CachePool()
    prefix_RSD = predictor.block.prefix(predictor.condition_RSE)
    if prefix_RSD is not None:  # as bfloat16 has rounded it
        width = prefix_RSD.shape[2]
        prefix_RSD, block.proj_txt = prefix_RSD.float(), torch.nn.Linear(width, width, bias=False)
        torch.nn.init.eye_(block.proj_txt.weight)
    shape = predictor.cache.layers[0].keys_BNLH.shape
    cache = pool.take(CacheShape(len(predictor.cache.layers), *shape), dtype=torch.float32, device=torch.device("cpu"))
    class_R1D = None if predictor.class_R1D is None else predictor.class_R1D.float()
    return dataclasses.replace(predictor, block=block, condition_RSE=prefix_RSD, class_R1D=class_R1D, cache=cache)


@pytest.mark.parametrize("stop", [1, 2, 9, 15])
def test_either_path_goes_on_where_the_other_stopped(library: Library, stop: int) -> None:
    """The keys, values and tokens that one leaves are what the other would have."""
    for number in (0, 1):
        eager, ours = solving(text_case(), number, 2.0), solving(text_case(), number, 2.0)
        whole, engine = eager.eager(), engine_for(library)
        x_BNC = ours.noise_BNC.clone()
        ours.predictor.prefill()
        with torch.no_grad(), engine._call(ours.predictor, x_BNC, ours.noise_BNC, 1) as call:
            library.solve(call.block, 0, stop)
            solve_token(ours.predictor, x_BNC, ours.noise_BNC, stop)
            library.solve(call.block, stop + 1, 16)
        assert_close(x_BNC, whole)


WRITES: dict[str, Callable[[Flow], object]] = {
    "in place": lambda model: [parameter.mul_(1.1) for parameter in model.parameters()],
    "one number": lambda model: next(model.iter_blocks()).proj_in.weight[3, 1].add_(0.5),
    "through .data": lambda model: [parameter.data.mul_(1.1) for parameter in model.parameters()],
    "one number through .data": lambda model: next(model.iter_blocks()).proj_in.weight.data[3, 1].add_(0.5),
    "other tensors": lambda model: model.load_state_dict(randomised(model.config, 5).state_dict(), assign=True),
    "another precision": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("change", WRITES)
def test_changed_weights_are_packed_anew(library: Library, change: str) -> None:
    case = text_case()
    case.model.requires_grad_(False)
    before = drawn(case, SampleSettings(1.0), library)
    engine = case.model.runtime_cache["engine"]
    with torch.no_grad():
        WRITES[change](case.model)
    after = run(case.model, case.x, case.condition, case.null_condition, SampleSettings(1.0)).x
    assert case.model.runtime_cache["engine"] is engine
    assert not torch.equal(after, before)
    assert torch.equal(after, drawn(case, SampleSettings(1.0), library)), "an engine that never saw the old weights"


@torch.no_grad()
def test_a_write_is_noticed_between_two_uses_of_packed_weights(library: Library) -> None:
    engine, block = engine_for(library), next(text_case().model.iter_blocks())
    first = engine.packed(block)
    assert engine.packed(block) is first
    block.proj_out.weight.mul_(2.0)
    assert torch.equal(engine.packed(block).other["proj_out"], 2 * first.other["proj_out"])


def test_weights_made_in_inference_mode_count_no_writes_and_are_packed_anew_all_the_same(library: Library) -> None:
    with torch.inference_mode():
        case = text_case()
        case.model.requires_grad_(False)
        assert next(case.model.parameters()).is_inference()
        before = drawn(case, SampleSettings(1.0), library)
        next(case.model.parameters()).mul_(1.5)
        after = run(case.model, case.x, case.condition, case.null_condition, SampleSettings(1.0)).x
        assert not torch.equal(after, before)


def test_what_it_does_not_cover_goes_the_eager_way(library: Library) -> None:
    case = text_case()
    engine = case.model.runtime_cache["engine"] = engine_for(library)
    assert engine.ready(solving(case, 1).predictor)
    assert not engine.ready(make_draft(solving(case, 1).predictor))
    assert not engine.ready(solving(case, 1, pool=CachePool(torch.float16)).predictor)
    layer = next(layers_of(list(case.model.iter_blocks())[1]))
    layer.attention.proj = Other(layer.attention.proj)
    assert cpu_engine_of(case.model) is engine
    assert not engine.ready(solving(case, 1).predictor)
    assert engine.ready(solving(case, 0).predictor)
    case.model.double()
    run(case.model, case.x, case.condition, case.null_condition, SampleSettings(1.0))
    assert not engine.ready(solving(dataclasses.replace(case, x=case.x.double()), 0).predictor)


class Other(torch.nn.Linear):
    """A linear layer that computes something of its own."""

    def __init__(self, given: torch.nn.Linear) -> None:
        super().__init__(given.in_features, given.out_features)


@pytest.mark.parametrize("part", ["attn_blocks.0", "attn_blocks.0.attention", "attn_blocks.0.mlp", "proj_in"])
def test_a_hook_acts_on_samples_as_on_densities(library: Library, part: str) -> None:
    """The compiled loop steps aside, and the eager one calls every part, so that sampling stays the inverse."""
    case = text_case()
    plain = drawn(case, SampleSettings(), library)
    module = list(case.model.iter_blocks())[1].get_submodule(part)
    hook = module.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    x = run(case.model, case.x, case.condition, None, SampleSettings()).x
    assert not torch.allclose(x, plain, atol=1e-3)
    with torch.no_grad():
        assert_close(case.model(x, case.condition)[0], case.x)
    hook.remove()
    assert torch.equal(run(case.model, case.x, case.condition, None, SampleSettings()).x, plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.attn_blocks[0].mlp, "forward", lambda x: 0 * x),
        lambda block: setattr(block, "proj_out", torch.nn.Sequential(block.proj_out)),
        lambda block: setattr(block.attn_blocks[0].attention, "norm", torch.nn.Identity()),
        lambda block: block.attn_blocks.append(copy.deepcopy(block.attn_blocks[0])),
    ],
    ids=["forward of its own", "wrapped", "no norm", "another layer"],
)
def test_a_block_that_is_not_as_built_is_not_covered(change: Callable[[Any], None]) -> None:
    block = list(text_case().model.iter_blocks())[1]
    assert covers_block(block)
    change(block)
    assert not covers_block(block)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_torchs_defaults_change_nothing(library: Library, dtype: torch.dtype, device: str) -> None:
    case = text_case()
    noise = noise_from_seeds([1, 2], tuple(case.x.shape[1:]))
    expected = drawn(dataclasses.replace(case, x=noise), SampleSettings(1.0), library)
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        again = noise_from_seeds([1, 2], tuple(case.x.shape[1:]))
        found = drawn(dataclasses.replace(case, x=again), SampleSettings(1.0), library)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3), torch.zeros(4, 2)[:, 0], torch.zeros(4).double(), torch.zeros(4, device="meta")]
)
def test_an_address_is_handed_on_only_of_what_the_library_takes_it_for(tensor: Tensor) -> None:
    with pytest.raises(TypeError, match="^noise is .* expected 4 contiguous"):
        address_of("noise", tensor, 4, torch.float32)
    whole = torch.zeros(4)
    assert address_of("noise", whole, 4, torch.float32) == whole.data_ptr()


def test_weights_that_change_while_they_are_packed_are_packed_again(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = text_case()
    engine, block = engine_for(library), next(case.model.iter_blocks())

    def pack_and_write(*given: Any) -> Any:
        packed = pack(*given)
        with torch.no_grad():
            block.proj_in.weight.mul_(2)
        return packed

    monkeypatch.setattr(packed_module, "pack", pack_and_write)
    torn = engine.packed(block)
    monkeypatch.undo()
    assert engine.packed(block) is not torn
    engine.drop_changed()
    assert torch.equal(engine.packed(block).other["proj_in"], pack(block, library.panels).other["proj_in"])


def test_threads_may_sample_while_weights_change(library: Library) -> None:
    """No pass fails or leaves its memory, and once the writing ends, samples are of the weights as they are."""
    case = text_case(sos=False)
    case.model.runtime_cache["engine"] = engine_for(library)
    case.model.requires_grad_(False)

    def draw(number: int) -> Tensor:
        if number % 3 == 0:
            next(case.model.parameters()).mul_(1.01)
        return run(case.model, case.x, case.condition, case.null_condition, SampleSettings(1.0)).x

    with ThreadPoolExecutor(4) as pool:
        assert all(x.isfinite().all() for x in pool.map(draw, range(24)))
    assert_close(draw(1), drawn(case, SampleSettings(1.0), None))


def test_several_threads_may_sample_with_one_model(library: Library) -> None:
    """Each with memory of its own: as if alone, bit for bit."""
    case = text_case(sos=False)
    case.model.runtime_cache["engine"] = engine_for(library)
    noises = torch.randn(8, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def draw(noise: Tensor) -> Tensor:
        weight = float(noise[0, 0, 0, 0].abs())
        return run(case.model, noise, case.condition, case.null_condition, SampleSettings(weight)).x

    alone = [draw(noise) for noise in noises]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(torch.equal(one, other) for one, other in zip(pool.map(draw, noises), alone, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, struct.unpack("f", struct.pack("I", 0x7FC00001))[0]])
def test_what_is_no_number_stays_none_and_in_its_own_picture(library: Library, value: float) -> None:
    case = text_case()
    clean = drawn(case, SampleSettings(1.0), library)
    case.x[0, 0, 2, 1] = value
    ours, eager = (drawn(case, SampleSettings(1.0), given) for given in (library, None))
    assert torch.equal(ours[1], clean[1])
    assert torch.equal(ours[0].isfinite(), eager[0].isfinite())
    assert not ours[0].isfinite().all()


def test_no_more_threads_than_there_is_work_for(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    given = solving(text_case(), 1)
    engine, used = engine_for(library), []
    for size in (1, 4 << 20):
        monkeypatch.setattr(engine_module, "THREAD_BYTES", size)
        with engine._call(given.predictor, given.noise_BNC, given.noise_BNC, 1) as call:
            used.append(call.block.threads)
    assert used == [3, 1]


def test_of_a_large_model_only_the_block_at_work_is_packed(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    config = STARFlowConfig(in_channels=2, img_size=4, channels=48, head_dim=24, num_blocks=3, layers_per_block=1)
    model, noise = randomised(config, 0), torch.randn(2, 2, 4, 4)
    engine = model.runtime_cache["engine"] = engine_for(library)
    expected = run(model, noise, None, None, SampleSettings()).x
    whole, first = engine.bytes, engine.weights.blocks[next(model.iter_blocks())]["float32"].bytes
    assert len(engine.weights.blocks) == 3
    monkeypatch.setattr(packed_module, "PACKED_BYTES_LIMIT", whole // 2)
    engine = model.runtime_cache["engine"] = engine_for(library)
    most = 0

    def look(_done: int, _total: int) -> None:
        nonlocal most
        most = max(most, engine.bytes)

    for _ in range(2):
        assert torch.equal(run(model, noise, None, None, SampleSettings(), look).x, expected)
    assert most == first
    assert list(engine.weights.blocks) == [model.blocks[0]]


def test_progress_is_told_of_every_token(library: Library) -> None:
    case = text_case(sos=False)
    case.model.runtime_cache["engine"] = engine_for(library)
    calls: list[tuple[int, int]] = []
    run(case.model, case.x, case.condition, None, SampleSettings(), lambda *call: calls.append(call))
    assert calls[-1] == (32, 32)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@pytest.mark.parametrize("tanh_form", [False, True])
def test_gelu_is_accurate(library: Library, tanh_form: bool) -> None:
    x = torch.cat(
        (torch.linspace(-20, 20, 4096), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 88.0, -88.0] * 2))
    )
    y = torch.empty_like(x)
    library.handle.starflow_gelu(x.data_ptr(), y.data_ptr(), len(x), tanh_form)
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh" if tanh_form else "none")
    assert ((y - expected).abs() <= 3e-7 * x.abs().clamp(max=1e3).double() * 1.0 + 1e-9).all()
    for odd in (math.nan, math.inf):
        x[:16] = odd
        library.handle.starflow_gelu(x.data_ptr(), y.data_ptr(), 16, tanh_form)
        assert y[:16].isnan().all() if math.isnan(odd) else (y[:16] == odd).all()


def test_the_mark_sees_values_and_places(library: Library) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    marks = {library.checksum(values), library.checksum(values[:-1]), library.checksum(values.flip(0))}
    for index in (0, 17, 500, 999):
        changed = values.clone()
        changed[index] += 1e-6
        marks.add(library.checksum(changed))
    assert len(marks) == 7
    assert library.checksum(values.clone()) == library.checksum(values)
