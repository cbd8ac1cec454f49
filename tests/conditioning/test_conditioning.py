"""A text encoder in the layout of google/flan-t5-xl (several shards, a trained subword tokenizer, 128 tokens), kept in
memory or loaded on demand."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from starflow import conditioning as loading
from starflow.conditioning import ConditionerSpec, OnDemandTextEncoder, TextEncoder, _free_memory, load_conditioner
from starflow.errors import UserError

WIDTH, SIZE = 16, 128
CAPTIONS = [
    "a red apple on a wooden table",
    "two blue cars under an old tree",
    "the green house with seven windows in the snow",
]
LONG = "an apple and " * 80


def train_tokenizer(folder: Path) -> int:
    """A unigram tokenizer as T5's: metaspace, and the end token after every text; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS * 20, trainer)
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


@pytest.fixture(scope="module")
def flan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoder, decoder and head, gated GELU and untied embeddings, as published; in shards of 20 kB."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("flan-t5-tiny")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=train_tokenizer(folder),
        d_model=WIDTH,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder, max_shard_size="20KB")
    return folder


def spec(folder: Path, **changes: Any) -> ConditionerSpec:
    return ConditionerSpec(**{"kind": "text", "size": SIZE, "dim": WIDTH, "source": str(folder), **changes})


def test_the_layout_is_that_of_flan_t5_xl(flan: Path) -> None:
    names = {path.name for path in flan.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"} < names
    assert len(list(flan.glob("model-*-of-*.safetensors"))) > 2
    assert "model.safetensors" not in names
    held = json.loads((flan / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(name.startswith("decoder.") for name in held)
    assert any(name.startswith("encoder.") for name in held)


@torch.no_grad()
def test_states_are_those_of_128_padded_tokens_times_the_mask(flan: Path) -> None:
    """Against transformers' own encoder on the padded batch, as the published model was trained."""
    from transformers import AutoTokenizer, T5EncoderModel

    tokens = AutoTokenizer.from_pretrained(flan)(
        [*CAPTIONS, LONG, ""], padding="max_length", truncation=True, max_length=SIZE, return_tensors="pt"
    )
    alone = T5EncoderModel.from_pretrained(flan).eval()
    states = alone(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    expected = states * tokens.attention_mask[..., None]
    encoder = TextEncoder.from_pretrained(str(flan))  # 128 is the default
    with pytest.warns(UserWarning, match="1 of 5 prompts over the limit of 128 tokens"):
        found = encoder.encode([*CAPTIONS, LONG, ""])
    assert found.shape == (5, SIZE, WIDTH)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.null(2), expected[4:].expand(2, -1, -1), rtol=1e-5, atol=1e-5)
    assert not [name for name, _ in encoder.network.named_parameters() if "decoder" in name or "lm_head" in name]


@torch.no_grad()
def test_bfloat16_is_what_the_spec_says(flan: Path) -> None:
    exact = load_conditioner(spec(flan)).encode(CAPTIONS)
    half = load_conditioner(spec(flan, dtype="bfloat16"))
    assert half.spec.dtype == "bfloat16"
    assert next(half.network.parameters()).dtype == torch.bfloat16
    states = half.encode(CAPTIONS)
    assert states.dtype == torch.float32
    torch.testing.assert_close(states, exact, rtol=0.1, atol=0.1)
    assert not torch.equal(states, exact)


def test_a_wrong_or_missing_shard_is_named(flan: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(flan, broken)
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"{shard.name} is not a whole safetensors file"):
        TextEncoder.from_pretrained(str(broken))
    shard.unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of \d+ shards \({shard.name}\)"):
        TextEncoder.from_pretrained(str(broken))


def test_what_is_saved_is_the_encoder_and_reads_back(flan: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.from_pretrained(str(flan))
    encoder.save(tmp_path / "encoder")
    saved = sum(path.stat().st_size for path in (tmp_path / "encoder").glob("*.safetensors"))
    assert saved < 0.6 * sum(path.stat().st_size for path in flan.glob("*.safetensors"))
    assert (tmp_path / "encoder" / "checksums.json").is_file()
    again = TextEncoder.from_pretrained(str(tmp_path / "encoder"))
    assert torch.equal(again.encode(CAPTIONS), encoder.encode(CAPTIONS))


class Loads:
    """Counts how often a `TextEncoder` is read, and keeps no hold of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.networks: list[weakref.ref[Any]] = []
        original = TextEncoder.from_pretrained

        def counting(*arguments: Any) -> TextEncoder:
            encoder = original(*arguments)
            self.networks.append(weakref.ref(encoder.network))
            return encoder

        monkeypatch.setattr(TextEncoder, "from_pretrained", counting)

    @property
    def alive(self) -> int:
        return sum(network() is not None for network in self.networks)


def test_an_encoder_on_demand_gives_the_same_and_is_gone_after(flan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = load_conditioner(spec(flan))
    loads = Loads(monkeypatch)
    lazy = OnDemandTextEncoder(spec(flan))
    assert not loads.networks
    prompts = [*CAPTIONS, CAPTIONS[0], ""]
    torch.testing.assert_close(lazy.encode(prompts), kept.encode(prompts), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lazy.null(3), kept.null(3), rtol=1e-5, atol=1e-5)
    assert (len(loads.networks), loads.alive) == (1, 0)
    lazy.encode(CAPTIONS[1:])  # cached
    assert len(loads.networks) == 1
    lazy.encode(["a green apple"])
    assert (len(loads.networks), loads.alive) == (2, 0)
    assert not list(lazy.network.parameters())
    assert lazy.spec == kept.spec


def test_prompts_of_many_calls_are_encoded_together(flan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = Loads(monkeypatch)
    lazy = OnDemandTextEncoder(spec(flan))
    texts = [f"{number} apples" for number in range(40)]  # over two passes
    lazy.encode_ahead(texts)
    together = torch.cat([lazy.encode([text]) for text in texts])
    assert len(loads.networks) == 1
    torch.testing.assert_close(together, TextEncoder.from_pretrained(str(flan)).encode(texts), rtol=1e-5, atol=1e-5)


def test_the_cache_of_prompts_is_bounded(flan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CACHED_PROMPTS", 3)
    loads = Loads(monkeypatch)
    lazy = OnDemandTextEncoder(spec(flan))
    found = lazy.encode(CAPTIONS)
    torch.testing.assert_close(lazy.encode(CAPTIONS), found)  # more than are cached is no fault
    assert len(lazy._cache) <= 3
    assert loads.alive == 0


def test_large_encoders_are_loaded_on_demand_unless_kept(flan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load_conditioner(spec(flan), keep=None), TextEncoder)
    monkeypatch.setattr(loading, "LARGE_BYTES", 1000)
    assert isinstance(load_conditioner(spec(flan), keep=None), OnDemandTextEncoder)
    assert isinstance(load_conditioner(spec(flan), keep=True), TextEncoder)
    assert isinstance(load_conditioner(spec(flan), keep=False), OnDemandTextEncoder)


def test_faults_show_before_anything_is_loaded(flan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = Loads(monkeypatch)
    with pytest.raises(UserError, match="has width 16, the model expects 17"):
        OnDemandTextEncoder(spec(flan, dim=17))
    with pytest.raises(UserError, match=r"has no config.json"):
        OnDemandTextEncoder(spec(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is of no text encoder: it has neither d_model nor hidden_size"):
        OnDemandTextEncoder(spec(tmp_path))
    assert not loads.networks


def test_saving_an_encoder_on_demand_leaves_nothing_in_memory(
    flan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads(monkeypatch)
    OnDemandTextEncoder(spec(flan)).save(tmp_path / "encoder")
    gc.collect()
    assert loads.alive == 0
    assert TextEncoder.from_pretrained(str(tmp_path / "encoder")).spec.dim == WIDTH


def test_memory_in_a_circle_is_returned() -> None:
    """As transformers' models have it; without the garbage collector a circle of references stays."""
    network = torch.nn.Linear(1, 1)
    object.__setattr__(network, "own", network)
    gone = weakref.ref(network)
    gc.disable()
    try:
        del network
        assert gone() is not None
        _free_memory(torch.device("cpu"))
        assert gone() is None
    finally:
        gc.enable()
