"""A language model's layers inside a flow: mapped weights compute what transformers computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from starflow.conditioning import TokenEmbeddings
from starflow.errors import UserError
from starflow.flow.config import config_from_dict
from starflow.flow.model import STARFlow
from starflow.published.convert import gemma_options, gemma_tensors, is_gemma
from tests.conditioning.conftest import WORDS, save_encoder

SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}


def save(kind: str, folder: Path) -> Any:
    """A random model whose norms are no identity, on the disk as the hub has it."""
    import transformers

    torch.manual_seed(0)
    options: dict[str, dict[str, Any]] = {
        "Gemma": {},
        "Gemma2": {"query_pre_attn_scalar": 20, "attn_logit_softcapping": None, "sliding_window": 4096},
        "Gemma3": {"query_pre_attn_scalar": 20, "sliding_window": 4096, "layer_types": ["full_attention"] * 2},
    }
    own = options[kind]
    suffix = "Text" if kind == "Gemma3" else ""
    config = getattr(transformers, f"{kind}{suffix}Config")(**SIZES, **own)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" in name else 0.15)
    save_encoder(folder, model)
    return model.eval()


@pytest.mark.parametrize("kind", ["Gemma", "Gemma2", "Gemma3"])
def test_the_layers_are_the_models(tmp_path: Path, kind: str) -> None:
    """The flow's layers over the caption's embeddings, with the model's own positions, give its hidden states."""
    model = save(kind, tmp_path)
    assert is_gemma(tmp_path)
    options = {"in_channels": 4, "img_size": 4, "txt_size": 6, "txt_dim": 64, **gemma_options(tmp_path, (1, 2))}
    flow = STARFlow(config_from_dict(options))  # type: ignore[arg-type]
    mapped = gemma_tensors(tmp_path, block=1, layers=2)
    missing, unexpected = flow.load_state_dict(mapped, strict=False)
    assert not unexpected
    anew = ("sos_embed", "proj_in.weight", "proj_in.bias", "proj_out.weight", "proj_out.bias")
    assert {name for name in missing if name.startswith("blocks.1.")} == {f"blocks.1.{name}" for name in anew}
    states = TokenEmbeddings.from_pretrained(str(tmp_path), 6).encode(["a red apple on"])[:, :5]
    ids = torch.tensor([[WORDS.index(word) for word in ("a", "red", "apple", "on", "</s>")]])
    found: Any = flow.blocks[1]
    hidden = found.proj_txt(states)
    rotary = model.model.rotary_emb
    positions = torch.arange(5)[None]
    cos, sin = rotary(hidden, positions, "full_attention") if kind == "Gemma3" else rotary(hidden, positions)
    table = torch.stack((cos, sin), dim=-1)[0, :, :16].unsqueeze(1)
    with torch.no_grad():
        for layer in found.attn_blocks:
            hidden = layer(hidden, table)
        hidden = found.final_norm(hidden)
        expected = model.model(input_ids=ids).last_hidden_state
    assert torch.allclose(hidden, expected, atol=2e-4 * float(expected.abs().max()))


def test_embeddings_keep_the_conditioners_contract(tmp_path: Path) -> None:
    save("Gemma2", tmp_path)
    conditioner = TokenEmbeddings.from_pretrained(str(tmp_path), 6)
    states = conditioner.encode(["a red apple on the table", "tree", ""])
    assert states.shape == (3, 6, 64)
    assert conditioner.spec.kind == "embeddings"
    assert states[1, 2:].abs().sum() == 0, "padding is zero"
    assert torch.equal(states[2], conditioner.null(1)[0])
    assert torch.equal(conditioner.encode(["tree"])[0], states[1])


def test_what_is_no_such_model_is_refused(tmp_path: Path) -> None:
    assert not is_gemma(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert not is_gemma(tmp_path)
    with pytest.raises(UserError, match="holds a 't5', expected a Gemma-style language model"):
        gemma_options(tmp_path)
    save("Gemma", tmp_path)
    with pytest.raises(UserError, match="asks for 3 deep layers, but .* has 2"):
        gemma_options(tmp_path, (1, 3))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        gemma_tensors(tmp_path, 1, 2)
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        TokenEmbeddings.from_pretrained(str(tmp_path), 6)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        TokenEmbeddings.from_pretrained(str(tmp_path), 6)
